"""FLAP (An et al., arXiv 2312.11983): fluctuation of inputs, shares per block, added biases.

Fluctuation f_j: the squared deviation of input channel j of the attention's or the MLP's output
projection in the dense model, summed over all tokens. The metric of a channel is WIFV_j = f_j *
sum_i W_ij^2, IFV_j = f_j, or WIFN_j = mean_i abs(W_ij) * norm_j, with the L2 norm of the channel
over all tokens (the public code divides its square by the number of rows: a factor common to all
channels, which no choice depends on). The attention's metric is squared. Every layer's metric is
standardised (unbiased deviation), the attention's then averaged over a group's channels. Within a
layer this is the order of the metric itself, by which the structures UL-UM and UL-MM choose; AL-AM
and AL-MM compare it between layers (core.width.ranking). The output projections get the bias
W[:, pruned] @ mean[pruned].

Unlike in the public code, the statistics are exact, every layer keeps a head and a neuron, and a
head's cost is exact: the public code stores it in a tensor of integers, so that 512/3 neurons, the
cost of a head of 128 channels, become 170.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.importance.branches import Batch
from core.model.precision import arithmetic_of
from core.width.activations import BlockInputs, InputStats, walk
from core.width.ranking import choose
from core.width.selection import (
    Biases,
    Job,
    Selection,
    UnitScores,
    check_scores,
    output_weights,
)
from core.width.surgery import dropped_channels
from core.width.units import BlockUnits, Keep


@dataclass(frozen=True)
class Calibrated:
    """Scores and input means of one block, from one pass over the dense model."""

    scores: UnitScores
    """Standardised metric, comparable between blocks; float64."""
    o_mean: Tensor
    """Mean of the input of the attention's output projection, [query channels], float64."""
    down_mean: Tensor
    """Mean of the input of the MLP's output projection, [neurons], float64."""


def select(job: Job) -> Selection:
    """Calibrate on the dense model, distribute the cut over the layers, and compensate."""
    assert job.batch is not None
    plan = job.plan
    if plan.keeps_all:
        return Selection({b: plan.units[b].all for b in plan.blocks}, plan.ratio)
    found = calibrate(job, job.batch)
    chosen = choose(job, {b: found[b].scores for b in plan.blocks})
    keep = chosen.keep
    if all(keep[b] == plan.units[b].all for b in plan.blocks):
        return chosen
    biases = {b: compensation(job, plan.units[b], keep[b], found[b]) for b in plan.blocks}
    return replace(chosen, biases=biases)


def calibrate(job: Job, batch: Batch) -> dict[int, Calibrated]:
    """Return scores and input means of the planned blocks, from one pass over the dense model."""
    result: dict[int, Calibrated] = {}

    units = {b: job.plan.units[b] for b in job.plan.blocks}
    computed = arithmetic_of(job.view.dtype, job.view.device)

    def visit(block: int, inputs: BlockInputs) -> None:
        unit = units[block]
        o, down = output_weights(job.view, block)
        measure = METRICS[job.plan.ways.metric]
        attention = measure(inputs.o, o).square()
        neurons = measure(inputs.down, down)
        check_scores(attention, f"attention of block {block}", computed)
        check_scores(neurons, f"MLP of block {block}", computed)
        groups = standardise(attention).view(unit.groups, unit.group_width).mean(1)
        scores = UnitScores(groups, standardise(neurons))
        result[block] = Calibrated(scores, inputs.o.mean, inputs.down.mean)

    walk(job.view, batch, units, visit, job.progress, label="FLAP")
    return result


def wifv(inputs: InputStats, weight: Tensor) -> Tensor:
    """Return f_j * sum_i W_ij^2 for a ``weight`` [out, in], float64 [in]."""
    return inputs.deviations * weight.float().square().sum(0).cpu().double()


def wifn(inputs: InputStats, weight: Tensor) -> Tensor:
    """Return mean_i abs(W_ij) * norm_j for a ``weight`` [out, in], float64 [in]."""
    return inputs.norm * weight.float().abs().mean(0).cpu().double()


def ifv(inputs: InputStats, weight: Tensor) -> Tensor:
    """Return f_j, float64 [in]; the weight does not count."""
    return inputs.deviations


METRICS = {"wifv": wifv, "wifn": wifn, "ifv": ifv}


def standardise(values: Tensor) -> Tensor:
    """Return ``values`` with mean 0 and unbiased deviation 1; all 0 if they are equal."""
    centred = values - values.mean()
    spread = values.std() if values.numel() > 1 else torch.zeros((), dtype=values.dtype)
    return centred / spread if float(spread) > 0 else torch.zeros_like(values)


def compensation(job: Job, unit: BlockUnits, keep: Keep, found: Calibrated) -> Biases:
    """Return the mean contribution of the removed inputs to the outputs, float32 [hidden] each."""
    o, down = output_weights(job.view, unit.block)
    channels, neurons = dropped_channels(unit, keep)
    return Biases(
        _mean_output(o, channels, found.o_mean), _mean_output(down, neurons, found.down_mean)
    )


def _mean_output(weight: Tensor, columns: Tensor, mean: Tensor) -> Tensor:
    if not len(columns):
        return torch.zeros(len(weight))
    part = weight.index_select(1, columns.to(weight.device)).float().cpu()
    return part @ mean[columns].float()
