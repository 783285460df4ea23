"""Wanda-sp: the structured version, from FLAP's paper, of Wanda (Sun et al., arXiv 2306.11695).

S_ij = abs(W_ij) * norm of input channel j, for the output projections of attention and MLP; a
column's score is the mean over i, a group's score the sum over its columns. Layer by layer: a
block is scored on the output of the pruned block before it.
"""

from __future__ import annotations

from torch import Tensor

from core.model.precision import arithmetic_of
from core.width.activations import BlockInputs, walk
from core.width.selection import Job, Selection, UnitScores, by_group, keep_best, output_weights
from core.width.units import BlockUnits, Keep


def select(job: Job) -> Selection:
    """Keep the best units of every block, feeding each pruned block's output to the next."""
    assert job.batch is not None
    assert job.plan.counts is not None
    counts, units = job.plan.counts, job.plan.units
    keep: dict[int, Keep] = {}
    computed = arithmetic_of(job.view.dtype, job.view.device)

    def visit(block: int, inputs: BlockInputs) -> Keep:
        scores = block_scores(inputs, *output_weights(job.view, block), units[block])
        keep[block] = keep_best(scores, counts[block], block, computed)
        return keep[block]

    chosen = {b: units[b] for b in job.plan.blocks}
    walk(job.view, job.batch, chosen, visit, job.progress, label="Wanda-sp", prunes=True)
    return Selection(keep, job.plan.ratio)


def block_scores(inputs: BlockInputs, o: Tensor, down: Tensor, unit: BlockUnits) -> UnitScores:
    """Return the scores of one block's units from its weights and the norms of its inputs."""
    attention = _columns(o) * inputs.o.norm
    neurons = _columns(down) * inputs.down.norm
    return UnitScores(by_group(attention, unit), neurons)


def _columns(weight: Tensor) -> Tensor:
    """Return the mean of abs(W_ij) over i, float64 on the CPU."""
    return weight.float().abs().mean(0).cpu().double()
