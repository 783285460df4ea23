"""Perplexity of a text in windows, with a plain forward pass of the stock model.

The text is one token stream cut into non-overlapping windows (`core.data.evaluation`); the
perplexity is exp of the mean negative log-likelihood over all predictions of all windows. The loss
of every window is kept, so that two models can be compared window by window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import NotFiniteError, OutOfMemoryError
from core.model.memory import free_memory, out_of_memory_explained
from core.model.precision import not_finite_hint
from core.model.tokens import check_ids, embedded
from core.runs.progress import SILENT, Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 8192}
"""Tokens of the first batch; halved until it fits. A CPU gains nothing from more."""
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
    size = batch or max(1, BATCH_TOKENS.get(device.type, 2048) // length)
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


def _losses(model: Any, ids: Tensor) -> list[float]:
    """Return the mean loss of every row of ``ids`` [rows, tokens], in float64 from float32."""
    return head_losses(model, model.model(input_ids=ids, use_cache=False).last_hidden_state, ids)


def head_losses(model: Any, normed: Tensor, ids: Tensor) -> list[float]:
    """Return the mean loss of every row; ``normed`` is the final norm's output for ``ids``.

    ``normed`` [rows, tokens, hidden], ``ids`` [rows, tokens]; the logits are computed in chunks.
    """
    flat, targets = normed[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    step = max(1, LOGITS // model.lm_head.weight.shape[0])
    if flat.device.type == "cpu":
        step = min(step, CPU_ROWS)
    nll = [
        F.cross_entropy(model.lm_head(part).float(), wanted, reduction="none")
        for part, wanted in zip(flat.split(step), targets.split(step), strict=True)
    ]
    return torch.cat(nll).cpu().double().view(len(ids), -1).mean(1).tolist()
