"""Tokenizers in llama.cpp's terms: each pre-tokenizer of the table against llama.cpp itself."""

import json
import random
import shutil

import pytest
import sentencepiece
import tiny
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from core.__main__ import main
from core.checkpoint import locate
from core.errors import CheckpointError
from core.export import gguf_file, pretokenizers, vocabulary
from core.importing import convert
from core.model.loading import load_tokenizer

CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"]


def split(*expressions, digits=False):
    steps = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, last])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
TABLE = {
    "gpt-2": (GPT2, False),
    "smollm": (pre_tokenizers.Sequence([DIGITS, GPT2]), False),
    "llama-bpe": (split(pretokenizers.LLAMA3), True),
    "smaug-bpe": (split(pretokenizers.LLAMA3), False),
    "qwen2": (split(pretokenizers.QWEN2), False),
    "tekken": (split(pretokenizers.TEKKEN), True),
    "gpt-4o": (split(pretokenizers.GPT4O), False),
    "deepseek-coder": (split(*CODER, digits=True), False),
}


def trained(splitter, ignore_merges, text):
    """Return a tokenizer whose merges depend on where the text is split."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splitter
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([text * 3, tiny.text(50)], trainer)
    return tokenizer


@pytest.mark.parametrize("name", TABLE)
def test_each_pre_tokenizer_is_llama_cpps(llama_cpp, tiny_dir, tmp_path, paragraph, name):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_dir("gqa", vocab_size=700), folder)
    tokenizer = trained(*TABLE[name], paragraph)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = gguf_file.describe(locate.at(folder), "f16")
    assert content.vocabulary.pre == name
    gguf_file.write(content, tmp_path / "model.gguf")
    if name in pretokenizers.APPROXIMATE:
        assert "combining marks" in content.notes[0]
        paragraph = paragraph.replace("हिन्दी", "")
    mixed = "".join(random.Random(1).sample(paragraph, len(paragraph)))
    with llama_cpp(tmp_path / "model.gguf") as engine:
        for text in (paragraph, mixed):
            assert engine.tokenize(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize("name", ["tokenizer.model", "stories260k"])
def test_sentencepiece_through_llama_cpp_and_back(llama_cpp, request, tmp_path, paragraph, name):
    """One tokenizer for SentencePiece itself (or the original), llama.cpp, and the import."""
    if name == "stories260k":
        folder = request.getfixturevalue("real_dir") / name
        original = load_tokenizer(folder)
    else:
        folder = tiny.write_sentencepiece(tmp_path / "model")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))

        def original(text):
            return {"input_ids": [1, *pieces.encode(text)]}

    content = gguf_file.describe(locate.at(folder), "f32")
    assert content.vocabulary.model == "llama"
    assert any("begins with a space" in n for n in content.notes) == (name == "tokenizer.model")
    gguf_file.write(content, tmp_path / "model.gguf")
    convert.convert(tmp_path / "model.gguf", tmp_path / "back", dtype="float32")
    back = load_tokenizer(tmp_path / "back")
    mixed = "".join(random.Random(1).sample(paragraph, len(paragraph)))
    with llama_cpp(tmp_path / "model.gguf") as engine:
        for text in (paragraph, mixed, "  two spaces in front", "the end  ", "\n\n", ""):
            ids = original(text)["input_ids"]
            assert engine.tokenize(text) == ids
            assert back(text)["input_ids"] == ids
            assert back.decode(ids, skip_special_tokens=True) == text
        chat = "<s>Ann sees</s> the red ball<s> "
        assert engine.tokenize(chat) == back(chat)["input_ids"]
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].float(), after[key]) for key in before)


def test_an_unknown_pre_tokenizer_is_never_guessed(tiny_gqa, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_gqa, folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    table["pre_tokenizer"] = json.loads(split(r"\w+|\W+").__getstate__())
    (folder / "tokenizer.json").write_text(json.dumps(table))
    out = tmp_path / "model.gguf"
    assert main(["export", str(folder), "--format", "gguf", "--out", str(out)]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert r"pre-tokenizer (split \w+|\W+; bytes)" in shown
    assert "no file is written" in shown
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "of the kind Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text .Lowercase."),
    ],
)
def test_tokenizers_that_llama_cpp_lacks(tiny_gqa, change, words):
    table = json.loads((tiny_gqa / "tokenizer.json").read_text())
    with pytest.raises(CheckpointError, match=words):
        vocabulary.kind_of(table | change)


def test_special_tokens_and_templates(tiny_gqa, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_gqa, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["added_tokens"].append(
        {**table["added_tokens"][0], "id": 330, "content": "<far>", "special": True}
    )
    found = vocabulary.convert(
        vocabulary.Source(table, {"bos": "<s>", "eos": "</s>"}, {"": "{{ messages }}"}), 325, [2, 3]
    )
    assert found.ids == {"bos": 1, "eos": 2, "eot": 3}
    assert found.flags == {"add_bos_token": True, "add_eos_token": False}
    assert vocabulary.read(folder).templates == {"": "{{ messages }}"}
    size = max(table["model"]["vocab"].values()) + 1
    assert found.types[:4] == [vocabulary.CONTROL] * 4
    assert found.types[size:] == [vocabulary.UNUSED] * (325 - size)
    assert found.notes == ("Token '<far>' is left out: the embedding has only 325 rows.",)
