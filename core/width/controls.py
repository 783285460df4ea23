"""Magnitude and random: the controls that a method must beat."""

from __future__ import annotations

import torch

from core.width.ranking import choose
from core.width.selection import Job, Selection, UnitScores, sum_by_unit
from core.width.units import BlockUnits


def select(job: Job) -> Selection:
    """Keep the units with the largest L2 norm, or those drawn by the seed."""
    is_random = job.plan.method.name == "random"
    draw = torch.Generator().manual_seed(job.seed)
    scores = {}
    for done, block in enumerate(job.plan.blocks, start=1):
        unit = job.plan.units[block]
        scores[block] = random_scores(unit, draw) if is_random else magnitudes(job, unit)
        job.progress.step(done, len(job.plan.blocks), f"Scores, block {block}")
    return choose(job, scores)


def magnitudes(job: Job, unit: BlockUnits) -> UnitScores:
    """Return the L2 norm of every unit's weights."""
    layer = job.view.layer(unit.block)
    squares = {
        f"{path}.weight": layer.get_submodule(path).weight.detach().float().square()
        for _, path in job.view.modules(unit.block)
        if path.endswith("_proj")
    }
    sums = sum_by_unit(squares, unit)
    return UnitScores(sums.groups.sqrt(), sums.neurons.sqrt())


def random_scores(unit: BlockUnits, draw: torch.Generator) -> UnitScores:
    """Return scores drawn uniformly from [0, 1)."""
    return UnitScores(
        torch.rand(unit.groups, generator=draw), torch.rand(unit.neurons, generator=draw)
    )
