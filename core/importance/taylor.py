"""Taylor importance, exact, with the gradients of one block alive at a time.

Score of a weight tensor: sum of abs(w * g), elementwise, g being the gradient of the mean loss
over the whole calibration set (Kim et al., arXiv 2402.02834, section 3.2). The dense inputs of
all blocks are kept from one forward pass; then the blocks are gone through backwards, each
computed again with gradients, scored, and its gradients dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.blocks import MODULES, BlockView
from core.errors import NotFiniteError
from core.importance.branches import Batch
from core.importance.forward import chunk_rows, compute_dtype
from core.progress import SILENT, Progress


@dataclass(frozen=True)
class WeightScore:
    """The score of one of a block's nine weight tensors."""

    name: str
    block: int
    module: str
    value: float


def taylor(view: BlockView, batch: Batch, progress: Progress = SILENT) -> list[WeightScore]:
    """Return the Taylor score of every scored weight tensor, block by block.

    Peak memory: the weights, the blocks' inputs [blocks + 1, rows, tokens, hidden], and one
    block's gradients and activations.

    Raises:
        NotFiniteError: A gradient is NaN or infinite; names the tensor.
    """
    count = len(view)
    dtype = compute_dtype(view.device, view.dtype)
    steps = 2 * count + 1
    with torch.no_grad():
        states = [view.embed(batch.ids).to(dtype)]
        for block in range(count):
            layer = _Layer(view, block, dtype, gradients=False)
            pieces = [layer(piece) for piece in _pieces(states[-1], view, progress)]
            states.append(torch.cat(pieces))
            progress.step(block + 1, steps, f"Taylor, forward, block {block + 1} of {count}")
    gradient = _head_gradient(view, batch, states.pop(), progress)
    progress.step(count + 1, steps, "Taylor, head")
    scores: list[list[WeightScore]] = []
    for block in reversed(range(count)):
        gradient, found = _block_gradient(view, block, states.pop(), gradient, dtype, progress)
        scores.append(found)
        done = 2 * count + 1 - block
        progress.step(done, steps, f"Taylor, backward, block {block + 1} of {count}")
    return [score for found in reversed(scores) for score in found]


class _Layer:
    """One block as a function of its weights, widened once where the device computes wider."""

    def __init__(self, view: BlockView, block: int, dtype: torch.dtype, gradients: bool) -> None:
        self.view, self.block, self.layer = view, block, view.blocks[block]
        with torch.no_grad():
            self.tensors = {n: p.detach().to(dtype) for n, p in self.layer.named_parameters()}
        self.scored = [f"{path}.weight" for _, path in MODULES]
        if gradients:
            for name in self.scored:
                self.tensors[name] = self.tensors[name].detach().requires_grad_()

    def __call__(self, hidden: Tensor) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.layer, self.tensors, args, kwargs)

        return self.view.call_layer(call, self.block, hidden)


def _pieces(hidden: Tensor, view: BlockView, progress: Progress) -> Any:
    for piece in hidden.split(chunk_rows(view.device, hidden.shape[1])):
        progress.check_cancel()
        yield piece


def _head_gradient(view: BlockView, batch: Batch, hidden: Tensor, progress: Progress) -> Tensor:
    """Return the gradient of the mean loss for the last block's output."""
    total = batch.predictions
    norm_weight = view.final_norm.weight.detach().to(hidden.dtype)
    result = torch.empty_like(hidden)
    rows = chunk_rows(view.device, hidden.shape[1])
    for start in range(0, hidden.shape[0], rows):
        progress.check_cancel()
        part = slice(start, start + rows)
        x = hidden[part].detach().requires_grad_()
        normed = torch.func.functional_call(view.final_norm, {"weight": norm_weight}, (x,))
        predicts = batch.valid[part, 1:]
        picked = normed[:, :-1][predicts]
        logits = F.linear(picked, view.head_weight.detach().to(hidden.dtype)).float()
        loss = F.cross_entropy(logits, batch.ids[part, 1:][predicts], reduction="sum") / total
        result[part] = torch.autograd.grad(loss, x)[0]
    return result


def _block_gradient(
    view: BlockView,
    block: int,
    hidden: Tensor,
    gradient: Tensor,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[Tensor, list[WeightScore]]:
    """Return the gradient for the block's input, and the block's scores."""
    layer = _Layer(view, block, dtype, gradients=True)
    weights = [layer.tensors[name] for name in layer.scored]
    sums: list[Tensor] = []
    below = torch.empty_like(hidden)
    start = 0
    for piece in _pieces(hidden, view, progress):
        part = slice(start, start + piece.shape[0])
        x = piece.detach().requires_grad_()
        found = torch.autograd.grad(layer(x), [x, *weights], gradient[part])
        below[part] = found[0]
        if not sums:
            sums = [g.float() for g in found[1:]]
        else:
            for total, g in zip(sums, found[1:], strict=True):
                total += g
        start = part.stop
    scores = []
    for (module, path), weight, total in zip(MODULES, weights, sums, strict=True):
        value = float(total.mul_(weight.detach()).abs_().sum())
        name = f"model.layers.{block}.{path}.weight"
        if value != value or value == float("inf"):
            raise NotFiniteError(
                f"The gradient of {name} is NaN or infinite.",
                "Use --dtype bfloat16 or float32: float16 overflows in some LLaMA models.",
            )
        scores.append(WeightScore(name, block, module, value))
    return below, scores


def magnitude(view: BlockView) -> list[WeightScore]:
    """Return the sum of abs(w) of every scored weight tensor, block by block; sums in float32."""
    return [
        WeightScore(
            weight.name,
            block,
            weight.module,
            float(weight.tensor.detach().float().abs().sum()),
        )
        for block in range(len(view))
        for weight in view.weights(block)
    ]


def block_sums(scores: list[WeightScore], blocks: int) -> list[float]:
    """Return the sum of the nine scores of every block."""
    sums = [0.0] * blocks
    for score in scores:
        sums[score.block] += score.value
    return sums
