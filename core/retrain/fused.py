"""A decoder layer as one operation whose backward pass is written out: the same numbers, sooner.

transformers and peft compose a layer of some hundred small operations, each with a tensor of its
own that autograd keeps. In a small model these cost more than the matrix products. Here a whole
layer with its LoRA adapters is one step of autograd: gradients are added up in place, adapters add
into what they adapt, and dropout draws one random number for each element dropped. Attention
itself stays torch's.

`install` replaces the ``forward`` of layers that it knows and leaves all others as they are.
Parameters, their names and what is saved stay the same, and so does every result up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from core.retrain.layers import unsupported
from core.retrain.loss import causal_of
from core.retrain.spec import PROJECTIONS

Weights = Sequence[Any]
"""Tensors, or None where there is none: weight, bias, A and B of a projection, or several such."""
_CACHES = ("cache", "past_key_values", "past_key_value")
"""Names of the cache, by version of transformers."""


def install(model: Any) -> int:
    """Let the layers of ``model`` (also under peft) compute as described; return how many do.

    Returns 0 and leaves the model alone if it is not supported (`core.retrain.layers`) or its
    attention is not torch's scaled_dot_product_attention.
    """
    config = model.config
    if unsupported(config.to_dict()) or config._attn_implementation != "sdpa":
        return 0
    layers = causal_of(model).model.layers
    for layer in layers:
        layer.forward = _forward_of(layer, layer.forward)
    return len(layers)


def _forward_of(layer: Any, stock: Any) -> Any:
    attention = layer.self_attn

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *rest: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cached = any(kwargs.get(name) is not None for name in _CACHES)
        dropped_attention = attention.training and attention.attention_dropout
        if rest or cached or position_embeddings is None or dropped_attention:
            kwargs["position_embeddings"] = position_embeddings
            return stock(hidden_states, attention_mask, *rest, **kwargs)
        projections = [
            _Projection.of(getattr(part, name))
            for part, names in ((attention, PROJECTIONS[:4]), (layer.mlp, PROJECTIONS[4:]))
            for name in names
        ]
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        how = _How(
            [projection for projection, _ in projections],
            norms[0].variance_epsilon,
            attention.head_dim,
            attention.scaling,
            torch.is_grad_enabled(),
        )
        weights = [norm.weight for norm in norms]
        weights += [tensor for _, tensors in projections for tensor in tensors]
        return _Layer.apply(hidden_states, *position_embeddings, attention_mask, how, *weights)

    return forward


class _Projection(NamedTuple):
    """An adapter adds ``factor`` times what it makes of an input that lost a ``share``."""

    adapted: bool = False
    factor: float = 0.0
    share: float = 0.0

    @classmethod
    def of(cls, module: Any) -> tuple[_Projection, tuple[Tensor | None, ...]]:
        """Return how a Linear, or peft's LoRA over one, projects; and weight, bias, A, B."""
        if not hasattr(module, "lora_A"):
            return cls(), (module.weight, module.bias, None, None)
        weights = module.base_layer.weight, module.base_layer.bias
        if module.merged or module.disable_adapters:
            return cls(), (*weights, None, None)
        name = module.active_adapters[0]
        share = getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0
        low = module.lora_A[name].weight, module.lora_B[name].weight
        return cls(True, module.scaling[name] / (1 - share), share), (*weights, *low)


class _How(NamedTuple):
    """What a layer does, apart from its tensors."""

    projections: list[_Projection]
    eps: float
    head_dim: int
    scaling: float
    learning: bool
    """Whether a way back will be wanted: inside an autograd function torch does not tell."""


class _Layer(torch.autograd.Function):
    """x [batch, tokens, hidden] through one decoder layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        how: _How,
        *weights: Tensor | None,
    ) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return _forward(ctx, x, (cos, sin), mask, how, weights, x.dtype)
        compute = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return _forward(ctx, x, (cos, sin), mask, how, weights, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weights = _backward(ctx, grad)
        needed = ctx.needs_input_grad[5:]
        dtypes = ctx.dtypes
        return (
            of_x,
            *(None,) * 4,
            *(
                of.to(dtype) if need and of is not None else None
                for of, dtype, need in zip(of_weights, dtypes, needed, strict=True)
            ),
        )


def _forward(
    ctx: Any,
    x: Tensor,
    positions: tuple[Tensor, Tensor],
    mask: Tensor | None,
    how: _How,
    weights: Weights,
    compute: torch.dtype,
) -> Tensor:
    ctx.dtypes = [None if weight is None else weight.dtype for weight in weights]
    norm1, norm2, *rest = weights
    rest = [None if tensor is None else tensor.to(compute) for tensor in rest]
    lines = [rest[at : at + 4] for at in range(0, len(rest), 4)]
    q, k, v, o, gate, up, down = lines
    plans = how.projections
    shape = x.shape
    heads = (*shape[:2], -1, how.head_dim)
    flat = x.reshape(-1, shape[-1])
    gone = _all_dropped(flat.shape[0], lines, plans)
    cos, sin = (part.unsqueeze(2).to(compute) for part in positions)

    read1, inverse1 = _norm(flat, norm1, how.eps, compute)
    query, query_low = _project(read1, q, plans[0], gone[0])
    key, key_low = _project(read1, k, plans[1], gone[1])
    value, value_low = _project(read1, v, plans[2], gone[2])
    query = _turned(query.view(heads), cos, sin)
    key = _turned(key.view(heads), cos, sin)
    seen = _attend(ctx, query, key, value.view(heads), mask, how)
    out, out_low = _project(seen, o, plans[3], gone[3])
    middle = out.add_(flat) if out.dtype == flat.dtype else flat + out
    read2, inverse2 = _norm(middle, norm2, how.eps, compute)
    gated, gate_low = _project(read2, gate, plans[4], gone[4])
    wide, up_low = _project(read2, up, plans[5], gone[5])
    product = functional.silu(gated).mul_(wide)
    out, down_low = _project(product, down, plans[6], gone[6])
    out = out.add_(middle) if out.dtype == middle.dtype else middle + out
    ctx.save_for_backward(
        cos, sin, flat, inverse1, read1, seen, middle, inverse2, read2, gated, wide, product,
        query_low, key_low, value_low, out_low, gate_low, up_low, down_low,
        *gone, norm1, norm2, *rest,
    )  # fmt: skip
    ctx.how, ctx.heads, ctx.shape = how, heads, shape
    return out.view(shape)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of x and of all weights, in the order of `_Layer.forward`."""
    (
        cos, sin, flat, inverse1, read1, seen, middle, inverse2, read2, gated, wide, product, *more
    ) = ctx.saved_tensors  # fmt: skip
    lows, gone, (norm1, norm2, *rest) = more[:7], more[7:14], more[14:]
    how, heads = ctx.how, ctx.heads
    for_x = ctx.needs_input_grad[0]
    train = [any(ctx.needs_input_grad[at : at + 2]) for at in range(7, 35, 4)]
    for_norms = ctx.needs_input_grad[5:7]
    results: list[list[Tensor | None]] = [[None] * 4 for _ in range(7)]

    def back(at: int, of_out: Tensor, read: Tensor, of_read: Tensor | None, want: bool) -> Any:
        results[at], of_read = _project_back(
            of_out, read, rest[4 * at : 4 * at + 4], how.projections[at],
            lows[at], gone[at], of_read, train[at], want,
        )  # fmt: skip
        return of_read

    compute = read1.dtype
    of_out = grad.reshape(flat.shape)
    of_product = back(6, of_out.to(compute), product, None, True)
    of_wide = functional.silu(gated).mul_(of_product)
    of_gated = torch.ops.aten.silu_backward(of_product.mul_(wide), gated)
    of_read = back(4, of_gated, read2, None, True)
    of_read = back(5, of_wide, read2, of_read, True)
    of_middle, of_norm2 = _norm_back(of_read, middle, norm2, inverse2, of_out, True, for_norms[1])
    of_seen = back(3, of_middle.to(compute), seen, None, True)
    of_query, of_key, of_value = _attend_back(ctx, of_seen.view(heads))
    of_query = _turned(of_query, cos, sin, back=True)
    of_key = _turned(of_key, cos, sin, back=True)
    # Without anything trained before this layer, what reads its input needs no gradient.
    first = for_x or for_norms[0]
    of_read = back(0, of_query.flatten(2).flatten(0, 1), read1, None, first)
    of_read = back(1, of_key.flatten(2).flatten(0, 1), read1, of_read, first)
    of_read = back(2, of_value.flatten(2).flatten(0, 1), read1, of_read, first)
    of_x = of_norm1 = None
    if first:
        of_x, of_norm1 = _norm_back(of_read, flat, norm1, inverse1, of_middle, for_x, for_norms[0])
    return (
        None if of_x is None else of_x.view(ctx.shape),
        [of_norm1, of_norm2, *(of for line in results for of in line)],
    )


# --- the parts, each with its way back ---


def _project(
    x: Tensor, weights: Weights, how: _Projection, gone: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return x W^T + bias + factor drop(x) A^T B^T, and drop(x) A^T for the way back."""
    weight, bias, a, b = weights
    out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    if not how.adapted:
        return out, None
    low = (x if gone is None else _zero(x.clone(), gone)) @ a.t()
    return out.addmm_(low, b.t(), alpha=how.factor), low


def _project_back(
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    how: _Projection,
    low: Any,
    gone: Tensor | None,
    of_x: Any,
    train: bool,
    for_x: bool,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Return the gradients of the weights, and of ``x`` added to ``of_x``."""
    weight, bias, a, b = weights
    results: list[Tensor | None] = [None] * 4
    if train:
        results[0] = grad.t() @ x
        results[1] = None if bias is None else grad.sum(0)
    if for_x:
        of_x = grad @ weight if of_x is None else of_x.addmm_(grad, weight)
    if how.adapted:
        of_low = (grad @ b).mul_(how.factor)
        results[2] = of_low.t() @ (x if gone is None else _zero(x.clone(), gone))
        results[3] = (low.t() @ grad).mul_(how.factor).t()  # sooner than grad^T low
        if for_x and gone is None:
            of_x.addmm_(of_low, a)
        elif for_x:
            of_x.add_(_zero(of_low @ a, gone))
    return results, of_x


def _all_dropped(
    rows: int, lines: Sequence[Weights], plans: Sequence[_Projection]
) -> list[Tensor | None]:
    """Return what each projection's adapter does not see of its input of ``rows`` tokens."""
    result: list[Tensor | None] = [None] * len(plans)
    dropping = [at for at, plan in enumerate(plans) if plan.share]
    if dropping:
        shapes = [(rows, lines[at][2].shape[1]) for at in dropping]
        found = dropped(shapes, plans[dropping[0]].share, lines[0][0].device)
        for at, gone in zip(dropping, found, strict=True):
            result[at] = gone
    return result


def dropped(shapes: Sequence[tuple[int, int]], share: float, device: torch.device) -> list[Tensor]:
    """Return for tensors of ``shapes`` which elements dropout sets to 0, each with ``share``.

    On the CPU these are flat positions: the distances between them follow the geometric
    distribution, so that one random number is drawn for each element dropped instead of one for
    every element. Elsewhere they are masks, which need no look at their values.
    """
    if device.type != "cpu":
        masks = (torch.empty(shape, dtype=torch.bool, device=device) for shape in shapes)
        return [mask.bernoulli_(share) for mask in masks]
    ends = [*itertools.accumulate(rows * columns for rows, columns in shapes)]
    parts, last = [], -1
    while last < ends[-1]:
        left = share * (ends[-1] - last)
        uniform = torch.rand(int(left + 6 * math.sqrt(left)) + 1)
        distances = uniform.neg_().log1p_().mul_(1 / math.log1p(-share)).to(torch.int64).add_(1)
        parts.append(distances.cumsum(0).add_(last))
        last = int(parts[-1][-1])
    places = parts[0] if len(parts) == 1 else torch.cat(parts)
    cuts = [0, *torch.searchsorted(places, torch.tensor(ends)).tolist()]
    starts = [0, *ends]
    return [places[a:b] - start for a, b, start in zip(cuts, cuts[1:], starts, strict=False)]


def _zero(tensor: Tensor, gone: Tensor) -> Tensor:
    """Set what is ``dropped`` to 0, in place."""
    if gone.dtype == torch.bool:
        return tensor.masked_fill_(gone, 0)
    tensor.view(-1).index_fill_(0, gone, 0)
    return tensor


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return RMSNorm of x [tokens, size], rounded where transformers rounds; and 1 / RMS."""
    full = x.float()
    inverse = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
    inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    unit = (full * inverse).to(x.dtype)
    return (unit.mul_(weight) if unit.dtype == weight.dtype else unit * weight).to(dtype), inverse


def _norm_back(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    add: Tensor,
    for_x: bool,
    for_weight: bool,
) -> tuple[Any, Tensor | None]:
    """Return the gradients of x, added to those in ``add``, and of the weight."""
    full, grad = x.float(), grad.float()
    of_x = of_weight = None
    if for_weight:
        of_weight = (grad * full).mul_(inverse).sum(0)
    if for_x:
        of_unit = grad * weight
        along = (of_unit * full).sum(-1, keepdim=True)
        along.mul_(inverse).mul_(inverse).mul_(inverse).div_(-x.shape[-1])
        of_x = of_unit.mul_(inverse).addcmul_(full, along).add_(add).to(x.dtype)
    return of_x, of_weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Return x [batch, tokens, heads, size] turned by its positions, or turned back.

    (a, b) becomes (a cos - b sin, b cos + a sin): halves of a head, with halves of cos and sin.
    """
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (part.chunk(2, -1) for part in (x, cos, sin))
    sign = -1
    if back:
        sin_a, sin_b, sign = sin_b, sin_a, 1
    result = torch.empty_like(x)
    first, second = result.chunk(2, -1)
    torch.mul(a, cos_a, out=first).addcmul_(b, sin_a, value=sign)
    torch.mul(b, cos_b, out=second).addcmul_(a, sin_b, value=-sign)
    return result


def _attend(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: _How
) -> Tensor:
    """Return attention [batch x tokens, heads x size] and leave its small graph in ``ctx``."""
    parts = [part.transpose(1, 2).detach() for part in (query, key, value)]
    groups = parts[0].shape[1] // parts[1].shape[1]
    with torch.set_grad_enabled(how.learning):
        for part in parts:
            part.requires_grad_(how.learning)
        turned, keys, values = parts
        if groups > 1:
            keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
        seen = functional.scaled_dot_product_attention(
            turned, keys, values, attn_mask=mask, is_causal=mask is None, scale=how.scaling
        ).transpose(1, 2)
    if how.learning:
        ctx.attention = (*parts, seen)
    return seen.detach().reshape(query.shape[0] * query.shape[1], -1)


def _attend_back(ctx: Any, of_seen: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of query, key and value [batch, tokens, heads, size]."""
    *parts, seen = ctx.attention
    return tuple(part.transpose(1, 2) for part in torch.autograd.grad(seen, parts, of_seen))
