"""Refit the down projections of a width-pruned model, in closed form: `core.heal.healing`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from core.heal.healing import heal_narrower
from core.importance.forward import Channels
from core.prune.results import Healing
from core.runs.progress import Progress
from core.width.selection import Selection
from core.width.surgery import group_channels
from core.width.units import BlockUnits

if TYPE_CHECKING:
    from core.importance.branches import Batch
    from core.model.blocks import BlockView
    from core.width.write import Replaced


def channels(units: Sequence[BlockUnits], selection: Selection) -> dict[int, Channels]:
    """Return what every block keeps that lost something."""
    found = {}
    for block, keep in selection.keep.items():
        unit, added = units[block], selection.biases.get(block)
        if keep.counts == unit.all.counts:
            continue
        kept = Channels(o_bias=added.o, down_bias=added.down) if added else Channels()
        if len(keep.neurons) < unit.neurons:
            kept = replace(kept, neurons=torch.tensor(keep.neurons))
        if len(keep.groups) < unit.groups:
            queries, keys = (group_channels(unit, keep.groups, keys=k) for k in (False, True))
            kept = replace(kept, queries=queries, keys=keys)
        found[block] = kept
    return found


def refit(
    view: BlockView,
    units: Sequence[BlockUnits],
    selection: Selection,
    batch: Batch,
    stored: Mapping[str, torch.dtype],
    progress: Progress,
) -> tuple[Healing, Replaced]:
    """Return the record of the repair, and the replaced tensors as they will be written."""
    found = heal_narrower(view, channels(units, selection), batch, progress, stored=stored)
    nothing = torch.empty(0)  # a refit does not look at the weights before
    made = {name: functools.partial(change, nothing) for name, change in found.tensors.items()}
    return found.record("refit"), made
