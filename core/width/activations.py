"""Statistics of the output projections' inputs, block by block in one pass.

Only one block's weights are upcast at a time, and one state [rows, tokens, hidden] is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.importance.branches import Batch
from core.importance.forward import FastBlock, Scratch
from core.importance.taylor import pieces
from core.model.blocks import BlockView
from core.model.precision import arithmetic_of
from core.runs.progress import SILENT, Progress
from core.runs.ranks import Ranks
from core.width.surgery import dropped_channels
from core.width.units import BlockUnits, Keep


class InputStats:
    """Mean and squared deviations of channels, merged chunk by chunk (Chan et al., 1979).

    Within a chunk, both passes run in float32 on the device; sums over chunks are float64 on the
    CPU. Equal to two passes over all data, up to rounding.
    """

    def __init__(self) -> None:
        """Start without tokens."""
        self.tokens = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.deviations = torch.zeros((), dtype=torch.float64)
        """Sum over tokens of the squared deviation from the mean, [channels]."""

    def add(self, values: Tensor) -> None:
        """Add ``values`` [tokens, channels] to the statistics."""
        count = values.shape[0]
        if not count:
            return
        wide = values.float()
        mean = wide.mean(0)
        spread = (wide - mean).square_().sum(0).cpu().double()
        self.merge(count, mean.cpu().double(), spread)

    def merge(self, tokens: int, mean: Tensor, deviations: Tensor) -> None:
        """Add the statistics of other ``tokens``."""
        total = self.tokens + tokens
        if not tokens:
            return
        shift = mean - self.mean
        self.mean = self.mean + shift * (tokens / total)
        between = shift**2 * (self.tokens * tokens / total)
        self.deviations = self.deviations + deviations + between
        self.tokens = total

    def of_all(self, ranks: Ranks) -> InputStats:
        """Return the statistics of the tokens of all processes."""
        if ranks.size == 1:
            return self
        merged = InputStats()
        for part in ranks.gather((self.tokens, self.mean, self.deviations)):
            merged.merge(*part)
        return merged

    @property
    def norm(self) -> Tensor:
        """L2 norm of every channel over all tokens, [channels]."""
        return (self.deviations + self.tokens * self.mean**2).sqrt()


@dataclass(frozen=True)
class BlockInputs:
    """Statistics of the inputs of one block's output projections."""

    o: InputStats
    down: InputStats

    def of_all(self, ranks: Ranks) -> BlockInputs:
        """Return the statistics over the rows of all processes."""
        return BlockInputs(self.o.of_all(ranks), self.down.of_all(ranks))


Visitor = Callable[[int, BlockInputs], "Keep | None"]
"""Called as (block, inputs); the returned selection is applied before the next block runs."""


def walk(
    view: BlockView,
    batch: Batch,
    units: Mapping[int, BlockUnits],
    visit: Visitor,
    progress: Progress = SILENT,
    *,
    label: str = "Inputs",
    prunes: bool = False,
) -> None:
    """Run the model block by block and pass the output projections' inputs to ``visit``.

    Args:
        view: The model.
        batch: Calibration rows; padding is ignored.
        units: Units of the blocks to observe; the walk ends after the last of them.
        visit: Called for each of them.
        progress: Updated after every block.
        label: Name of the work in progress messages.
        prunes: ``visit`` returns what to keep of a block; the next block gets the pruned output.
            All rows go through each block then, whatever the groups of the batch.

    If several processes share the batch, each visits the inputs of all rows, and decides the same.
    """
    end = max(units, default=-1) + 1
    dtype, scratch = arithmetic_of(view.dtype, view.device), Scratch()
    groups = [batch] if prunes else batch.groups
    seen = {block: BlockInputs(InputStats(), InputStats()) for block in units}
    steps = end * len(groups)
    with torch.no_grad():
        for number, own in enumerate(groups):
            hidden = view.embed(own.ids).to(dtype)
            for block in range(end):
                function = FastBlock(view, block, dtype, scratch)
                if block not in units:
                    _run(view, function, hidden, progress)
                else:
                    before = hidden.clone() if prunes else None
                    _observe(view, function, hidden, own, progress, seen[block])
                    keep = None
                    if own is groups[-1]:
                        keep = visit(block, seen.pop(block).of_all(batch.ranks))
                    if before is not None and keep is not None and keep != units[block].all:
                        function.leave_out(*dropped_channels(units[block], keep))
                        _run(view, function, before, progress)
                        hidden = before
                del function  # before the next block's copy is made
                done = number * end + block + 1
                progress.step(done, steps, f"{label}, block {block + 1} of {end}")


def _run(view: BlockView, function: FastBlock, hidden: Tensor, progress: Progress) -> None:
    """Apply the block to ``hidden`` [rows, tokens, hidden], in place."""
    for piece in pieces(hidden, view, progress):
        function.attention_(piece)
        function.mlp_(piece)


def _observe(
    view: BlockView,
    function: FastBlock,
    hidden: Tensor,
    batch: Batch,
    progress: Progress,
    inputs: BlockInputs,
) -> None:
    """Apply the block in place and add its output projections' inputs to the statistics."""
    valid = batch.valid
    whole = bool(valid.all())
    at = 0
    for piece in pieces(hidden, view, progress):
        mask = valid[at : at + piece.shape[0]].flatten()
        at += piece.shape[0]

        def observe(name: str, values: Tensor, mask: Tensor = mask) -> None:
            stats = inputs.o if name == "o" else inputs.down
            stats.add(values if whole else values[mask])

        function.observe = observe
        function.attention_(piece)
        function.mlp_(piece)
    function.observe = None
