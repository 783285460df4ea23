"""How far a model's next-token distributions are from those of another, in nats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.importance.branches import Batch
from core.importance.forward import HEAD_TOKENS, LOGITS_GPU
from core.importance.streams import Stream
from core.model.arithmetic import rms_norm
from core.model.blocks import BlockView

LOGITS_CPU = 2**24
"""Logits of one model held at once on a CPU: 64 MiB in float32. Chosen, not measured."""
_NOTHING = -100
"""Marks positions after which there is no token to predict."""


@dataclass(frozen=True)
class Apart:
    """How far a model is from the dense one, and how well it predicts the text itself."""

    kl: float
    """KL(dense || other), mean over all positions that hold a token, in nats."""
    nll: float
    """Negative log-likelihood of the next token, mean over all predictions, in nats."""


def apart(
    view: BlockView, dense: Stream, other: Stream, rows: Batch, check: Callable[[], None]
) -> Apart:
    """Compare the predictions of ``other`` with those of ``dense`` and with the text.

    Args:
        view: The model whose final norm and head both share.
        dense: Outputs of the last block of the dense model, [rows, tokens, hidden].
        other: The same of the other model.
        rows: The text.
        check: Called between chunks; may raise to stop.
    """
    weight = view.head_weight.detach().to(dense.dtype)
    budget = LOGITS_CPU if view.device.type == "cpu" else LOGITS_GPU
    step = max(1, min(HEAD_TOKENS, budget // weight.shape[0]))
    valid = rows.valid
    following = torch.full_like(rows.ids, _NOTHING)
    following[:, :-1] = torch.where(valid[:, 1:], rows.ids[:, 1:], _NOTHING)
    kl = nll = 0.0

    def log_p(hidden: Tensor) -> Tensor:
        normed = rms_norm(view.final_norm, hidden, hidden)
        return F.log_softmax((normed @ weight.t()).float(), dim=-1)

    ours_of, theirs_of = (_of_tokens(each.chunks(), valid, step) for each in (dense, other))
    parts = (ours_of, theirs_of, following[valid].split(step))
    for ours, theirs, labels in zip(*parts, strict=True):
        check()
        p, q = log_p(ours), log_p(theirs)
        losses = F.nll_loss(q, labels, ignore_index=_NOTHING, reduction="none")
        nll += float(losses.cpu().double().sum())
        apart = torch.sub(p, q, out=q)
        kl += float(apart.mul_(p.exp_()).sum(-1).cpu().double().sum())
    return Apart(kl / int(valid.sum()), nll / rows.predictions)


def _of_tokens(chunks: Iterable[Tensor], valid: Tensor, step: int) -> Iterator[Tensor]:
    """Yield copies of the states of positions that hold a token, ``step`` at a time."""
    held: list[Tensor] = []
    missing, row = step, 0
    for chunk in chunks:
        found = chunk[valid[row : row + len(chunk)]]
        row += len(chunk)
        while len(found) >= missing:
            yield torch.cat([*held, found[:missing]])
            held, found, missing = [], found[missing:], step
        if len(found):
            held.append(found)
            missing -= len(found)
    if held:
        yield torch.cat(held)
