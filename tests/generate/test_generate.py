"""``generate``: its rows, its counts, resuming, and training on what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

from core.__main__ import main
from core.data import sources
from core.generate import writing
from core.generate.results import Summary, read_pairs
from core.retrain import rows as training
from core.retrain.encoders import of_folder
from core.retrain.spec import RetrainSpec

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Instructions of various lengths, as Alpaca has them."""
    lines = tiny.text(24, 5).splitlines()
    rows = [
        {"instruction": f"Say it{' again' * (n % 5)}", "input": "", "output": line}
        for n, line in enumerate(lines)
    ]
    return write(tmp_path_factory.mktemp("asked") / "asked.jsonl", rows)


def run(*argv):
    return main(["generate", *map(str, argv), "--device", "cpu"])


def lines_of(folder):
    return [json.loads(line) for line in (folder / "generated.jsonl").read_text().splitlines()]


def test_every_prompt_has_its_own_answer_or_the_reference(tiny_gqa, asked, tmp_path, capsys):
    out = tmp_path / "out"
    options = (tiny_gqa, "--prompts", asked, "--out", out, "--max-tokens", 12, "--batch", 5)
    assert run(*options, "--check", "none") == 0
    found, summary = lines_of(out), Summary.read(out)
    given = [json.loads(line) for line in Path(asked).read_text().splitlines()]
    assert [row["reference"] for row in found] == [row["output"] for row in given]
    assert [row["instruction"] for row in found] == [row["instruction"] for row in given]
    assert all(row["output"] == row[row["kept"]] for row in found)
    assert (summary.rows, summary.own + summary.references) == (24, 24)
    assert summary.own == sum(row["kept"] == "own" for row in found) > 0
    assert summary.new_tokens <= 24 * 12
    assert summary.tokens_per_s > 0
    assert summary.own_text.texts == 24
    assert summary.reference_text.repetition == 0.0
    pairs = read_pairs(out, 2, 3)
    assert [p.reference for p in pairs] == [row["output"] for row in given[2:5]]

    # a random model writes nonsense without an end, so that the references are kept
    assert run(*options, "--overwrite", "--check", "length", "--temperature", 2) == 0
    found, summary = lines_of(out), Summary.read(out)
    assert summary.references == sum(summary.reasons.values()) == 24 - summary.own
    assert summary.reasons["endless"] > 0
    assert all(row["output"] == row["reference"] for row in found if row["why"])
    assert "did not end" in capsys.readouterr().err


def test_a_killed_run_continues_as_if_nothing_had_happened(
    tiny_gqa, asked, tmp_path, monkeypatch, capsys
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--prompts", asked, "--max-tokens", 8, "--batch", 5, "--temperature", 1.5)
    assert run(tiny_gqa, *options, "--out", whole) == 0
    usual, batches = writing.Writer._answers, []

    def dying(self, model, batch, ends):
        batches.append(batch)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return usual(self, model, batch, ends)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Writer, "_answers", dying)
        assert run(tiny_gqa, *options, "--out", killed) == 130
    tape = killed / ".run" / "answers.jsonl"
    assert not (killed / "generated.jsonl").exists()
    assert len(tape.read_text().splitlines()) == 3
    with tape.open("a") as handle:
        handle.write('{"answers": [[1, [4')  # as a kill leaves it
    other = (*options[:-1], 0.5)
    assert run(tiny_gqa, *other, "--out", killed, "--resume") == 2
    assert "another temperature" in capsys.readouterr().err
    del batches[:]
    with monkeypatch.context() as patch:
        patch.setattr(writing.Writer, "_answers", lambda *a: batches.append(a[2]) or usual(*a))
        assert run(tiny_gqa, *options, "--out", killed, "--resume") == 0
    assert len(batches) == 3
    assert lines_of(killed) == lines_of(whole)
    facts = [vars(Summary.read(folder)) for folder in (whole, killed)]
    timed = ("seconds", "tokens_per_s", "flops_per_s", "peak_memory_mib")
    assert len({str({k: v for k, v in one.items() if k not in timed}) for one in facts}) == 1


@pytest.fixture(scope="module")
def chatty(tiny_gqa, tmp_path_factory):
    """The tiny checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "chatty"
    shutil.copytree(tiny_gqa, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_its_folder_is_training_data_in_the_layout_of_the_prompts(
    tiny_gqa, chatty, tmp_path, asked
):
    talk = [
        {
            "messages": [
                {"role": "user", "content": "Who sees the boat?"},
                {"role": "assistant", "content": "Ann."},
                {"role": "user", "content": "Where?" + " Say it." * n},
                {"role": "assistant", "content": "By the river."},
            ]
        }
        for n in range(12)
    ]
    talks = write(tmp_path / "talk.jsonl", talk)
    for checkpoint, prompts, more, template in (
        (chatty, talks, (), "chat"),
        (chatty, asked, ("--template", "plain"), "plain"),
        (tiny_gqa, asked, (), "alpaca"),
        (tiny_gqa, talks, (), "plain"),
    ):
        out = tmp_path / f"{checkpoint.name}-{template}-{prompts == talks}"
        assert run(
            checkpoint, "--prompts", prompts, "--out", out, "--max-tokens", 9, "--check", "none",
            *more,
        ) == 0  # fmt: skip
        summary = Summary.read(out)
        assert summary.template == template
        spec = RetrainSpec(checkpoint=str(checkpoint), data=str(out), out="", holdout=2)
        encoder = of_folder(checkpoint)
        made = training.prepare(spec, encoder, vocab=320, context=256)
        assert made.template == template
        assert made.kind == summary.kind
        assert len(made.train) + made.dropped + len(made.heldout) == summary.rows
        # the tokens without a loss are those that the model was given
        pairs = read_pairs(out)
        if template != "chat":
            continue
        whole = training.chat_row(lines_of(out)[0]["messages"], encoder, encoder.chat)
        given = [i for i, _, _ in encoder.encode_spans(pairs[0].prompt, start=False)]
        assert list(whole.ids[: len(given)]) == given
        assert set(whole.labels[: len(given) - 1]) != {training.IGNORED}  # an earlier answer
        assert whole.labels[len(given) - 1] == training.IGNORED != whole.labels[len(given)]
    assert sources.describe(str(out))["source"] == out.name
    assert sources.stamp(str(out))


def test_plain_text_is_continued_from_its_first_tokens(tiny_gqa, tmp_path):
    text = tmp_path / "text.jsonl"
    stories = [" ".join(tiny.text(12, seed).split()) for seed in range(4)]
    write(text, [{"text": story} for story in [*stories, "Too short."]])
    out = tmp_path / "out"
    assert run(
        tiny_gqa, "--prompts", text, "--out", out, "--prompt-tokens", 6, "--max-tokens", 20,
        "--samples", 7, "--check", "none", "--temperature", 0,
    ) == 0  # fmt: skip
    found, summary = lines_of(out), Summary.read(out)
    assert len(found) == 7
    assert (summary.kind, summary.template) == ("text", "")
    pieces = "".join(row["prompt"] + row["reference"] for row in found)
    assert pieces.startswith(stories[0])
    assert all(row["text"] == row["prompt"] + row["own"] for row in found)
    assert [row["text"] for row in sources.rows_of(str(out))] == [row["text"] for row in found]


def test_a_row_may_be_an_instruction_without_an_answer(tiny_gqa, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who sees the boat?\nWhere is the cup?\n")
    options = (tiny_gqa, "--prompts", prompts, "--prompt-tokens", 0, "--max-tokens", 9)
    assert run(*options, "--out", tmp_path / "a", "--check", "none") == 0
    found = lines_of(tmp_path / "a")
    assert [row["instruction"] for row in found] == ["Who sees the boat?", "Where is the cup?"]
    assert all(row["output"] == row["own"] for row in found)
    assert run(*options, "--out", tmp_path / "b", "--check", "length") == 2
    error = capsys.readouterr().err
    assert "No answer passed the check (2 did not end)" in error
    assert not (tmp_path / "b" / "generated.jsonl").exists()


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ([], (), "There is no text in"),
        ([{"instruction": "Say " + "the red ball " * 300, "output": "no"}], (),
         "every prompt is longer than the 136 tokens that the model's context of 256 leaves"),
        ([{"instruction": "Say", "output": "no"}], ("--max-tokens", 256),
         "--max-tokens 256 leaves no room for a prompt in the model's context of 256 tokens"),
        ([{"text": "Too short."}], (), "no text has 40 tokens, 32 of them as the prompt"),
        ([{"input_ids": [1, 2, 3]}], (), "has no prompts: its rows are token ids"),
        ([{"text": "A row."}], ("--format", "messages"), "has text rows, not messages rows"),
        ([{"instruction": "Say", "output": "no"}], ("--template", "chat"), "no chat template"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_clear_sentence(
    tiny_gqa, tmp_path, capsys, rows, more, told
):
    prompts = write(tmp_path / "prompts.jsonl", rows)
    options = (tiny_gqa, "--prompts", prompts, "--out", tmp_path / "out")
    more = more if "--max-tokens" in more else (*more, "--max-tokens", 120)
    for dry in ((), ("--dry-run",)):
        assert run(*options, *more, *dry) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error
    assert not (tmp_path / "out" / "generated.jsonl").exists()


def test_prompts_that_do_not_fit_are_left_out_and_counted(tiny_gqa, tmp_path, capsys):
    rows = [{"instruction": "Say " + "the red ball " * n, "output": "no"} for n in (1, 300, 2)]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "out"
    options = (tiny_gqa, "--prompts", prompts, "--out", out, "--max-tokens", 100)
    assert run(*options, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rows"], plan["too_long"], plan["most_new_tokens"]) == (2, 1, 200)
    assert plan["notes"] == ["1 prompt is skipped: longer than 156 tokens."]
    assert [one["reference"] for one in plan["examples"]] == ["no", "no"]
    assert run(*options, "--check", "none") == 0
    assert Summary.read(out).too_long == 1
    assert len(lines_of(out)) == 2


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    tiny_gqa, asked, tmp_path, monkeypatch, capsys
):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = ("--prompts", asked, "--max-tokens", 6, "--batch", 8, "--check", "none")
    assert run(tiny_gqa, *options, "--out", whole) == 0
    usual = writing.decode.decode

    def small(model, prompts, **more):
        if len(prompts) > 3:
            raise MemoryError
        return usual(model, prompts, **more)

    monkeypatch.setattr(writing.decode, "decode", small)
    assert run(tiny_gqa, *options, "--out", halved) == 0
    assert "a batch of 8 is halved" in capsys.readouterr().err
    assert lines_of(halved) == lines_of(whole)
