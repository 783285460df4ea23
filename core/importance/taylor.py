"""Exact Taylor importance, with only one block's gradients in memory at a time.

Score of a weight tensor: sum of abs(w * g), elementwise, where g is the gradient of the mean loss
over the whole calibration set (Kim et al., arXiv 2402.02834, section 3.2). One forward pass keeps
the dense inputs of all blocks; then, from the last block to the first, each is computed again with
gradients and scored, and its gradients are freed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import NotFiniteError
from core.importance.branches import Batch
from core.importance.forward import LOGITS_GPU, chunk_rows
from core.model.blocks import BlockView
from core.model.precision import gradients_of, not_finite_hint
from core.runs.progress import SILENT, Progress
from core.runs.ranks import ALONE, Ranks

TAYLOR_LOGITS = {"cpu": 2**24, "cuda": LOGITS_GPU}
"""Logits held at once for their gradient: 64 MiB in float32 on a CPU, 1 GiB on a GPU. Chosen, not
measured."""


@dataclass(frozen=True)
class WeightScore:
    """The score of one of a block's nine weight tensors."""

    name: str
    block: int
    module: str
    value: float


@dataclass(frozen=True)
class BlockGradients:
    """One block's weights and their gradients; short-lived, so that only one block's exist."""

    block: int
    names: tuple[str, ...]
    """Paths within the block, e.g. ``mlp.up_proj.weight``, in the order of the view's modules."""
    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    """Gradients of the mean loss over the whole calibration set, float32."""
    squares: tuple[Tensor, ...]
    """Squared gradient of a sample's own mean loss, averaged over samples; empty by default."""


def block_gradients(
    view: BlockView,
    batch: Batch,
    progress: Progress = SILENT,
    *,
    first: int = 0,
    squares: bool = False,
    label: str = "Taylor",
) -> Iterator[BlockGradients]:
    """Yield the gradients of every block, from the last one down to ``first``.

    Peak memory: the weights, the blocks' inputs [blocks + 1, rows, tokens, hidden], and one
    block's gradients and activations. With ``squares``, rows go through a block one at a time,
    because each needs its own gradient. If several processes share the batch, all of them get the
    gradients over all rows, and must come for every block.
    """
    count = len(view)
    dtype = gradients_of(view.dtype, view.device)
    steps = 2 * count + 1 - first
    with torch.no_grad():
        states = [view.embed(batch.ids).to(dtype)]
        for block in range(count):
            layer = BlockFunction(view, block, dtype)
            states.append(torch.empty_like(states[-1]))
            outputs = states[-1].split(chunk_rows(view.device, states[-1].shape[1]))
            for piece, out in zip(pieces(states[-2], view, progress), outputs, strict=True):
                out.copy_(layer(piece))
            del layer  # before the next block's weights are prepared
            if block < first:
                states[block] = states[block][:0]
            progress.step(block + 1, steps, f"{label}, forward, block {block + 1} of {count}")
    gradient = _head_gradient(view, batch, states.pop(), progress)
    progress.step(count + 1, steps, f"{label}, head")
    for block in reversed(range(first, count)):
        below, found = _block_gradient(
            view, block, states.pop(), gradient, dtype, progress, batch if squares else None
        )
        for tensor in (*found.gradients, *found.squares):
            batch.ranks.sum_(tensor)
            del tensor  # it would live until the next block's gradients are there
        yield found
        gradient = below
        done = 2 * count + 1 - block
        progress.step(done, steps, f"{label}, backward, block {block + 1} of {count}")
        del found


def taylor(view: BlockView, batch: Batch, progress: Progress = SILENT) -> list[WeightScore]:
    """Return the Taylor score of every scored weight tensor, block by block.

    Peak memory as in `block_gradients`.

    Raises:
        NotFiniteError: A gradient is NaN or infinite; the message names the tensor.
    """
    scores: list[list[WeightScore]] = []
    for found in block_gradients(view, batch, progress):
        values = []
        for (module, _), name, weight, g in zip(
            view.modules(found.block), found.names, found.weights, found.gradients, strict=True
        ):
            value = float(g.mul_(weight.detach()).abs_().sum())
            full = f"model.layers.{found.block}.{name}"
            check_gradient(value, full, gradients_of(view.dtype, view.device))
            values.append(WeightScore(full, found.block, module, value))
        scores.append(values)
        del found, g
    return [score for found in reversed(scores) for score in found]


def check_gradient(value: float, name: str, dtype: torch.dtype) -> None:
    """Raise `NotFiniteError` if a sum over a gradient, computed in ``dtype``, is not finite."""
    if not math.isfinite(value):
        raise NotFiniteError(
            f"The gradient of {name} is NaN or infinite.",
            not_finite_hint(dtype),
        )


class BlockFunction:
    """One block as a function of its weights, upcast once to the compute dtype."""

    def __init__(
        self, view: BlockView, block: int, dtype: torch.dtype, gradients: bool = False
    ) -> None:
        """Wrap block ``block`` of ``view``; ``gradients`` tracks them for its scored weights."""
        self.view, self.block, self.layer = view, block, view.layer(block)
        with torch.no_grad():
            self.tensors = {n: p.detach().to(dtype) for n, p in self.layer.named_parameters()}
        self.scored = [f"{path}.weight" for _, path in view.modules(block)]
        if gradients:
            for name in self.scored:
                self.tensors[name] = self.tensors[name].detach().requires_grad_()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the block's output for ``hidden`` [rows, tokens, hidden]."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.layer, self.tensors, args, kwargs)

        return self.view.call_layer(call, self.block, hidden)


def pieces(hidden: Tensor, view: BlockView, progress: Progress) -> Iterator[Tensor]:
    """Yield ``hidden`` in chunks of rows that go through a block together."""
    for piece in hidden.split(chunk_rows(view.device, hidden.shape[1])):
        progress.check_cancel()
        yield piece


def _head_gradient(view: BlockView, batch: Batch, hidden: Tensor, progress: Progress) -> Tensor:
    """Return the gradient of the mean loss with respect to the last block's output.

    Peak memory: the result, `TAYLOR_LOGITS` logits in float32 with their gradient, and the head's
    weights if they are upcast.
    """
    total = batch.predictions
    norm_weight = view.final_norm.weight.detach().to(hidden.dtype)
    weight = view.head_weight.detach().to(hidden.dtype)
    step = max(1, TAYLOR_LOGITS.get(hidden.device.type, LOGITS_GPU) // weight.shape[0])
    result = torch.empty_like(hidden)
    rows = chunk_rows(view.device, hidden.shape[1])
    for start in range(0, hidden.shape[0], rows):
        progress.check_cancel()
        part = slice(start, start + rows)
        x = hidden[part].detach().requires_grad_()
        normed = torch.func.functional_call(view.final_norm, {"weight": norm_weight}, (x,))
        predicts = batch.valid[part, 1:]
        picked = normed[:, :-1][predicts]
        targets = batch.ids[part, 1:][predicts]
        slope = torch.empty_like(picked)
        for piece, wanted, out in zip(
            *(tensor.split(step) for tensor in (picked.detach(), targets, slope)), strict=True
        ):
            progress.check_cancel()
            out.copy_(_loss_gradient(piece, wanted, weight, total))
        result[part] = torch.autograd.grad(picked, x, slope)[0]
    return result


def _loss_gradient(normed: Tensor, targets: Tensor, weight: Tensor, total: int) -> Tensor:
    """Return the gradient of the summed loss over ``total`` with respect to ``normed`` [n, hidden].

    With logits z = W x: d loss / d z = softmax(z) - onehot(target), in float32 as the loss.
    """
    slope = F.linear(normed, weight).float()
    slope.sub_(slope.amax(-1, keepdim=True)).exp_()
    slope.div_(slope.sum(-1, keepdim=True))
    slope[torch.arange(len(targets), device=slope.device), targets] -= 1.0
    return slope.div_(total).to(normed.dtype) @ weight


def _block_gradient(
    view: BlockView,
    block: int,
    hidden: Tensor,
    gradient: Tensor,
    dtype: torch.dtype,
    progress: Progress,
    samples: Batch | None,
) -> tuple[Tensor, BlockGradients]:
    """Return the gradients with respect to the block's input and to its weights.

    ``samples`` requests the squared gradients of single samples too; it holds their lengths.
    """
    layer = BlockFunction(view, block, dtype, gradients=True)
    weights = [layer.tensors[name] for name in layer.scored]
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    below = torch.empty_like(hidden)
    start = 0
    for piece in hidden.split(1) if samples else pieces(hidden, view, progress):
        progress.check_cancel()
        part = slice(start, start + piece.shape[0])
        x = piece.detach().requires_grad_()
        found = torch.autograd.grad(layer(x), [x, *weights], gradient[part])
        below[part] = found[0]
        if samples is not None:
            # Rescale from the row's share of the set's mean loss to the row's own mean loss.
            scale = samples.predictions / (int(samples.lengths[start]) - 1)
            squares = squares or [torch.zeros_like(g, dtype=torch.float32) for g in found[1:]]
            for total, g in zip(squares, found[1:], strict=True):
                own = g.float() * scale
                total.addcmul_(own, own, value=1.0 / samples.rows)
        if not sums:
            sums = [g.float() for g in found[1:]]
        else:
            for total, g in zip(sums, found[1:], strict=True):
                total += g
        start = part.stop
    detached = tuple(weight.detach() for weight in weights)
    return below, BlockGradients(block, tuple(layer.scored), detached, tuple(sums), tuple(squares))


def magnitude(view: BlockView, ranks: Ranks = ALONE) -> list[WeightScore]:
    """Return the sum of abs(w) of every scored weight tensor, block by block, in float32.

    With several processes each takes a part of the blocks.
    """
    own = [
        WeightScore(
            weight.name,
            block,
            weight.module,
            float(weight.tensor.detach().float().abs().sum()),
        )
        for block in range(len(view))[ranks.share(len(view))]
        for weight in view.weights(block)
    ]
    return ranks.joined(own)


def block_sums(scores: list[WeightScore], blocks: int) -> list[float]:
    """Return the sum of the nine scores of every block."""
    sums = [0.0] * blocks
    for score in scores:
        sums[score.block] += score.value
    return sums
