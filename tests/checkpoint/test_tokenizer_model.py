"""A checkpoint with tokenizer.model and no tokenizer.json: the same tokens in every reader."""

from __future__ import annotations

import pytest
import sentencepiece

from core.__main__ import main
from core.checkpoint import locate
from core.errors import CheckpointError
from core.evaluate import estimate
from core.model.loading import load_tokenizer
from core.prune import depth
from core.retrain import encoders
from tests import tiny

TEXT = "Ann sees the red ball. 12 345, naïve café — 東京 🙂\n\n  two  spaces"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_sentencepiece(tmp_path_factory.mktemp("pieces") / "model")


def test_every_reader_gives_sentencepieces_tokens(folder, tmp_path):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [1, *theirs.encode(TEXT)]
    info = locate.open(folder).info
    assert info.tokenizer is not None
    assert (info.tokenizer["kind"], info.tokenizer["size"]) == ("sentencepiece", 400)
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    encoder = encoders.of_folder(folder)
    assert encoder.encode(TEXT) == ids
    assert encoder.eos_id == 2
    assert "".join(encoder.pieces(theirs.encode("the red ball"))) == " the red ball"
    (tmp_path / "text.txt").write_text(TEXT)
    assert estimate.text_tokens(str(tmp_path / "text.txt"), folder) == len(ids) - 1


def test_a_variant_keeps_it_and_can_be_evaluated(folder, tmp_path):
    depth.prune(folder, [2], tmp_path / "pruned")
    assert load_tokenizer(tmp_path / "pruned")(TEXT)["input_ids"][0] == 1
    (tmp_path / "text.txt").write_text(tiny.text(40))
    text, out = str(tmp_path / "text.txt"), str(tmp_path / "out")
    argv = ["evaluate", str(tmp_path / "pruned"), "--perplexity", text, "--window", "32"]
    assert main([*argv, "--out", out, "--device", "cpu"]) == 0
    assert (tmp_path / "out/perplexity.csv").is_file()


def test_a_damaged_one_is_refused_by_inspect(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = (folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) // 2 + 1])
    with pytest.raises(CheckpointError, match="tokenizer.model is not a valid tokenizer"):
        locate.open(tmp_path, need="headers")
