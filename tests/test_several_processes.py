"""Two processes that share a run (gloo, on the CPU) write the same files as one."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch

from core import commands
from core.runs.run import execute

pytestmark = pytest.mark.usefixtures("prepared_runs", "place")

ABOUT_THE_RUN = {"seconds", "peak_memory_mib", "flops_per_s", "processes"}
"""What a summary says of the run, not of its result."""


def ran(command: str, folder: Path, processes: int, **options) -> Path:
    """Run a command in this process, which is then the first of ``processes``."""
    entry = commands.get(command)
    spec = entry.spec_class(out=str(folder), device="cpu", processes=processes, **options)
    assert execute(entry, spec) == 0, (folder / ".run/log.txt").read_text()
    return folder


def in_both(command: str, folder: Path, **options) -> tuple[Path, Path]:
    """Return the folders of a run by one process and of the same by two."""
    return (
        ran(command, folder / f"{command} one", 1, **options),
        ran(command, folder / f"{command} two", 2, **options),
    )


def result(value):
    """Return a part of a summary without what it says of the run."""
    if isinstance(value, dict):
        return {k: result(v) for k, v in value.items() if k not in ABOUT_THE_RUN}
    return [result(v) for v in value] if isinstance(value, list) else value


def assert_same(one: Path, two: Path, relative: float = 1e-6) -> None:
    """Check that both have the same CSV files, numbers within ``relative``, and summaries."""
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for path in one.glob("*.csv"):
        first, second = (list(csv.reader(p.open())) for p in (path, two / path.name))
        assert len(first) == len(second)
        for row, other in zip(first, second, strict=True):
            for name, a, b in zip(first[0], row, other, strict=True):
                if name in ABOUT_THE_RUN:
                    continue
                same = a == b or math.isclose(float(a), float(b), rel_tol=relative, abs_tol=1e-9)
                assert same, f"{path.name}: {a} and {b} in {row[:3]}"
    before, after = (json.loads((p / "summary.json").read_text()) for p in (one, two))
    assert (before["processes"], after["processes"]) == (1, 2)
    for name in before.keys() - ABOUT_THE_RUN:
        if isinstance(before[name], float):
            assert after[name] == pytest.approx(before[name], rel=relative), name
        else:
            assert result(after[name]) == result(before[name]), name


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny.text(200))
    return str(path)


METRICS = (
    *("ppl", "kl", "taylor", "magnitude", "block-influence", "angular", "relative-update"),
    *("sublayers", "sleb"),
)


def test_importance_and_a_curve(tmp_path, tiny_gqa, text):
    """Seven rows, which two processes cannot share equally."""
    rows = {"calibration": text, "samples": 7, "length": 24}
    one, two = in_both("importance", tmp_path, checkpoint=str(tiny_gqa), metrics=METRICS, **rows)
    assert_same(one, two)
    ways = {"criteria": ("ppl", "taylor"), "counts": (1, 2)}
    assert_same(
        *in_both("curve", tmp_path, checkpoint=str(tiny_gqa), scores=str(one), **ways, **rows)
    )


WIDTHS = (
    {"method": "flap"},
    {"method": "wanda-sp"},
    {"method": "llm-pruner", "order": "mixed"},
)


@pytest.mark.parametrize("way", WIDTHS, ids=lambda way: way["method"])
def test_width_pruning_keeps_the_same_units(tmp_path, tiny_gqa, text, way):
    rows = {"calibration": text, "samples": 7, "length": 24}
    folders = in_both("width", tmp_path, checkpoint=str(tiny_gqa), ratio=0.3, **way, **rows)
    cuts = [json.loads((folder / "pruning.json").read_text()) for folder in folders]
    assert [cut.pop("processes") for cut in cuts] == [1, 2]
    for name in cuts[0].keys() - ABOUT_THE_RUN:
        assert cuts[0][name] == cuts[1][name], name
    first, second = (safetensors.torch.load_file(f / "model.safetensors") for f in folders)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


def test_evaluation_gives_the_same_losses_and_answers(tmp_path, tiny_gqa, text):
    one, two = in_both(
        "evaluate",
        tmp_path,
        checkpoint=str(tiny_gqa),
        perplexity=(text,),
        window=(24,),
        max_tokens=24 * 101,
        tasks=("demo_counting", "demo_order"),
        limit=7,
        fresh=True,
    )
    first, second = (
        [json.loads(line) for line in (p / "samples.jsonl").read_text().splitlines()]
        for p in (one, two)
    )
    assert len(first) == 14
    for sample, other in zip(first, second, strict=True):
        likely = sample.pop("loglikelihoods")
        assert other.pop("loglikelihoods") == pytest.approx(likely, rel=1e-5)
        assert sample == other
    for folder in (one, two):
        (folder / "samples.jsonl").unlink()
    assert_same(one, two)


def test_a_search_finds_the_same_sets(tmp_path, tiny_gqa, text):
    """Also when it goes on: the other process copies what the first reads of its tape."""
    options = {
        "checkpoint": str(tiny_gqa),
        "methods": ("one-shot", "greedy", "pairs"),
        "counts": (1, 2),
        "calibration": text,
        "samples": 5,
        "length": 24,
    }
    one, two = in_both("search", tmp_path, **options)
    tape = (two / "measured.jsonl").read_text()
    ran("search", two, 2, **options, resume=True)
    assert (two / "measured.jsonl").read_text() == tape
    for folder in (one, two):
        (folder / "measured.jsonl").unlink()
    assert_same(one, two)


TRAININGS = (
    {"method": "lora", "loss": "both", "merge": True, "dropout": 0.0},
    {"method": "full", "loss": "ce"},
)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, two: Path) -> None:
    """Check that all steps and evaluations agree, and what is written at the end."""
    lines, others = metrics(one), metrics(two)
    assert len(lines) == len(others) > 6
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if name in ("step", "tokens", "lr"):
                assert other[name] == value
            elif isinstance(value, float) and name not in ("time", "tokens_per_s", "memory_mib"):
                assert other[name] == pytest.approx(value, abs=1e-4), name
    before, after = (json.loads((f / "summary.json").read_text()) for f in (one, two))
    assert (before["processes"], after["processes"]) == (1, 2)
    assert before["heldout_loss_after"] < before["heldout_loss_before"]
    for name in ("tokens", "steps", "settings", "trainable_parameters", "data", "heldout"):
        assert after[name] == before[name], name
    for path in one.rglob("*.safetensors"):
        first = safetensors.torch.load_file(path)
        second = safetensors.torch.load_file(two / path.relative_to(one))
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", TRAININGS, ids=lambda way: way["method"])
def test_training_takes_the_same_steps(tmp_path, tiny_gqa, text, way, monkeypatch):
    """At one go, and after a failure between two steps."""
    prune = commands.get("prune")
    pruned = tmp_path / "pruned"
    spec = prune.spec_class(checkpoint=str(tiny_gqa), drop=(2,), out=str(pruned))
    assert execute(prune, spec) == 0
    options = {
        "checkpoint": str(pruned), "dense": str(tiny_gqa), "data": text, "lr": 1e-3,
        "batch": 8, "micro_batch": 2, "cutoff": 32, "steps": 4, "eval_every": 2, **way,
    }  # fmt: skip
    one, two = in_both("retrain", tmp_path, **options)
    assert_same_training(one, two)
    if way["method"] == "full":
        return

    from core.retrain.trainer import StepWatcher

    usual = StepWatcher.on_step_end

    def failing(self, args, state, control, **more):
        usual(self, args, state, control, **more)
        if state.global_step == 3:
            raise ZeroDivisionError("enough")

    failed, entry = tmp_path / "failed", commands.get("retrain")
    spec = entry.spec_class(out=str(failed), device="cpu", processes=2, **options)
    with monkeypatch.context() as patch:
        patch.setattr(StepWatcher, "on_step_end", failing)
        assert execute(entry, spec) == 1
    ran("retrain", failed, 2, **options, resume=True)
    assert_same_training(one, failed)
