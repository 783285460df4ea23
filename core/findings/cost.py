"""Findings about the cost of a study: memory that is still too large, gains within the noise."""

from __future__ import annotations

import math

from core.benchmark.analytic import memory_bytes, without
from core.compare.measured import Cell
from core.compare.speed import speeds_at
from core.findings.finding import Finding
from core.runs.devices import MIB
from core.runs.dtypes import computable
from core.study import Benchmark, Study, Variant, info_of
from core.words import listed, size

CELL: Cell = (1, 12, 128)
"""Batch, input and output tokens for which memory is estimated if nothing was measured."""


# ------------------------------------------------------------------------------------------ memory


def memory_too_large(
    study: Study, budget_mib: float, where: str = "the budget", cell: Cell = CELL
) -> Finding | None:
    """Return a finding if not even the smallest checkpoint of a study fits in ``budget_mib``.

    Uses the measured peak at ``cell``; without one, the memory is estimated from shapes.
    """
    peaks = _peaks(study, cell)
    needs = {v.id: _need(v, cell, peaks) for v in study.variants if v.kind != "other"}
    known = [(need[0], v, need[1]) for v in study.variants if (need := needs.get(v.id))]
    if not known:
        return None
    least, smallest, kind = min(known, key=lambda x: x[0])
    if least <= budget_mib:
        return None
    batch, _, output = cell
    return Finding(
        "memory",
        f"Still too large: {smallest.label}, the smallest checkpoint of this study, needs "
        f"{size(least * MIB)} ({kind}) at batch {batch} with {output} new tokens, and {where} has "
        f"{size(budget_mib * MIB)}.",
        {f"{v.label} ({how})": size(mib * MIB) for mib, v, how in sorted(known, key=lambda x: x[0])}
        | {where: size(budget_mib * MIB)},
        _fit(study, budget_mib, cell),
    )


def _peaks(study: Study, cell: Cell) -> dict[str, float]:
    """Return the newest measured peak at ``cell`` in MiB, by variant."""
    found: dict[str, float] = {}
    for bench in study.benchmarks:
        for point in bench.points:
            if point.cell == cell and point.peak_memory_mib:
                found.setdefault(bench.variant_of(point), point.peak_memory_mib)
    return found


def _need(variant: Variant, cell: Cell, peaks: dict[str, float]) -> tuple[float, str] | None:
    """Return a checkpoint's memory in MiB at ``cell`` and how it is known; None if unknown."""
    if variant.id in peaks:
        return peaks[variant.id], "measured"
    info = info_of(variant)
    if info is None:
        return None
    return memory_bytes(info, *cell, computable(info.dtype))["total"] / MIB, "estimated"


def _fit(study: Study, budget_mib: float, cell: Cell) -> str:
    """Advise how many blocks to remove from the dense model, or to lower the precision."""
    info = info_of(study.dense)
    lower = "Use a lower precision or a quantized model"
    if info is None:
        return f"Remove more blocks. {lower} if quality would suffer too much."
    dtype = computable(info.dtype)
    whole = memory_bytes(info, *cell, dtype)["total"]
    block = whole - memory_bytes(without(info, (info.blocks - 1,)), *cell, dtype)["total"]
    count = math.ceil((whole - budget_mib * MIB) / block)
    halved = " (bfloat16 halves the weights)" if dtype == "float32" else ""
    if count >= info.blocks:
        return f"Removing blocks alone is not enough. {lower}{halved}, or a smaller batch."
    return (
        f"Remove about {count} of the {info.blocks} blocks (estimated). {lower}{halved}, or a "
        "smaller batch, if that costs too much quality."
    )


# ------------------------------------------------------------------------------------------- noise


def gain_below_noise(study: Study, bench: Benchmark, cell: Cell | None = None) -> Finding | None:
    """Return a finding if smaller checkpoints are not faster than the dense one beyond the noise.

    ``cell``: the point of the grid; by default the smallest batch with the longest output. The
    noise combines the spread of single runs and of repeated visits.
    """
    cell = cell or _reference(bench, study)
    if cell is None:
        return None
    speeds = speeds_at(study, bench, cell)
    flat = {name: speed for name, speed in speeds.items() if speed.factor - 1 <= speed.noise}
    if not flat:
        return None
    batch, _, output = cell
    said = listed([f"{name} ({s.factor:.2f} x, noise {s.noise:.0%})" for name, s in flat.items()])
    slower = all(1 - s.factor > s.noise for s in flat.values())
    verb = "is" if len(flat) == 1 else "are"
    return Finding(
        "noise",
        f"At batch {batch} with {output} new tokens {said} {verb} "
        + ("slower than" if slower else "not measurably faster than")
        + " the dense model.",
        {f"{name}, times dense": f"{s.factor:.3f} (noise {s.noise:.1%})"
         for name, s in speeds.items()} | {"run": bench.id},
        "Remove whole blocks rather than width, or more of them."
        if slower
        else "Measure again with more --runs and --visits while nothing else is running. If that "
        "changes nothing, there is no gain: remove more, or whole blocks rather than width.",
    )  # fmt: skip


def _reference(bench: Benchmark, study: Study) -> Cell | None:
    cells = [p.cell for p in bench.points if bench.variant_of(p) == study.dense.id and not p.oom]
    return min(cells, key=lambda c: (c[0], -c[2]), default=None)
