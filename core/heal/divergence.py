"""How far a model's next-token distributions are from those of another, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from core.importance.forward import LOGITS_GPU
from core.model.arithmetic import rms_norm
from core.model.blocks import BlockView

LOGITS_CPU = 2**24
"""Logits of one model held at once on a CPU: 64 MiB in float32. Chosen, not measured."""


def mean_kl(
    view: BlockView, dense: Tensor, other: Tensor, valid: Tensor, check: Callable[[], None]
) -> float:
    """Return KL(dense || other), averaged over the valid positions.

    Args:
        view: The model whose final norm and head both share.
        dense: Outputs of the last block of the dense model, [rows, tokens, hidden].
        other: The same of the other model.
        valid: Positions that hold a token, [rows, tokens] bool.
        check: Called between chunks; may raise to stop.
    """
    weight = view.head_weight.detach().to(dense.dtype)
    budget = LOGITS_CPU if dense.device.type == "cpu" else LOGITS_GPU
    step = max(1, budget // weight.shape[0])
    total = 0.0

    def log_p(hidden: Tensor) -> Tensor:
        logits = rms_norm(view.final_norm, hidden, hidden) @ weight.t()
        return F.log_softmax(logits.float(), dim=-1)

    for rows in zip(dense[valid].split(step), other[valid].split(step), strict=True):
        check()
        p, q = map(log_p, rows)
        total += float((p.exp() * (p - q)).sum(-1).cpu().double().sum())
    return total / int(valid.sum())
