"""Attention over short rows against torch's own kernel in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from core.retrain import short_attention

TOKENS = 24


def allowed(kind):
    """Return who attends to whom [1, 1, tokens, tokens], None for causal."""
    if kind == "causal":
        return None
    rows = torch.arange(TOKENS) // 9  # packed: rows of 9, 9 and 6 tokens
    same = rows[:, None] == rows[None, :]
    return (same & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()).view(1, 1, TOKENS, TOKENS)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4)], ids=["gqa", "mha"])
@pytest.mark.parametrize("kind", ["causal", "boolean", "added"])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_output_and_gradients(heads, kind, dtype, rel):
    chance = torch.Generator().manual_seed(2)
    shapes = [(2, TOKENS, number, 16) for number in (heads[0], heads[1], heads[1], heads[0])]
    made = [torch.randn(shape, generator=chance, dtype=torch.float64) for shape in shapes]
    query, key, value, grad = (part.to(dtype).double() for part in made)
    mask = allowed(kind)
    parts = [part.clone().requires_grad_() for part in (query, key, value)]
    turned = [part.transpose(1, 2) for part in parts]
    group = heads[0] // heads[1]
    shared = [part.repeat_interleave(group, 1) for part in turned[1:]]
    exact = functional.scaled_dot_product_attention(
        turned[0], *shared, attn_mask=mask, is_causal=mask is None, scale=0.3
    ).transpose(1, 2)
    wanted = torch.autograd.grad(exact, parts, grad)
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    given = [part.to(dtype) for part in (query, key, value)]
    out, saved = short_attention.forward(*given, mask, 0.3)
    found = short_attention.backward(saved, grad.to(dtype))
    for one, other in zip((out, *found), (exact.flatten(2).flatten(0, 1), *wanted), strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).norm()) < rel * float(other.norm())


def test_only_short_rows_in_bfloat16_are_computed_here():
    assert short_attention.suits(torch.zeros(1, 512, 1, 2, dtype=torch.bfloat16))
    assert not short_attention.suits(torch.zeros(1, 513, 1, 2, dtype=torch.bfloat16))
    assert not short_attention.suits(torch.zeros(1, 8, 1, 2))
