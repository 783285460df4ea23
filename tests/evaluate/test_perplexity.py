"""Perplexity equals a plain transformers loop, by both protocols; results are reused by content."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main
from core.data import evaluation, sources
from core.data.evaluation import evaluation_stream, evaluation_windows
from core.errors import OutOfMemoryError
from core.evaluate import perplexity
from core.evaluate.results import read_windows
from core.runs.workspace import read_json


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny.text(60, seed=3))
    return path


def evaluate(folder, out, *more):
    """Call the command line; return perplexity.csv's rows and summary.json."""
    assert (
        main(["evaluate", str(folder), "--out", str(out), "--device", "cpu", *map(str, more)]) == 0
    )
    with (out / "perplexity.csv").open(newline="") as handle:
        return list(csv.DictReader(handle)), read_json(out / "summary.json")


def plain_loop(folder, text, window, bos):
    """Return perplexity and predictions as a loop over stock transformers gives them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), add_special_tokens=False).input_ids
    if bos == "once":
        ids = [tokenizer.bos_token_id, *ids]
    size = window if bos == "once" else window - 1
    total, count = 0.0, 0
    for start in range(0, len(ids) - size + 1, size):
        row = ids[start : start + size]
        row = row if bos == "once" else [tokenizer.bos_token_id, *row]
        rows = torch.tensor([row])
        with torch.no_grad():
            loss = model(input_ids=rows, labels=rows).loss.item()
        total, count = total + loss * (window - 1), count + window - 1
    return math.exp(total / count), count


def test_only_the_first_tokens_are_evaluated_if_asked(tmp_path, text):
    folder = tiny.write(tmp_path / "model", "gqa")
    whole = ["--perplexity", text, "--window", 16]
    evaluate(folder, tmp_path / "whole", *whole)
    rows, summary = evaluate(folder, tmp_path / "start", *whole, "--max-tokens", 90, "--fresh")
    losses = read_windows(tmp_path / "whole", str(text), 16, "once")
    assert len(losses) > 5
    assert int(rows[0]["tokens"]) == 5 * 15
    assert float(rows[0]["ppl"]) == pytest.approx(math.exp(sum(losses[:5]) / 5), rel=1e-5)
    assert summary["perplexity"][0]["max_tokens"] == 90
    spread = statistics.stdev(losses[:5]) / 5**0.5  # of the mean loss; ppl = exp(loss)
    error = summary["perplexity"][0]["stderr"]
    assert error == pytest.approx(float(rows[0]["ppl"]) * spread, rel=1e-4)


@pytest.mark.parametrize(
    ("variant", "bos"), [("gqa", "once"), ("gqa", "window"), ("qwen3", "window")]
)
def test_equals_a_plain_transformers_loop(tiny_dir, tmp_path, text, variant, bos):
    folder = tiny_dir(variant)
    rows, summary = evaluate(
        folder, tmp_path / "out", "--perplexity", text, "--window", "32,50", "--bos", bos
    )
    assert [(r["source"], r["bos"]) for r in rows] == [(str(text), bos)] * 2
    for row, window in zip(rows, (32, 50), strict=True):
        ppl, tokens = plain_loop(folder, text, window, bos)
        assert int(row["window"]) == window
        assert int(row["tokens"]) == tokens
        assert float(row["ppl"]) == pytest.approx(ppl, rel=1e-5)
        losses = read_windows(tmp_path / "out", str(text), window, bos)
        assert len(losses) * (window - 1) == tokens
        assert math.exp(sum(losses) / len(losses)) == pytest.approx(ppl, rel=1e-5)
    assert (summary["device"], summary["dtype"]) == ("cpu", "float32")


def test_several_sources_in_the_order_given(tiny_gqa, tmp_path, text):
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("Ann sees.", "Ben finds.") * 20)
    )
    rows, summary = evaluate(
        tiny_gqa, tmp_path / "out", "--perplexity", text, "--perplexity", other, "--window", "16"
    )
    assert [r["source"] for r in rows] == [str(text), str(other)]
    joined = tmp_path / "joined.txt"
    joined.write_text("\n\n".join(("Ann sees.", "Ben finds.") * 20))
    assert float(rows[1]["ppl"]) == pytest.approx(
        plain_loop(tiny_gqa, joined, 16, "once")[0], rel=1e-5
    )
    assert [p["content"] for p in summary["perplexity"]] == [
        sources.describe(str(s))["content"] for s in (text, other)
    ]


def test_the_batch_is_halved_until_it_fits(tiny_gqa, text, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_gqa, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_gqa)
    ids = evaluation.token_stream(str(text), tokenizer)
    windows = evaluation_windows(ids, 16, "once", 1)
    whole = perplexity.window_losses(model, windows)
    assert whole.batch > 3
    honest, asked = perplexity._losses, []

    def small_device(model, rows):
        asked.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return honest(model, rows)

    monkeypatch.setattr(perplexity, "_losses", small_device)
    found = perplexity.window_losses(model, windows, batch=16)
    assert found.batch == 2
    assert asked[:4] == [16, 8, 4, 2]
    assert found.nll == pytest.approx(whole.nll, rel=1e-5)

    def no_device(model, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(perplexity, "_losses", no_device)
    with pytest.raises(OutOfMemoryError, match="measuring perplexity"):
        perplexity.window_losses(model, windows)


def test_known_results_are_reused_and_others_are_not(tiny_gqa, tmp_path, text, monkeypatch):
    where = tmp_path / "workspace"
    options = ("--perplexity", text, "--window", "32")
    rows, first = evaluate(tiny_gqa, where / "first", *options)

    def never(*_, **__):
        raise AssertionError("measured again")

    copy = tmp_path / "renamed.txt"
    shutil.copy(text, copy)
    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "window_losses", never)
        again, second = evaluate(tiny_gqa, where / "second", "--perplexity", copy, "--window", "32")
        third = evaluate(tiny_gqa, where / "third", *options)[1]
    assert again[0]["ppl"] == rows[0]["ppl"]
    assert again[0]["source"] == str(copy)
    assert (where / "second" / "windows.csv").read_text().replace("renamed", "text") == (
        where / "first" / "windows.csv"
    ).read_text()
    assert second["perplexity"][0]["reused_from"] == "first"
    assert third["perplexity"][0]["reused_from"] == "first"
    assert "already measured in first" in (where / "second/.run/log.txt").read_text()

    changed = tmp_path / "changed"
    shutil.copytree(tiny_gqa, changed)
    file = next(changed.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    file.write_bytes(content)
    cases = [
        (changed, text, "32", "once", ()),
        (tiny_gqa, text, "33", "once", ()),
        (tiny_gqa, text, "32", "window", ()),
        (tiny_gqa, text, "32", "once", ("--dtype", "bfloat16")),
        (tiny_gqa, text, "32", "once", ("--fresh",)),
    ]
    for number, (folder, source, window, bos, more) in enumerate(cases):
        _, summary = evaluate(
            folder, where / f"other{number}",
            *("--perplexity", source, "--window", window, "--bos", bos, *more),
        )  # fmt: skip
        assert summary["perplexity"][0]["reused_from"] is None, more
    with text.open("a") as handle:
        handle.write(tiny.text(20, seed=9))
    assert evaluate(tiny_gqa, where / "longer", *options)[1]["perplexity"][0]["reused_from"] is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "Nothing to measure."),
        (
            ["--perplexity", "TEXT", "--window", "300"],
            "300 tokens exceed the model's context",
        ),
        (["--perplexity", "TEXT", "--window", "1"], "--window: 1 is too small."),
        (["--perplexity", "nowhere.txt"], "No text source 'nowhere.txt'"),
        (["--perplexity", "EMPTY"], "There is no text in"),
        (["--perplexity", "SHORT"], "121 short of one window of 128"),
        (["--perplexity", "ptb"], "ptb is a script-based dataset"),
        (["--perplexity", "TEXT", "--bos", "never"], "--bos: unknown value 'never'."),
    ],
)
def test_bad_input_gives_one_sentence(tiny_gqa, tmp_path, text, capsys, options, sentence):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("Ann sees the red ball.")
    paths = {"TEXT": text, "EMPTY": tmp_path / "empty.txt", "SHORT": tmp_path / "short.txt"}
    options = [str(paths.get(o, o)) for o in options]
    assert main(["evaluate", str(tiny_gqa), "--out", str(tmp_path / "out"), *options]) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if "Error" in e or "rror:" in e]
    assert len(errors) == 1
    assert sentence in errors[0]


def test_blank_rows_of_a_hub_data_set_stay_in_the_stream(tmp_path):
    """WikiText-2 is published by rows, blank ones between; joining keeps them, as the papers do."""
    folder = tmp_path / "wiki"
    folder.mkdir()
    told = ["", " = Title = \n", "", " Ann sees the red ball . \n", ""]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in told))
    assert evaluation_stream(f"hub:{folder}:train:text") == "\n\n".join(told)
