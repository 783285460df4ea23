"""Refit the down projections of a width-pruned model, in closed form: `core.heal.healing`."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import RunError
from core.heal.healing import Change, heal_narrower
from core.importance.forward import Channels
from core.model.streaming import stored_bytes
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
    shelf: Shelf,
) -> tuple[Healing, Replaced]:
    """Return the record of the repair, and the replaced tensors, which ``shelf`` holds."""
    thin = channels(units, selection)
    found = heal_narrower(view, thin, batch, progress, stored=stored, keep=shelf.put)
    nothing = torch.empty(0)  # a refit does not look at the weights before
    made = {name: functools.partial(change, nothing) for name, change in found.tensors.items()}
    return found.record("refit"), made


class Shelf:
    """Tensors on disk until they are written: all of a model's would not fit in memory.

    The file has no name: the system deletes it when it is closed, or the process dies.
    """

    def __init__(self, folder: Path) -> None:
        """Open a file on the disk of ``folder``; raises `RunError` if that is impossible."""
        self.folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # `close` closes it
        except OSError as error:
            raise self._unusable(error) from error

    def put(self, tensor: Tensor) -> Change:
        """Write a tensor, and return what reads it again; raises `RunError` for a full disk."""
        shape, dtype, data = tensor.shape, tensor.dtype, stored_bytes(tensor)
        size = len(data)
        try:
            at = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise self._unusable(error) from error

        def read(_: Tensor) -> Tensor:
            self._file.seek(at)
            return torch.frombuffer(bytearray(self._file.read(size)), dtype=dtype).view(shape)

        return read

    def close(self) -> None:
        """Close the file, which deletes it."""
        self._file.close()

    def _unusable(self, error: OSError) -> RunError:
        return RunError(
            f"Cannot keep refitted weights in {self.folder}: {error.strerror}.",
            "Free up disk space, or give an --out on another disk.",
        )
