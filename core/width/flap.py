"""FLAP (An et al., arXiv 2312.11983): WIFV, adaptive allocation (AL-AM) and bias compensation.

Fluctuation f_j: the squared deviation of input channel j of the attention's or the MLP's output
projection in the dense model, summed over all tokens. WIFV_j = f_j * sum_i W_ij^2; the attention's
is squared. Every layer's metric is standardised (unbiased deviation), the attention's then averaged
over a group's channels; the units of all layers are sorted together, each with its cost, and those
strictly above the threshold are kept. The output projections get the bias
W[:, pruned] @ mean[pruned].

Unlike in the public code, the statistics are exact, every layer keeps a head and a neuron, and a
head's cost is exact: the public code stores it in a tensor of integers, so that 512/3 neurons, the
cost of a head of 128 channels, become 170.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.importance.branches import Batch
from core.model.precision import arithmetic_of
from core.width import allocation
from core.width.activations import BlockInputs, walk
from core.width.selection import (
    Biases,
    Job,
    Selection,
    UnitScores,
    check_scores,
    output_weights,
)
from core.width.surgery import dropped_channels
from core.width.units import BlockUnits, Keep, parameters_left


@dataclass(frozen=True)
class Calibrated:
    """Scores and input means of one block, from one pass over the dense model."""

    scores: UnitScores
    """Standardised WIFV, comparable between blocks; float64."""
    o_mean: Tensor
    """Mean of the input of the attention's output projection, [query channels], float64."""
    down_mean: Tensor
    """Mean of the input of the MLP's output projection, [neurons], float64."""


def select(job: Job) -> Selection:
    """Calibrate on the dense model, distribute the cut over all layers, and compensate."""
    assert job.batch is not None
    plan = job.plan
    if plan.counts is not None:  # nothing to remove
        return Selection({b: plan.units[b].all for b in plan.blocks}, 0.0)
    found = calibrate(job, job.batch)
    units = {b: plan.units[b] for b in plan.blocks}
    ranked = Ranking(units, {b: found[b].scores for b in plan.blocks})

    def left(ratio: float) -> int:
        keep = ranked.keep(ratio)
        counts = {b: kept.counts for b, kept in keep.items()}
        changed = any(keep[b] != unit.all for b, unit in units.items())
        return parameters_left(plan.info, plan.units, counts, biases=changed)

    ratio = plan.ratio if plan.target is None else allocation.nearest(plan.target, left).ratio
    keep = ranked.keep(ratio)
    if all(keep[b] == unit.all for b, unit in units.items()):
        return Selection(keep, ratio)
    biases = {b: compensation(job, units[b], keep[b], found[b]) for b in plan.blocks}
    return Selection(keep, ratio, biases, ranked.rescued(ratio))


def calibrate(job: Job, batch: Batch) -> dict[int, Calibrated]:
    """Return scores and input means of the planned blocks, from one pass over the dense model."""
    result: dict[int, Calibrated] = {}

    units = {b: job.plan.units[b] for b in job.plan.blocks}
    computed = arithmetic_of(job.view.dtype, job.view.device)

    def visit(block: int, inputs: BlockInputs) -> None:
        unit = units[block]
        o, down = output_weights(job.view, block)
        attention = wifv(inputs.o.deviations, o).square()
        neurons = wifv(inputs.down.deviations, down)
        check_scores(attention, f"attention of block {block}", computed)
        check_scores(neurons, f"MLP of block {block}", computed)
        groups = standardise(attention).view(unit.groups, unit.group_width).mean(1)
        scores = UnitScores(groups, standardise(neurons))
        result[block] = Calibrated(scores, inputs.o.mean, inputs.down.mean)

    walk(job.view, batch, units, visit, job.progress, label="FLAP")
    return result


def wifv(fluctuation: Tensor, weight: Tensor) -> Tensor:
    """Return f_j * sum_i W_ij^2 for ``fluctuation`` [in] and ``weight`` [out, in], float64."""
    return fluctuation * weight.float().square().sum(0).cpu().double()


def standardise(values: Tensor) -> Tensor:
    """Return ``values`` with mean 0 and unbiased deviation 1; all 0 if they are equal."""
    centred = values - values.mean()
    spread = values.std() if values.numel() > 1 else torch.zeros((), dtype=values.dtype)
    return centred / spread if float(spread) > 0 else torch.zeros_like(values)


class Ranking:
    """All units of all pruned layers, sorted together, with their costs."""

    def __init__(self, units: Mapping[int, BlockUnits], scores: Mapping[int, UnitScores]) -> None:
        """Sort the units by score, highest first.

        A neuron costs 1, a group its rows and columns in units of a neuron's: (2*q + 2)*d/3 with q
        query heads of width d (4*d/3 if q is 1).
        """
        self.units, self.scores = units, scores
        values, costs = [], []
        for block, unit in units.items():
            values += [scores[block].groups, scores[block].neurons]
            cost = (2 * unit.queries + 2) * unit.head_dim / 3
            costs += [
                torch.full((unit.groups,), cost, dtype=torch.float64),
                torch.ones(unit.neurons, dtype=torch.float64),
            ]
        joined = torch.cat(values)
        order = torch.sort(joined, descending=True, stable=True).indices
        self._sorted = joined[order]
        self._kept_cost = torch.cat(costs)[order].cumsum(0)

    def threshold(self, ratio: float) -> float:
        """Return the score at which the kept cost is closest to (1 - ratio) of the total."""
        wanted = self._kept_cost[-1] * (1 - ratio)
        return float(self._sorted[(self._kept_cost - wanted).abs().argmin()])

    def keep(self, ratio: float) -> dict[int, Keep]:
        """Return the units strictly above the threshold, and at least the best of every part.

        Ratio 0 keeps everything.
        """
        if ratio == 0:
            return {block: unit.all for block, unit in self.units.items()}
        bar = self.threshold(ratio)
        return {
            block: Keep(_above(scores.groups, bar), _above(scores.neurons, bar))
            for block, scores in self.scores.items()
        }

    def rescued(self, ratio: float) -> tuple[str, ...]:
        """Return the parts that would be empty if only the threshold counted."""
        bar = self.threshold(ratio)
        return tuple(
            f"{block} {part}"
            for block, scores in self.scores.items()
            for part, values in (("attention", scores.groups), ("mlp", scores.neurons))
            if not bool((values > bar).any())
        )


def _above(values: Tensor, bar: float) -> tuple[int, ...]:
    kept = (values > bar).nonzero().flatten().tolist()
    return tuple(kept) if kept else (int(values.argmax()),)


def compensation(job: Job, unit: BlockUnits, keep: Keep, found: Calibrated) -> Biases:
    """Return the mean contribution of the removed inputs to the outputs, float32 [hidden] each."""
    o, down = output_weights(job.view, unit.block)
    channels, neurons = dropped_channels(unit, keep)
    return Biases(
        _mean_output(o, channels, found.o_mean), _mean_output(down, neurons, found.down_mean)
    )


def _mean_output(weight: Tensor, columns: Tensor, mean: Tensor) -> Tensor:
    part = weight.index_select(1, columns.to(weight.device)).float().cpu()
    return part @ mean[columns].float()
