"""Refit the down projections of a width-pruned model, in closed form: `core.heal.healing`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.heal.healing import Change, heal_narrower
from core.importance.forward import Channels
from core.model.streaming import stored_bytes
from core.prune.results import Healing
from core.runs.progress import Progress
from core.runs.scratch_file import ScratchFile
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
    shelf: Shelf,
    states: Path | None = None,
) -> tuple[Healing, Replaced]:
    """Return the record of the repair, and the replaced tensors, which ``shelf`` holds.

    ``states``: the folder on whose disk the hidden states are; None: in memory.
    """
    thin = channels(units, selection)
    found = heal_narrower(view, thin, batch, progress, stored=stored, keep=shelf.put, folder=states)
    nothing = torch.empty(0)  # a refit does not look at the weights before
    made = {name: functools.partial(change, nothing) for name, change in found.tensors.items()}
    return found.record("refit"), made


class Shelf:
    """Tensors on disk until they are written: all of a model's would not fit in memory."""

    def __init__(self, folder: Path) -> None:
        """Open a file on the disk of ``folder``; raises `RunError` if that is impossible."""
        self._file = ScratchFile(folder, "refitted weights")

    def put(self, tensor: Tensor) -> Change:
        """Write a tensor, and return what reads it again; raises `RunError` for a full disk."""
        shape, dtype, data = tensor.shape, tensor.dtype, stored_bytes(tensor)
        at, size = self._file.append(data), len(data)

        def read(_: Tensor) -> Tensor:
            memory = bytearray(size)
            self._file.read(at, memoryview(memory))
            return torch.frombuffer(memory, dtype=dtype).view(shape)

        return read

    def close(self) -> None:
        """Close the file, which deletes it."""
        self._file.close()
