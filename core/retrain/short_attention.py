"""Attention over short rows in bfloat16 on a CPU, as plain matrix products.

torch's own kernel for the CPU is written for long rows: with rows of 64 to 512 tokens, products of
whole score matrices take 0.1 to 0.8 times as long (forward and backward, measured on one Zen 4
core). The probabilities are computed again in the backward pass instead of kept, as torch's kernel
does. Scores are rounded to bfloat16, which torch's kernel keeps in float32, so this one is for
training only; evaluations take torch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 512
"""Rows with more tokens take torch's kernel: here the scores of all pairs are computed."""


def suits(query: Tensor) -> bool:
    """Return whether ``query`` [batch, tokens, heads, size] is best computed here."""
    on_cpu = query.device.type == "cpu"
    return on_cpu and query.dtype == torch.bfloat16 and query.shape[1] <= LONGEST


class Saved(NamedTuple):
    """What the backward pass reads: query heads that share keys and values are one matrix."""

    query: Tensor
    """[batch x key heads, group x tokens, size], multiplied by the scaling."""
    key: Tensor
    """[batch x key heads, tokens, size], like ``value``."""
    value: Tensor
    mask: Tensor
    """Added to the scores: [batch or 1, 1, tokens, tokens]."""
    heads: tuple[int, int]
    """Query heads and key heads."""
    scaling: float


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Saved]:
    """Return attention [batch x tokens, heads x size], and what the backward pass needs.

    ``query``, ``key`` and ``value`` are [batch, tokens, heads, size]; without ``mask``
    ([batch or 1, 1, tokens, tokens], boolean or added to the scores) attention is causal.
    """
    batch, tokens, heads, _ = query.shape
    shared = key.shape[2]
    saved = Saved(
        _matrices(query, shared).mul_(scaling),
        _matrices(key, shared),
        _matrices(value, shared),
        _added(mask, tokens, query.dtype),
        (heads, shared),
        scaling,
    )
    attended = torch.bmm(_probabilities(saved), saved.value)
    return _rows(attended, batch, heads).reshape(batch * tokens, -1), saved


def backward(saved: Saved, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value [batch, tokens, heads, size]; of ``grad`` alike.

    With c the scaling, P = softmax(c Q K^T + M) by rows and O = P V:
      dV = P^T dO    dP = dO V^T    dS = P * (dP - sum over the row of dP * P)
      dQ = c dS K    dK = dS^T (c Q)
    """
    batch = grad.shape[0]
    heads, shared = saved.heads
    out = _matrices(grad, shared)
    kept = _probabilities(saved)
    grad_value = torch.bmm(kept.transpose(1, 2), out)
    grad_kept = torch.bmm(out, saved.value.transpose(1, 2))
    scores = torch.ops.aten._softmax_backward_data(grad_kept, kept, -1, kept.dtype)
    grad_query = torch.bmm(scores, saved.key).mul_(saved.scaling)
    grad_key = torch.bmm(scores.transpose(1, 2), saved.query)
    return (
        _rows(grad_query, batch, heads),
        _rows(grad_key, batch, shared),
        _rows(grad_value, batch, shared),
    )


def _matrices(x: Tensor, shared: int) -> Tensor:
    """Return [batch, tokens, heads, size] as a copy [batch x shared, group x tokens, size]."""
    batch, tokens, heads, size = x.shape
    found = torch.empty((batch, heads, tokens, size), dtype=x.dtype)
    found.copy_(x.transpose(1, 2))
    return found.view(batch * shared, -1, size)


def _rows(x: Tensor, batch: int, heads: int) -> Tensor:
    """Return the inverse of `_matrices`, as a view."""
    return x.view(batch, heads, -1, x.shape[-1]).transpose(1, 2)


def _added(mask: Tensor | None, tokens: int, dtype: torch.dtype) -> Tensor:
    if mask is None:
        future = torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu_(1)
        return future.view(1, 1, tokens, tokens)
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _probabilities(saved: Saved) -> Tensor:
    """Return the attention probabilities [batch x key heads, group x tokens, tokens]."""
    scores = torch.bmm(saved.query, saved.key.transpose(1, 2))
    tokens = saved.key.shape[1]
    batch = scores.shape[0] // saved.heads[1]
    scores.view(batch, saved.heads[0], tokens, tokens).add_(saved.mask)
    return torch.softmax(scores, -1)
