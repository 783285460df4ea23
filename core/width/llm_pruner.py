"""LLM-Pruner, block-wise (Ma et al., arXiv 2305.11627): loss change from removing a unit.

Score of a unit: the sum of the absolute value of s over its weights, with s = w*g (first order),
w^2*h (second) or w*g - w^2*h/2 (mixed); g is the gradient of the mean loss over the calibration
set, h the squared gradient of a sample's own mean loss, averaged over samples. In the vector
variant, w*g is summed over every channel (a row or column of a weight that belongs to the unit)
before the absolute value is taken. Biases are not scored.

The units of each block are ranked by themselves, or, in the global variant, those of all blocks
together (core.width.ranking).
"""

from __future__ import annotations

from core.importance.branches import Batch
from core.importance.taylor import BlockGradients, block_gradients
from core.model.precision import gradients_of
from core.width.ranking import choose
from core.width.selection import Job, Selection, UnitScores, sum_by_unit
from core.width.units import BlockUnits


def select(job: Job) -> Selection:
    """Keep the best units; only one block's gradients exist at a time."""
    assert job.batch is not None
    found = scores(job, job.batch)
    return choose(job, found, gradients_of(job.view.dtype, job.view.device))


def scores(job: Job, batch: Batch) -> dict[int, UnitScores]:
    """Return the scores of the planned blocks' units.

    Memory as in `core.importance.taylor.block_gradients`; second and mixed order also keep one
    block's squared gradients.
    """
    blocks = set(job.plan.blocks)
    order = job.plan.ways.order
    result: dict[int, UnitScores] = {}
    walk = block_gradients(
        job.view,
        batch,
        job.progress,
        first=min(blocks),
        squares=order in ("second", "mixed"),
        label="LLM-Pruner",
    )
    for found in walk:
        if found.block in blocks:
            result[found.block] = block_scores(found, job.plan.units[found.block], order)
        del found  # free it before the next block's gradients are computed
    return result


def block_scores(found: BlockGradients, unit: BlockUnits, order: str) -> UnitScores:
    """Return the scores of one block's units; overwrites the gradients in ``found``."""
    parts = {}
    for number, name in enumerate(found.names):
        if "_proj" not in name:
            continue
        weight, gradient = found.weights[number].float(), found.gradients[number]
        if order in ("first", "vector"):
            parts[name] = gradient.mul_(weight)
            if order == "first":
                parts[name].abs_()
            continue
        second = weight.square().mul_(found.squares[number])
        if order == "second":
            parts[name] = second
        else:
            parts[name] = gradient.mul_(weight).sub_(second, alpha=0.5).abs_()
    return sum_by_unit(parts, unit, vector=order == "vector")
