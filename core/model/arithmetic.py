"""What LLaMA-like decoder layers compute apart from matrix products: RMSNorm and rotary phase."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(norm: Any, x: Tensor, out: Tensor) -> Tensor:
    """Return the RMSNorm ``norm`` (transformers' module) of ``x`` over its last axis, in ``out``.

    The mean square is taken in float32 and the result rounded where transformers rounds it.
    """
    eps = float(norm.variance_epsilon)
    weight = norm.weight.detach().to(x.dtype)
    if x.dtype == torch.float32:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return torch.mul(x, scale, out=out).mul_(weight)
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(weight, wide.mul_(scale).to(x.dtype), out=out)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> Tensor:
    """Return ``x`` [..., head width] turned by its position's phase, or turned back, in ``out``.

    The halves (a, b) of a head become (a cos - b sin, b cos + a sin). ``cos`` and ``sin`` are as
    transformers' rotary embedding gives them: as wide as a head, and broadcast against ``x``.
    """
    if x.shape[-1] != cos.shape[-1]:
        raise ValueError("partial rotary embedding")
    # With (a, b) the halves of a head and (c1, c2), (s1, s2) those of cos and sin:
    #   y1 = a c1 - b s1        y2 = b c2 + a s2
    # Turning back, which is also the gradient, takes the transposed matrix:
    #   da = dy1 c1 + dy2 s2    db = dy2 c2 - dy1 s1
    # which is the same formula with s1 and s2 exchanged and the opposite sign.
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (part.chunk(2, -1) for part in (x, cos, sin))
    sign = -1
    if back:
        sin_a, sin_b, sign = sin_b, sin_a, 1
    first, second = out.chunk(2, -1)
    torch.mul(a, cos_a, out=first).addcmul_(b, sin_a, value=sign)
    torch.mul(b, cos_b, out=second).addcmul_(a, sin_b, value=-sign)
    return out
