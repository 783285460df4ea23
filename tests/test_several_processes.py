"""Two processes that share a run (gloo, on the CPU) write the same files as one."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import tiny

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
            assert after[name] == before[name], name


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
