"""Shares of blocks that follow from scores: units of several blocks ranked together.

FLAP's AL-AM ranks heads and neurons together, each with its cost, and keeps those strictly above
the score at which the kept cost is closest to the ratio's. AL-MM ranks heads and neurons
separately: a given number of heads goes, and the neurons that make up the rest. LLM-Pruner's global
variant ranks heads and neurons together and counts each as one. Every part keeps at least one unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core.width import allocation
from core.width.plan import WidthPlan
from core.width.selection import Job, Selection, UnitScores, check_scores, keep_best
from core.width.units import Counts

Part = tuple[int, str]
"""Block, and attention or mlp."""


class Pool:
    """The units of several parts in one order, the highest score first."""

    def __init__(self, scores: Mapping[Part, Tensor], costs: Mapping[Part, float]) -> None:
        """Sort the units; each of a part's units has the part's cost."""
        self.parts = list(scores)
        values = torch.cat([scores[part].double().cpu() for part in self.parts])
        sizes = torch.tensor([scores[part].numel() for part in self.parts])
        owner = torch.arange(len(self.parts)).repeat_interleave(sizes)
        each = torch.tensor([costs[part] for part in self.parts], dtype=torch.float64)
        order = torch.sort(values, descending=True, stable=True).indices
        self._values, self._owner = values[order], owner[order]
        self._kept_cost = each[self._owner].cumsum(0)

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self._values)

    def first(self, count: int) -> dict[Part, int]:
        """Return how many of the first ``count`` units each part has."""
        found = torch.bincount(self._owner[:count], minlength=len(self.parts)).tolist()
        return dict(zip(self.parts, found, strict=True))

    def above(self, ratio: float) -> int:
        """Return the units strictly above where the kept cost is closest to (1 - ratio) of it."""
        wanted = self._kept_cost[-1] * (1 - ratio)
        threshold = self._values[(self._kept_cost - wanted).abs().argmin()]
        return int((self._values > threshold).sum())


class Shares:
    """How much every block keeps at a ratio, by scores that compare between blocks."""

    def __init__(self, plan: WidthPlan, scores: Mapping[int, UnitScores]) -> None:
        """Rank the units that may be cut."""
        self.plan = plan
        heads = {(b, "attention"): scores[b].groups for b in plan.extent.attention}
        neurons = {(b, "mlp"): scores[b].neurons for b in plan.extent.mlp}
        self._pools: Sequence[Pool]
        if plan.ways.manual:
            same = dict.fromkeys((*heads, *neurons), 1.0)
            self._pools = (Pool(heads, same), Pool(neurons, same))
        else:
            units = heads | neurons
            self._pools = (Pool(units, {part: self._cost(part) for part in units}),)

    def _cost(self, part: Part) -> float:
        """Return a unit's cost, FLAP's in neurons: (2*q + 2)*d/3 for q query heads of width d."""
        unit = self.plan.units[part[0]]
        if self.plan.ways.ranking == "global" or part[1] == "mlp":
            return 1.0
        return (2 * unit.queries + 2) * unit.head_dim / 3

    def ranked(self, ratio: float) -> dict[Part, int]:
        """Return the units of each part that the ranking alone would keep."""
        plan, ways = self.plan, self.plan.ways
        if ways.manual:
            units = [allocation.limited(plan.units[b], plan.extent) for b in plan.blocks]
            kept = allocation.manual_counts(units, ratio, ways.heads or 0)
            return self._pools[0].first(kept.groups) | self._pools[1].first(kept.neurons)
        (pool,) = self._pools
        count = int(len(pool) * (1 - ratio)) if ways.ranking == "global" else pool.above(ratio)
        return pool.first(count)

    def counts(self, ratio: float) -> dict[int, Counts]:
        """Return what every block keeps: at least one unit of each part, and rounded.

        Ratio 0 keeps everything.
        """
        plan = self.plan
        if ratio == 0:
            return {b: plan.units[b].all.counts for b in plan.blocks}
        kept = self.ranked(ratio)
        result = {}
        for block in plan.blocks:
            every = plan.units[block].all.counts
            own = Counts(
                kept.get((block, "attention"), every.groups),
                kept.get((block, "mlp"), every.neurons),
            )
            result[block] = allocation.fitted(
                plan.units[block], own, plan.extent, plan.ways.round_to
            )
        return result

    def rescued(self, ratio: float) -> tuple[str, ...]:
        """Return the parts that would be empty if only the ranking counted."""
        if ratio == 0:
            return ()
        return tuple(f"{b} {part}" for (b, part), kept in self.ranked(ratio).items() if not kept)


def choose(
    job: Job, scores: Mapping[int, UnitScores], computed: torch.dtype = torch.float32
) -> Selection:
    """Return the best units, as many as the plan has for each block, or as the scores give it.

    Raises `NotFiniteError` if a score is NaN or infinite; ``computed`` is what its inputs were
    computed in.
    """
    plan = job.plan
    counts, ratio = plan.counts, plan.ratio
    rescued: tuple[str, ...] = ()
    if counts is None:
        for block, found in scores.items():
            check_scores(found.groups, f"attention of block {block}", computed)
            check_scores(found.neurons, f"MLP of block {block}", computed)
        shares = Shares(plan, scores)
        if plan.target is not None:
            ratio = allocation.nearest(plan.target, lambda r: plan.left(shares.counts(r))).ratio
        counts, rescued = shares.counts(ratio), shares.rescued(ratio)
    keep = {b: keep_best(scores[b], counts[b], b, computed) for b in plan.blocks}
    return Selection(keep, ratio, rescued=rescued)
