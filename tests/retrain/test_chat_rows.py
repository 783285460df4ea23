"""Rows of conversations: loss on the assistant's answers alone, with and without a template."""

from pathlib import Path

import pytest
import tiny
from chat_templates import ENDS, MISTRAL, NAMES, SPECIAL
from retrain_helpers import instructions, write_jsonl

from core.checkpoint import chat
from core.errors import DataError, OptionError
from core.retrain import encoders, rows
from core.retrain.spec import RetrainSpec

SMOLLM2 = Path("~/.cache/depthcut-real/smollm2-135m").expanduser()
TALK = [
    {"role": "user", "content": "Who sees the red ball?"},
    {"role": "assistant", "content": "Ann sees it."},
    {"role": "user", "content": "And the boat?"},
    {"role": "assistant", "content": "Ben, by the river.\n\nü"},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tokenizer's folder for each template, with the tokens that the templates use."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    folders = {}
    for name, source in zip((*NAMES, "none"), (*ENDS, None), strict=True):
        tokenizer.chat_template = source
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folders[name])
        (folders[name] / "config.json").write_text("{}")
    return folders


def both(folder):
    """The encoder of a training and that of a preview."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return encoders.ModelTokenizer(tokenizer), encoders.FileTokenizer(folder)


def with_loss(row, encoder):
    """The texts that the loss covers, a part for each run of tokens."""
    return [s["text"] for s in rows.preview(row, encoder) if not s["masked"]]


def prepare(encoder, source, vocab=400, **options):
    spec = RetrainSpec(checkpoint="x", out="y", data=str(source), **{"cutoff": 256, **options})
    return rows.prepare(spec, encoder, vocab=vocab, context=256)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_covers_the_answers_and_their_end_tokens(saved, name):
    source = dict(zip(NAMES, ENDS, strict=True))[name]
    trained, previewed = both(saved[name])
    row = rows.chat_row(TALK, trained, trained.chat)
    assert row == rows.chat_row(TALK, previewed, previewed.chat)
    theirs = trained.tokenizer.apply_chat_template(TALK)["input_ids"]
    assert list(row.ids) == theirs
    predicted = trained.tokenizer.decode([i for i in row.labels if i != rows.IGNORED])
    space = " " if source is MISTRAL else ""
    said = [t["content"] for t in TALK if t["role"] == "assistant"]
    assert predicted == "".join(space + one + ENDS[source] for one in said)
    # The naive way: tokens that a conversation shares with its question have no loss.
    asked = trained.tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True)
    asked = asked["input_ids"]
    assert theirs[: len(asked)] == asked
    labels = row.labels[len(asked) :]
    first = next(i for i, label in enumerate(labels) if label != rows.IGNORED)
    added = "<think>\n\n</think>\n\n" if name == "qwen3" else ""  # by the template, not said
    assert row.labels[len(asked) - 1] == rows.IGNORED
    assert trained.tokenizer.decode(theirs[len(asked) :][:first]) == added


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no SmolLM2: ../shared/real/smollm2.py")
def test_smollm2_learns_answers_after_its_default_system_prompt():
    trained, previewed = both(SMOLLM2)
    row = rows.chat_row(TALK, trained, trained.chat)
    assert row == rows.chat_row(TALK, previewed, previewed.chat)
    assert list(row.ids) == trained.tokenizer.apply_chat_template(TALK)["input_ids"]
    first = rows.preview(row, trained)[0]
    assert first["masked"]
    assert "You are a helpful AI assistant named SmolLM" in first["text"]
    end = "<|im_end|>"
    learned = [[i for i in row.labels if i != rows.IGNORED]]
    assert trained.tokenizer.decode(learned[0]) == f"Ann sees it.{end}Ben, by the river.\n\nü{end}"


def test_without_a_template_conversations_have_the_plain_layout(saved):
    trained, previewed = both(saved["none"])
    row = rows.chat_row(TALK, trained, trained.plain_chat)
    assert row == rows.chat_row(TALK, previewed, previewed.plain_chat)
    text = trained.tokenizer.decode(row.ids)
    assert text.startswith("<s>User: Who sees the red ball?\nAssistant: Ann sees it.</s>\nUser:")
    predicted = trained.tokenizer.decode([i for i in row.labels if i != rows.IGNORED])
    assert predicted == "Ann sees it.</s>Ben, by the river.\n\nü</s>"


def test_an_end_token_is_added_if_the_template_has_none(saved):
    trained, _ = both(saved["none"])
    open_ended = chat.ChatTemplate("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", {})
    row = rows.chat_row(TALK[:2], trained, open_ended)
    assert row.labels[-1] == trained.eos_id == row.ids[-1]
    assert trained.tokenizer.decode([i for i in row.labels if i != -100]) == "Ann sees it.</s>"


def test_auto_takes_the_chat_template_for_messages_and_instructions(saved, tmp_path):
    _, with_one = both(saved["chatml"])
    _, without = both(saved["none"])
    talks = write_jsonl(tmp_path / "m.jsonl", [
        {"messages": [{**TALK[0], "content": f"Say {i}"}, TALK[1]]} for i in range(20)
    ])  # fmt: skip
    asked = write_jsonl(tmp_path / "i.jsonl", instructions(20))
    found = {
        (source, encoder.chat is not None): prepare(encoder, source)
        for source in (talks, asked) for encoder in (with_one, without)
    }  # fmt: skip
    assert [(f.kind, f.template) for f in found.values()] == [
        ("messages", "chat"), ("messages", "plain"),
        ("instruction", "chat"), ("instruction", "alpaca"),
    ]  # fmt: skip
    shown = with_loss(found[asked, True].train[0], with_one)
    assert len(shown) == 1
    assert shown[0].endswith("<|im_end|>")
    with pytest.raises(OptionError, match="has no chat template"):
        prepare(without, talks, template="chat")
    alpaca = prepare(with_one, talks, template="alpaca")
    assert "### Response:" in rows.preview(alpaca.train[0], with_one)[0]["text"]


def test_rows_that_the_template_refuses_are_skipped_with_its_reason(saved, tmp_path):
    _, encoder = both(saved["mistral"])
    good = [{"messages": [{**TALK[0], "content": f"Say {i}"}, TALK[1]]} for i in range(20)]
    bad = {"messages": [TALK[0], TALK[0], TALK[1]]}
    found = prepare(encoder, write_jsonl(tmp_path / "b.jsonl", [*good, bad]), holdout=1)
    held = len(found.heldout)
    assert len(found.train) + found.dropped + held == 21
    if found.dropped:
        assert "roles must alternate" in found.refused
    with pytest.raises(DataError, match="20 rows are skipped. Row 1: .*roles must alternate"):
        prepare(encoder, write_jsonl(tmp_path / "w.jsonl", [bad] * 22), holdout=2)
