"""Statistics of what enters the output projections, block by block in one pass.

Only one block's weights are widened at a time, and one state [rows, tokens, hidden] is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.blocks import BlockView
from core.importance.branches import Batch
from core.importance.forward import compute_dtype
from core.importance.taylor import BlockFunction, pieces
from core.progress import SILENT, Progress


class InputStats:
    """Mean and squared deviations of channels, merged piece by piece (Chan et al., 1979).

    Within a piece the two passes are made in float32 on the device; sums over pieces are float64
    on the CPU. Equal to two passes over everything, to rounding.
    """

    def __init__(self) -> None:
        """Start without tokens."""
        self.tokens = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.deviations = torch.zeros((), dtype=torch.float64)
        """Sum over tokens of the squared deviation from the mean, [channels]."""

    def add(self, values: Tensor) -> None:
        """Take in ``values`` [tokens, channels]."""
        count = values.shape[0]
        if not count:
            return
        wide = values.float()
        mean = wide.mean(0)
        spread = (wide - mean).square_().sum(0).cpu().double()
        mean = mean.cpu().double()
        total = self.tokens + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.deviations = self.deviations + spread + shift**2 * (self.tokens * count / total)
        self.tokens = total

    @property
    def norm(self) -> Tensor:
        """L2 norm of every channel over all tokens, [channels]."""
        return (self.deviations + self.tokens * self.mean**2).sqrt()


@dataclass(frozen=True)
class BlockInputs:
    """What enters the output projections of one block."""

    o: InputStats
    down: InputStats


Visitor = Callable[[int, BlockInputs, dict[str, Tensor]], "dict[str, Tensor] | None"]
"""Called as (block, inputs, tensors); tensors it returns take the block's place from there on."""


def walk(
    view: BlockView,
    batch: Batch,
    blocks: Collection[int],
    visit: Visitor,
    progress: Progress = SILENT,
    label: str = "Inputs",
) -> None:
    """Run the model block by block and show ``visit`` the inputs of the output projections.

    Args:
        view: The model.
        batch: Calibration rows; padding is not counted.
        blocks: Those whose inputs are wanted; the walk ends after the last of them.
        visit: Sees each of them. The tensors it is given are the block's, by their names within
            it; where it returns others (cut ones), the next block gets the output of these.
        progress: Told of every block.
        label: What a step is called in messages.
    """
    dtype = compute_dtype(view.device, view.dtype)
    end = max(blocks, default=-1) + 1
    with torch.no_grad():
        hidden = view.embed(batch.ids).to(dtype)
        for block in range(end):
            layer = BlockFunction(view, block, dtype)
            if block in blocks:
                output, inputs = _observed(view, layer, hidden, batch, progress)
                changed = visit(block, inputs, layer.tensors)
                if changed is not None:
                    layer.tensors = changed
                    output = _run(view, layer, hidden, progress)
            else:
                output = _run(view, layer, hidden, progress)
            hidden = output
            progress.step(block + 1, end, f"{label}, block {block + 1} of {end}")


def _run(view: BlockView, layer: BlockFunction, hidden: Tensor, progress: Progress) -> Tensor:
    return torch.cat([layer(piece) for piece in pieces(hidden, view, progress)])


def _observed(
    view: BlockView, layer: BlockFunction, hidden: Tensor, batch: Batch, progress: Progress
) -> tuple[Tensor, BlockInputs]:
    """Return the block's output and what entered its output projections meanwhile."""
    inputs = BlockInputs(InputStats(), InputStats())
    valid = batch.valid
    at = slice(0, 0)

    def observer(stats: InputStats) -> Any:
        def hook(_: Any, arguments: tuple[Tensor, ...]) -> None:
            stats.add(arguments[0][valid[at]])

        return hook

    hooks = [
        layer.layer.get_submodule(name).register_forward_pre_hook(observer(stats))
        for name, stats in (("self_attn.o_proj", inputs.o), ("mlp.down_proj", inputs.down))
    ]
    outputs = []
    try:
        for piece in pieces(hidden, view, progress):
            at = slice(at.stop, at.stop + piece.shape[0])
            outputs.append(layer(piece))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(outputs), inputs
