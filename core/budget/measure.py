"""KL and loss with one block changed, for every version of every block, in shared passes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.budget.versions import LOSES, Unit, lost, neurons_left
from core.errors import NotFiniteError
from core.importance.branches import Batch, losses_without, states_without
from core.importance.passes import grouped
from core.model.blocks import BlockView
from core.model.precision import arithmetic_of
from core.prune.version_results import MLP_SHARES
from core.runs.progress import SILENT, Progress
from core.search.ledger import Cost, Group, Tape
from core.width.activations import BlockInputs, walk
from core.width.selection import check_scores, output_weights
from core.width.units import BlockUnits
from core.width.wanda_sp import block_scores

Order = Mapping[int, Sequence[int]]
"""Block -> its MLP's neurons, the most important first."""
CRITERION = "wanda-sp"
"""The width method whose scores rank the neurons."""


def rank_neurons(
    view: BlockView, batch: Batch, units: Mapping[int, BlockUnits], progress: Progress = SILENT
) -> dict[int, list[int]]:
    """Rank the MLP neurons of every block by Wanda-sp's scores on the dense model's states.

    A neuron's score is the norm of its output over all tokens times the mean size of its weights
    in the down projection.
    """
    order: dict[int, list[int]] = {}

    def visit(block: int, inputs: BlockInputs) -> None:
        scores = block_scores(inputs, *output_weights(view, block), units[block]).neurons
        check_scores(scores, f"MLP of block {block}", arithmetic_of(view.dtype, view.device))
        order[block] = torch.sort(scores.cpu(), descending=True, stable=True).indices.tolist()

    walk(view, batch, units, visit, progress, label="Neurons")
    return order


@dataclass(frozen=True)
class Measured:
    """What the versions cost on the calibration rows: means over all predictions, in nats."""

    dense_nll: float
    of: dict[tuple[int, str], tuple[float, float]]
    """(block, version) -> (kl, nll)."""
    passes: int
    """Block passes, shared prefixes once; a part counts as half of one."""
    seconds: float


def measure(
    view: BlockView,
    batch: Batch,
    versions: Sequence[str],
    most: int,
    progress: Progress = SILENT,
    order: Order | None = None,
    tape: Tape | None = None,
) -> Measured:
    """Measure every version of every block; ``most`` hidden states are held at once (at least 2).

    ``order`` ranks the neurons, for versions with narrower MLPs. What is on ``tape`` is taken from
    there, what is measured is added to it.

    Raises `NotFiniteError` if the dense model's own loss is not finite.
    """
    one_by_one = {
        (block, version): lost(block, version) for block in range(len(view)) for version in versions
    }
    found = together(view, batch, list(one_by_one.values()), most, progress, order, tape)
    return Measured(
        found.dense_nll,
        {one: found.of[parts] for one, parts in one_by_one.items()},
        found.passes,
        found.seconds,
    )


@dataclass(frozen=True)
class Sets:
    """What sets of parts cost, as in `Measured`."""

    dense_nll: float
    of: dict[frozenset[Unit], tuple[float, float]]
    """Parts that the model loses -> (kl, nll)."""
    passes: int
    seconds: float


_UNITS = ("attention", "mlp", *MLP_SHARES)


def _number(unit: Unit | int) -> int:
    """Return a unit as a number, for a tape; a block's number if whole blocks are measured."""
    return unit if isinstance(unit, int) else unit[0] * len(_UNITS) + _UNITS.index(unit[1])


def together(
    view: BlockView,
    batch: Batch,
    losses: Sequence[frozenset[Unit]],
    most: int,
    progress: Progress = SILENT,
    order: Order | None = None,
    tape: Tape | None = None,
) -> Sets:
    """Measure the model without each set of parts; ``most`` states are held at once (at least 2).

    If every set is of whole blocks, these can be of any kind. With a ``tape`` that has the first
    pass, the dense states are computed again without counting that: passes and seconds are those of
    a run that was not interrupted.
    """
    blocks = [_whole(parts) for parts in losses]
    sublayers = any(one is None for one in blocks)
    sets: dict[frozenset[Unit], frozenset[Any]] = {
        parts: parts if sublayers or one is None else one
        for parts, one in zip(losses, blocks, strict=True)
    }
    narrow = {
        (block, version): tuple(sorted(ranked[: neurons_left(len(ranked), version)]))
        for block, ranked in (order or {}).items()
        for version in MLP_SHARES
    }
    groups = grouped(list(sets.values()), most - 1)
    reference: Tensor | None = None
    costs: dict[frozenset[Any], tuple[float, float]] = {}
    passes, seconds, dense_nll = 0, 0.0, math.nan
    for number, some in enumerate(groups):
        empty = [] if number else [frozenset[Any]()]
        asked = [*empty, *some]
        coded = tuple(frozenset(map(_number, one)) for one in asked)
        group = tape.groups.get(coded) if tape else None
        if group is None:
            if number and reference is None:
                reference = states_without(view, batch, [frozenset()], progress)[0]
            began = time.perf_counter()
            found = losses_without(
                view, batch, asked, progress, sublayers=sublayers, want_kl=True, dense=reference,
                narrow=narrow, label=f"Pass {number + 1} of {len(groups)}, block",
            )  # fmt: skip
            assert found is not None
            reference = found.dense
            costs_of = tuple(map(Cost, found.nll, found.kl))
            group = Group(coded, costs_of, found.passes, time.perf_counter() - began)
            if tape:
                tape.add(group)
        values = [(cost.kl, cost.nll) for cost in group.costs]
        if empty:
            dense_nll = values.pop(0)[1]
            if not math.isfinite(dense_nll):
                raise NotFiniteError(
                    f"The model's loss on the calibration text is {dense_nll}.",
                    "Try --dtype float32.",
                )
        costs |= dict(zip(some, values, strict=True))
        passes += group.passes
        seconds += group.seconds
    return Sets(
        dense_nll,
        {parts: costs[asked] for parts, asked in sets.items()},
        passes // 2 if sublayers else passes,
        seconds,
    )


def _whole(parts: frozenset[Unit]) -> frozenset[int] | None:
    """Return the blocks that these parts are; None if there are parts of others."""
    blocks = {block for block, _ in parts}
    every = {(block, part) for block in blocks for part in LOSES["drop"]}
    return frozenset(blocks) if parts == every else None
