"""Input and output of every method, and scoring by unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.errors import NotFiniteError
from core.importance.branches import Batch
from core.model.blocks import BlockView
from core.model.precision import not_finite_hint
from core.runs.progress import SILENT, Progress
from core.width.plan import WidthPlan
from core.width.units import BlockUnits, Counts, Keep


@dataclass(frozen=True)
class Job:
    """Everything a method needs to choose units."""

    view: BlockView
    plan: WidthPlan
    batch: Batch | None = None
    """Calibration rows; None for methods that use the weights alone."""
    seed: int = 1234
    """Seed of the random control."""
    progress: Progress = SILENT


@dataclass(frozen=True)
class UnitScores:
    """The scores of one block's units; the lowest are removed first."""

    groups: Tensor
    """[key/value heads]."""
    neurons: Tensor
    """[neurons]."""


@dataclass(frozen=True)
class Biases:
    """Added to the biases of a block's output projections, float32 [hidden]."""

    o: Tensor
    down: Tensor


@dataclass(frozen=True)
class Selection:
    """The units kept in every pruned block, and the biases that compensate for the others."""

    keep: dict[int, Keep]
    ratio: float
    """The method's own ratio; for an adaptive method, the one that meets the target."""
    biases: dict[int, Biases] = field(default_factory=dict)
    rescued: tuple[str, ...] = ()
    """Parts that would be empty and so kept their best unit, e.g. ``3 attention``."""


def sum_by_unit(
    parts: Mapping[str, Tensor], unit: BlockUnits, *, vector: bool = False
) -> UnitScores:
    """Sum elementwise scores of a block's projections, seven if it is whole, per unit.

    ``parts``: name within the block (e.g. ``mlp.up_proj.weight``) -> a tensor of that weight's
    shape. A group sums the rows of its key/value head in k and v, the rows of its own contiguous
    query heads in q and their columns in o. ``vector`` takes the absolute value of every row's or
    column's sum first.
    """
    rows = {n: parts[f"{n}.weight"].sum(1) for n in _OUT_ROWS if f"{n}.weight" in parts}
    columns = {n: parts[f"{n}.weight"].sum(0) for n in _IN_COLUMNS if f"{n}.weight" in parts}
    if vector:
        rows, columns = ({n: v.abs() for n, v in found.items()} for found in (rows, columns))
    groups = neurons = torch.empty(0)
    if unit.groups:
        queries, outputs = rows["self_attn.q_proj"], columns["self_attn.o_proj"]
        groups = by_group(queries, unit) + by_group(outputs, unit)
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            groups = groups + rows[name].view(unit.groups, unit.head_dim).sum(1)
    if unit.neurons:
        neurons = rows["mlp.gate_proj"] + rows["mlp.up_proj"] + columns["mlp.down_proj"]
    return UnitScores(groups, neurons)


_OUT_ROWS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
_IN_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")


def output_weights(view: BlockView, block: int) -> tuple[Tensor, Tensor]:
    """Return the weights [hidden, channels] of a block's o and down projections.

    One of a part that the block lacks has no channels.
    """
    layer: Any = view.layer(block)
    none = torch.empty(view.hidden_size, 0)
    o = layer.self_attn.o_proj.weight.detach() if view.has(block, "attention") else none
    down = layer.mlp.down_proj.weight.detach() if view.has(block, "mlp") else none
    return o, down


def by_group(channels: Tensor, unit: BlockUnits) -> Tensor:
    """Sum a score of query channels [query heads * head width] over each group's own heads."""
    return channels.view(unit.groups, unit.group_width).sum(1)


def keep_best(
    scores: UnitScores, counts: Counts, block: int, computed: torch.dtype = torch.float32
) -> Keep:
    """Return the units with the highest scores; ties go to the lower number.

    Raises `NotFiniteError` if a score is NaN or infinite; ``computed`` is what its inputs were
    computed in.
    """
    return Keep(
        _best(scores.groups, counts.groups, f"attention of block {block}", computed),
        _best(scores.neurons, counts.neurons, f"MLP of block {block}", computed),
    )


def _best(values: Tensor, count: int, where: str, computed: torch.dtype) -> tuple[int, ...]:
    check_scores(values, where, computed)
    order = torch.sort(values.cpu(), descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def check_scores(values: Tensor, where: str, computed: torch.dtype) -> None:
    """Raise `NotFiniteError` if a score, from inputs in ``computed``, is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError(
            f"A score in the {where} is NaN or infinite.",
            not_finite_hint(computed),
        )
