"""The second series of a benchmark: a static cache and compiled steps, beside the usual ones.

The two are never mixed: a speed-up compares compiled with compiled, eager with eager.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.benchmark.results import Cell, Point
from core.study import Benchmark, Study

HOW = (
    "Eager: transformers as it generates by default. Compiled: a static cache and steps compiled "
    "by torch.compile, which a CUDA GPU replays as graphs; compiling is not counted."
)


def rows(known: Study, runs: Sequence[Benchmark], cell: Cell) -> list[dict[str, Any]]:
    """Return a row for each variant measured both ways at a point, from the newest run that has it.

    Speeds are medians; a speed-up is over the dense model of the same run and series.
    """
    labels = {v.id: v.label for v in known.variants}
    found: dict[str, dict[str, Any]] = {}
    for bench in runs:
        series = [_medians(bench, points, cell) for points in (bench.points, bench.compiled)]
        eager, compiled = series
        firsts = {bench.variant_of(p): p.compile_s for p in bench.compiled if p.cell == cell}
        for name in compiled.keys() & eager.keys() & labels.keys() - found.keys():
            found[name] = {
                "variant": labels[name],
                "tokens/s, eager": cell[0] * cell[2] / eager[name],
                "tokens/s, compiled": cell[0] * cell[2] / compiled[name],
                "compiled over eager": eager[name] / compiled[name],
                "eager over dense": _over(eager, known.dense.id, name),
                "compiled over dense": _over(compiled, known.dense.id, name),
                "compiling, s": firsts.get(name),
            }
    return [found[v.id] for v in known.variants if v.id in found]


def failures(runs: Sequence[Benchmark]) -> list[str]:
    """Return a sentence for each variant whose steps could not be compiled."""
    return [
        f"{entry.name} could not be measured with compiled steps: {entry.uncompiled}"
        for bench in runs
        for entry in bench.summary.variants
        if entry.uncompiled
    ]


def _medians(bench: Benchmark, points: Sequence[Point], cell: Cell) -> dict[str, float]:
    """Return the median seconds of a generation by variant."""
    here = ((bench.variant_of(p), p.latency_s_p50) for p in points if p.cell == cell)
    return {name: seconds for name, seconds in here if name and seconds}


def _over(seconds: dict[str, float], dense: str, name: str) -> float | None:
    return seconds[dense] / seconds[name] if dense in seconds else None
