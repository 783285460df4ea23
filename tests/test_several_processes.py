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
            for a, b in zip(row, other, strict=True):
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
