"""Perplexity of a text in windows, with a plain forward pass of the stock model.

The text is one token stream cut into non-overlapping windows (`core.data.evaluation`); the
perplexity is exp of the mean negative log-likelihood over all predictions of all windows. The loss
of every window is kept, so that two models can be compared window by window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import NotFiniteError, OutOfMemoryError
from core.evaluate.estimate import BATCH_TOKENS
from core.model.memory import free_memory, out_of_memory_explained
from core.model.precision import not_finite_hint
from core.model.tokens import check_ids, embedded
from core.runs.progress import SILENT, Progress
from core.runs.ranks import ALONE, Ranks, check_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.model.blocks import BlockView

LOGITS = 2**24
"""Maximum number of logits held at a time, in float32: 64 MiB."""
CPU_ROWS = 512
"""Maximum positions per CPU logits chunk: with a small vocabulary it stays in the cache."""


@dataclass(frozen=True)
class WindowLosses:
    """The losses of one text."""

    nll: tuple[float, ...]
    """Mean negative log-likelihood of every window's predictions, in nats."""
    window: int
    batch: int
    """Windows per batch, after halving."""

    @property
    def tokens(self) -> int:
        """Predictions over all windows; the first token of a window is not predicted."""
        return len(self.nll) * (self.window - 1)

    @property
    def ppl(self) -> float:
        """Perplexity over all predictions; every window has the same number of them."""
        return math.exp(math.fsum(self.nll) / len(self.nll))


def batch_of(device: str, length: int) -> int:
    """Return the windows of ``length`` tokens that are computed together at first."""
    return max(1, BATCH_TOKENS.get(device, 2048) // length)


def shared(
    measure: Callable[[Sequence[Sequence[int]]], WindowLosses],
    windows: Sequence[Sequence[int]],
    batch: int,
    ranks: Ranks = ALONE,
) -> WindowLosses:
    """Return the losses of ``windows``, whole batches of which each process measures."""
    if ranks.size == 1:
        return measure(windows)
    check_rows(len(windows), ranks.size, "windows")
    own = measure(windows[ranks.share(len(windows), batch)])
    smallest = min(ranks.gather(own.batch))
    return WindowLosses(tuple(ranks.joined(own.nll)), own.window, smallest)


@torch.inference_mode()
def window_losses(
    model: Any,
    windows: Sequence[Sequence[int]],
    progress: Progress = SILENT,
    label: str = "Windows",
    batch: int | None = None,
) -> WindowLosses:
    """Return the loss of every window; all must have the same length.

    ``batch`` is the number of windows computed together; None uses the default of the kind of
    device, halved as long as it runs out of memory.

    Raises:
        DataError: A token id is outside the model's vocabulary.
        OutOfMemoryError: A single window is too large for the device.
        NotFiniteError: A loss is NaN or infinite.
    """
    check_ids(windows, embedded(model))
    ids = torch.tensor(windows)
    device, length = next(model.parameters()).device, ids.shape[1]
    size = batch or batch_of(device.type, length)
    losses: list[float] = []
    while len(losses) < len(ids):
        piece = ids[len(losses) : len(losses) + size].to(device)
        try:
            with out_of_memory_explained("measuring perplexity"):
                losses += _losses(model, piece)
        except OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            free_memory(device)
            continue
        progress.step(len(losses), len(ids), f"{label}: {len(losses):,} of {len(ids):,} windows")
    if not all(map(math.isfinite, losses)):
        raise NotFiniteError(
            "The loss of a window is NaN or infinite.", not_finite_hint(model.dtype)
        )
    return WindowLosses(tuple(losses), length, size)


@torch.inference_mode()
def streamed_losses(
    view: BlockView,
    windows: Sequence[Sequence[int]],
    progress: Progress = SILENT,
    label: str = "Windows",
    group: int = 0,
    batch: int | None = None,
) -> WindowLosses:
    """Return what `window_losses` does, for a model whose blocks are read one after another.

    Every block serves all windows before the next one is read: the states of ``group`` windows
    (0: all) are held at once, and each group reads every weight once. The same operations on the
    same batches as in `window_losses`, and so the same numbers.

    Raises `DataError` and `NotFiniteError` as that does.
    """
    check_ids(windows, embedded(view.model))
    ids = torch.tensor(windows)
    length = ids.shape[1]
    size = batch or batch_of(view.device.type, length)
    most = max(size, group // size * size) if group else len(ids)  # groups of whole batches
    steps = -(-len(ids) // most) * len(view)
    losses: list[float] = []
    for number, own in enumerate(ids.split(most)):
        states = list(view.embed(own.to(view.device)).split(size))  # the table is read once
        for block in range(len(view)):
            layer = view.layer(block)
            for at, hidden in enumerate(states):
                progress.check_cancel()
                states[at] = view.call_layer(layer, block, hidden)
            done = number * len(view) + block + 1
            progress.step(done, steps, f"{label}: block {block + 1} of {len(view)}")
        head = partial(F.linear, weight=view.head_weight)
        for hidden, piece in zip(states, own.split(size), strict=True):
            normed = view.final_norm(hidden)
            vocabulary = view.head_weight.shape[0]
            losses += _head_losses(head, vocabulary, normed, piece.to(view.device))
    if not all(map(math.isfinite, losses)):
        raise NotFiniteError(
            "The loss of a window is NaN or infinite.", not_finite_hint(view.dtype)
        )
    return WindowLosses(tuple(losses), length, size)


def _losses(model: Any, ids: Tensor) -> list[float]:
    """Return the mean loss of every row of ``ids`` [rows, tokens], in float64 from float32."""
    return head_losses(model, model.model(input_ids=ids, use_cache=False).last_hidden_state, ids)


def head_losses(model: Any, normed: Tensor, ids: Tensor) -> list[float]:
    """Return the mean loss of every row; ``normed`` is the final norm's output for ``ids``.

    ``normed`` [rows, tokens, hidden], ``ids`` [rows, tokens]; the logits are computed in chunks.
    """
    return _head_losses(model.lm_head, model.lm_head.weight.shape[0], normed, ids)


def _head_losses(
    head: Callable[[Tensor], Tensor], vocabulary: int, normed: Tensor, ids: Tensor
) -> list[float]:
    flat, targets = normed[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    step = max(1, LOGITS // vocabulary)
    if flat.device.type == "cpu":
        step = min(step, CPU_ROWS)
    nll = [
        F.cross_entropy(head(part).float(), wanted, reduction="none")
        for part, wanted in zip(flat.split(step), targets.split(step), strict=True)
    ]
    return torch.cat(nll).cpu().double().view(len(ids), -1).mean(1).tolist()
