"""The gain and the cost of dropping blocks in a few numbers, to be read in a minute.

For every share of parameters removed the depth-pruned candidate with the lowest perplexity before
retraining is taken, however its set was chosen: healed or not, of blocks or of parts of them.
Perplexity is always measured. Speed and memory are measured where a benchmark has both models;
otherwise they are estimated for both, and marked as estimates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.compare import measured
from core.compare.candidates import Candidate, shapes_of
from core.compare.measured import Cell
from core.compare.outcomes import Outcome
from core.compare.scene import Scene
from core.compare.speed import Speed, speeds_at
from core.compare.verdict import USUAL, cell_of
from core.study import info_of


@dataclass(frozen=True)
class Stop:
    """One size that the model can be cut to; all figures are relative to the dense model."""

    key: str
    label: str
    ratio: float
    dropped: tuple[int, ...]
    parameters: int | None
    ppl: float | None
    """Measured, before retraining."""
    speed: float | None
    memory: float | None
    cost: str
    """measured, estimated or unknown: where speed and memory come from."""
    noise: float | None = None
    """Relative uncertainty of a measured speed."""
    is_plan: bool = False
    retrained_ppl: float | None = None
    """Perplexity after the best retraining of this checkpoint; None if it was not retrained."""
    retrained_by: str = ""

    @property
    def name(self) -> str:
        """Label of the slider: the share removed."""
        return f"{self.ratio:.1%}"


def stops(scene: Scene, cell: Cell | None = None) -> list[Stop]:
    """Return the sizes that depth pruning offers, ascending; empty if nothing was evaluated."""
    cell = cell or cell_of(scene)
    rows = {r.key: r for r in scene.table(cell, estimates=False)}
    dense = rows.get(scene.study.dense.id)
    if dense is None:
        return []
    sizes: dict[float, list[Candidate]] = {}
    for candidate in scene.found:
        changed = candidate.retrained or candidate.quantized
        if candidate.kind == "depth" and not changed and candidate.ratio:
            sizes.setdefault(round(candidate.ratio, 3), []).append(candidate)
    found = []
    for _, same in sorted(sizes.items()):
        best = min(same, key=lambda c: (c.ppl or math.inf, c.is_plan))
        stop = _stop(scene, best, rows, dense, cell)
        if stop.ppl or stop.speed:
            found.append(stop)
    return found


def start(found: Sequence[Stop]) -> Stop:
    """Return the size to show first: the checkpoint nearest to the usual share, else the plan."""
    made = [s for s in found if not s.is_plan] or list(found)
    return min(made, key=lambda s: abs(s.ratio - USUAL))


def _stop(
    scene: Scene,
    candidate: Candidate,
    rows: Mapping[str, Outcome],
    dense: Outcome,
    cell: Cell,
) -> Stop:
    row = rows[candidate.id]
    speed, memory, cost = _measured(row, dense)
    paced = _paced(scene, candidate, cell) if cost == "measured" else None
    if cost == "unknown":
        speed, memory, cost = _estimated(scene, candidate, cell)
    tuned = [
        r for r in rows.values()
        if r.candidate.retrained and r.candidate.parent == candidate.id and r.ppl_over_dense
    ]  # fmt: skip
    best = min(tuned, key=lambda r: r.ppl_over_dense or math.inf, default=None)
    return Stop(
        key=candidate.id,
        label=candidate.label,
        ratio=candidate.ratio or 0.0,
        dropped=candidate.dropped,
        parameters=candidate.parameters,
        ppl=row.ppl_over_dense,
        speed=paced.factor if paced else speed,
        noise=paced.noise if paced else None,
        memory=memory,
        cost=cost,
        is_plan=candidate.is_plan,
        retrained_ppl=best.ppl_over_dense if best else None,
        retrained_by=best.candidate.label.rsplit(" + ", 1)[-1] if best else "",
    )


def _measured(row: Outcome, dense: Outcome) -> tuple[float | None, float | None, str]:
    if row.kind_of_cost != "measured" or dense.kind_of_cost != "measured":
        return None, None, "unknown"
    own, base = row.memory_mib, dense.memory_mib
    return row.speedup, own / base if own and base else None, "measured"


def _paced(scene: Scene, candidate: Candidate, cell: Cell) -> Speed | None:
    """Return the newest measured speed-up with its noise, from a benchmark's individual runs."""
    for bench in sorted(scene.runs, key=lambda b: -b.record.started):
        if candidate.id not in bench.ids.values():
            continue
        if found := speeds_at(scene.study, bench, cell).get(candidate.label):
            return found
    return None


def _estimated(
    scene: Scene, candidate: Candidate, cell: Cell
) -> tuple[float | None, float | None, str]:
    """Estimate both models in the same way, so that an error of the estimate affects both."""
    info = info_of(scene.study.dense)
    shapes = shapes_of(candidate, info)
    if info is None or shapes is None:
        return None, None, "unknown"
    dtype = scene.rates.dtype if scene.rates else info.compute_dtype
    own, base = (measured.estimate(s, scene.rates, cell, dtype) for s in (shapes, info))
    slow, fast = base.latency_s_mean, own.latency_s_mean
    most, usual = own.peak_memory_mib, base.peak_memory_mib
    return (
        slow / fast if slow and fast else None,
        most / usual if most and usual else None,
        "estimated",
    )
