"""A decoder layer as one autograd operation, with a hand-written backward pass.

The results are numerically equivalent to those of transformers and peft, and faster: those compose
a layer of some hundred small operations, and autograd keeps a tensor for each. In a small model
this costs more than the matrix products. Here a whole layer with its LoRA adapters is one
operation: gradients are accumulated in place, adapters add to the output of the projection that
they adapt, and dropout draws one random number per dropped element. Only attention itself uses
torch's own kernel and its backward pass, except over short rows (`core.retrain.short_attention`).

`install` replaces the ``forward`` of the layers it supports and leaves all other models unchanged.
Parameters, their names and the saved files stay the same, and so do the results, up to rounding.

Notation in the comments: dy is the gradient of the loss with respect to y, * is the elementwise
product, and x W^T is a matrix product. In the code, ``grad_x`` is dx.
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

from core.model.arithmetic import rotate
from core.model.quantized_weights import is_quantized, widened
from core.retrain import short_attention
from core.retrain.layers import unsupported
from core.retrain.loss import causal_of
from core.retrain.spec import PROJECTIONS

Weights = Sequence[Any]
"""Weight, bias, A and B of a projection (None for those it lacks), or of several in a row."""
_CACHES = ("cache", "past_key_values")
"""Names of a layer's key/value cache in transformers, the new one and the deprecated one."""


def install(model: Any, *, keep: bool = True) -> int:
    """Install the hand-written layers in ``model`` (also under peft); return how many there are.

    ``keep``: whether the weights that the forward pass converts to the precision it computes in are
    kept for the backward pass. Otherwise that converts them again: slower, for less memory.

    A layer without attention or without an MLP keeps the code of its checkpoint. Returns 0 and
    leaves the model unchanged if it is not supported (`core.retrain.layers`) or if
    its attention is not torch's scaled_dot_product_attention.
    """
    config = model.config
    if unsupported(config.to_dict()) or config._attn_implementation != "sdpa":
        return 0
    layers = [
        layer
        for layer in causal_of(model).model.layers
        if layer.self_attn is not None and layer.mlp is not None
    ]
    for layer in layers:
        layer.forward = _fused_forward(layer, layer.forward, keep)
    return len(layers)


def _fused_forward(layer: Any, stock: Any, keep: bool) -> Any:
    """Return the new ``forward`` of a layer; it calls ``stock`` in cases that it cannot handle."""
    attention = layer.self_attn

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *rest: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cached = any(kwargs.get(name) is not None for name in _CACHES)
        attention_dropout = attention.training and attention.attention_dropout
        if rest or cached or position_embeddings is None or attention_dropout:
            kwargs["position_embeddings"] = position_embeddings
            return stock(hidden_states, attention_mask, *rest, **kwargs)
        projections = [
            _Projection.of(getattr(part, name))
            for part, names in ((attention, PROJECTIONS[:4]), (layer.mlp, PROJECTIONS[4:]))
            for name in names
        ]
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        config = _LayerConfig(
            [projection for projection, _ in projections],
            norms[0].variance_epsilon,
            attention.head_dim,
            attention.scaling,
            torch.is_grad_enabled(),
            keep,
        )
        weights = [norm.weight for norm in norms]
        weights += [tensor for _, tensors in projections for tensor in tensors]
        return _Layer.apply(hidden_states, *position_embeddings, attention_mask, config, *weights)

    return forward


class _Projection(NamedTuple):
    """How a linear projection computes, apart from its tensors.

    LoRA: y = x W^T + b + scale * B(A(dropout(x))), where ``scale`` includes 1 / (1 - dropout).
    """

    adapted: bool = False
    scale: float = 0.0
    dropout: float = 0.0

    @classmethod
    def of(cls, module: Any) -> tuple[_Projection, tuple[Tensor | None, ...]]:
        """Return the config of a Linear or of peft's LoRA over one; and weight, bias, A, B."""
        if not hasattr(module, "lora_A"):
            return cls(), (module.weight, module.bias, None, None)
        weights = module.base_layer.weight, module.base_layer.bias
        if module.merged or module.disable_adapters:
            return cls(), (*weights, None, None)
        name = module.active_adapters[0]
        dropout = getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0
        adapter = module.lora_A[name].weight, module.lora_B[name].weight
        return cls(True, module.scaling[name] / (1 - dropout), dropout), (*weights, *adapter)


class _LayerConfig(NamedTuple):
    """How a layer computes, apart from its tensors."""

    configs: list[_Projection]
    """In the order of `PROJECTIONS`."""
    eps: float
    head_dim: int
    scaling: float
    needs_grad: bool
    """Whether gradients are needed (not visible inside autograd.Function)."""
    keep: bool = True
    """Whether converted weights are kept for the backward pass."""


class _Layer(torch.autograd.Function):
    """x [batch, tokens, hidden] through one decoder layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        config: _LayerConfig,
        *weights: Tensor | None,
    ) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return _forward(ctx, x, (cos, sin), mask, config, weights, x.dtype)
        compute = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return _forward(ctx, x, (cos, sin), mask, config, weights, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weights = _backward(ctx, grad)
        needed = ctx.needs_input_grad[5:]
        return (
            grad_x,
            *(None,) * 4,
            *(
                found.to(dtype) if need and found is not None else None
                for found, dtype, need in zip(grad_weights, ctx.dtypes, needed, strict=True)
            ),
        )


def _forward(
    ctx: Any,
    x: Tensor,
    positions: tuple[Tensor, Tensor],
    mask: Tensor | None,
    config: _LayerConfig,
    weights: Weights,
    compute: torch.dtype,
) -> Tensor:
    # x2 = x + o(attention(q(n1), k(n1), v(n1))) with n1 = norm1(x)
    # y  = x2 + down(silu(gate(n2)) * up(n2))    with n2 = norm2(x2)
    ctx.dtypes = [None if weight is None else weight.dtype for weight in weights]
    norm1, norm2, *given = weights
    rest = [_held(tensor, compute) for tensor in given]
    projections = [rest[at : at + 4] for at in range(0, len(rest), 4)]
    q, k, v, o, gate, up, down = projections
    configs = config.configs
    shape = x.shape
    heads = (*shape[:2], -1, config.head_dim)
    flat = x.reshape(-1, shape[-1])
    dropout_masks = _dropout_masks(flat.shape[0], projections, configs)
    cos, sin = (part.unsqueeze(2).to(compute) for part in positions)

    normed1, inverse1 = _rms_norm(flat, norm1, config.eps, compute)
    query, query_hidden = _project(normed1, q, configs[0], dropout_masks[0])
    key, key_hidden = _project(normed1, k, configs[1], dropout_masks[1])
    value, value_hidden = _project(normed1, v, configs[2], dropout_masks[2])
    query = _rotated(query.view(heads), cos, sin)
    key = _rotated(key.view(heads), cos, sin)
    attended = _attention(ctx, query, key, value.view(heads), mask, config)
    out, out_hidden = _project(attended, o, configs[3], dropout_masks[3])
    flat2 = out.add_(flat) if out.dtype == flat.dtype else flat + out
    normed2, inverse2 = _rms_norm(flat2, norm2, config.eps, compute)
    gate_out, gate_hidden = _project(normed2, gate, configs[4], dropout_masks[4])
    up_out, up_hidden = _project(normed2, up, configs[5], dropout_masks[5])
    product = functional.silu(gate_out).mul_(up_out)
    out, down_hidden = _project(product, down, configs[6], dropout_masks[6])
    out = out.add_(flat2) if out.dtype == flat2.dtype else flat2 + out
    ctx.save_for_backward(
        cos, sin, flat, inverse1, normed1, attended, flat2, inverse2, normed2,
        gate_out, up_out, product,
        query_hidden, key_hidden, value_hidden, out_hidden, gate_hidden, up_hidden, down_hidden,
        *dropout_masks, norm1, norm2, *(rest if config.keep else given),
    )  # fmt: skip
    ctx.config, ctx.heads, ctx.shape = config, heads, shape
    return torch.ops.aten._unsafe_view(out, shape)  # FSDP warns of a view


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of x and of all weights, in the order of `_Layer.forward`."""
    (
        cos, sin, flat, inverse1, normed1, attended, flat2, inverse2, normed2,
        gate_out, up_out, product, *more,
    ) = ctx.saved_tensors  # fmt: skip
    lora_hidden, dropout_masks, (norm1, norm2, *rest) = more[:7], more[7:14], more[14:]
    config, heads = ctx.config, ctx.heads
    needs_x = ctx.needs_input_grad[0]
    needs_norms = ctx.needs_input_grad[5:7]
    needs_weights = [any(ctx.needs_input_grad[at : at + 2]) for at in range(7, 35, 4)]
    results: list[list[Tensor | None]] = [[None] * 4 for _ in range(7)]

    def backward(at: int, grad_out: Tensor, x: Tensor, grad_x: Tensor | None, wanted: bool) -> Any:
        results[at], grad_x = _project_backward(
            grad_out, x, rest[4 * at : 4 * at + 4], config.configs[at], lora_hidden[at],
            dropout_masks[at], grad_x, needs_weights[at], wanted,
        )  # fmt: skip
        return grad_x

    compute = normed1.dtype
    rest = [_held(tensor, compute) for tensor in rest]
    grad_out = grad.reshape(flat.shape)
    # SwiGLU: p = silu(g) * u, so du = dp * silu(g) and dg = dp * u * silu'(g),
    # where silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
    grad_product = backward(6, grad_out.to(compute), product, None, True)
    grad_up = functional.silu(gate_out).mul_(grad_product)
    grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up_out), gate_out)
    grad_normed = backward(4, grad_gate, normed2, None, True)
    grad_normed = backward(5, grad_up, normed2, grad_normed, True)
    # y = x2 + f(x2): dx2 is dy plus what comes back through f; likewise for x below.
    grad_flat2, grad_norm2 = _rms_norm_backward(
        grad_normed, flat2, norm2, inverse2, grad_out, True, needs_norms[1]
    )
    grad_attended = backward(3, grad_flat2.to(compute), attended, None, True)
    grad_query, grad_key, grad_value = _attention_backward(ctx, grad_attended.view(heads))
    grad_query = _rotated(grad_query, cos, sin, back=True)
    grad_key = _rotated(grad_key, cos, sin, back=True)
    # If nothing before this layer is trained, the input of q, k and v needs no gradient.
    needs_input = needs_x or needs_norms[0]
    grad_normed = None
    for at, part in enumerate((grad_query, grad_key, grad_value)):
        rows = part.flatten(2).flatten(0, 1)
        grad_normed = backward(at, rows, normed1, grad_normed, needs_input)
    grad_x = grad_norm1 = None
    if needs_input:
        grad_x, grad_norm1 = _rms_norm_backward(
            grad_normed, flat, norm1, inverse1, grad_flat2, needs_x, needs_norms[0]
        )
    return (
        None if grad_x is None else grad_x.view(ctx.shape),
        [grad_norm1, grad_norm2, *(found for result in results for found in result)],
    )


# --- forward/backward pairs ---


def _project(
    x: Tensor, weights: Weights, config: _Projection, dropout_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return x W^T + bias + scale * dropout(x) A^T B^T, and dropout(x) A^T for the backward pass.

    ``x`` is [tokens, inputs], the results [tokens, outputs] and [tokens, rank].
    """
    weight, bias, a, b = weights
    weight = _widened(weight, x.dtype)
    out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    if not config.adapted:
        return out, None
    lora_hidden = _dropped(x, dropout_mask) @ a.t()
    return out.addmm_(lora_hidden, b.t(), alpha=config.scale), lora_hidden


def _held(tensor: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """Return a weight in ``compute``; quantized ones stay as they are until they are used."""
    return tensor if tensor is None or is_quantized(tensor) else tensor.to(compute)


def _widened(weight: Any, compute: torch.dtype) -> Tensor:
    """Return a weight as a plain tensor; a quantized one is widened for this use alone."""
    return widened(weight).to(compute) if is_quantized(weight) else weight


def _project_backward(
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    config: _Projection,
    lora_hidden: Any,
    dropout_mask: Tensor | None,
    grad_x: Any,
    needs_weight: bool,
    needs_x: bool,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Return the gradients of weight, bias, A and B, and that of ``x`` added to ``grad_x``."""
    # With m the mask of dropout (0 or 1) and h = (m * x) A^T, y = x W^T + b + scale h B^T. So
    #   dW = dy^T x            db = sum of dy over tokens
    #   dh = scale dy B        dA = dh^T (m * x)        dB = scale dy^T h
    #   dx = dy W + m * (dh A)
    weight, bias, a, b = weights
    results: list[Tensor | None] = [None] * 4
    if needs_weight:
        results[0] = grad.t() @ x
        results[1] = None if bias is None else grad.sum(0)
    if needs_x:
        weight = _widened(weight, grad.dtype)
        grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    if config.adapted:
        grad_hidden = (grad @ b).mul_(config.scale)
        results[2] = grad_hidden.t() @ _dropped(x, dropout_mask)
        results[3] = (lora_hidden.t() @ grad).mul_(config.scale).t()  # faster than dy^T h
        if needs_x and dropout_mask is None:
            grad_x.addmm_(grad_hidden, a)
        elif needs_x:
            grad_x.add_(_drop_(grad_hidden @ a, dropout_mask))
    return results, grad_x


def _dropout_masks(
    rows: int, projections: Sequence[Weights], configs: Sequence[_Projection]
) -> list[Tensor | None]:
    """Return what dropout removes from each adapter's input of ``rows`` tokens."""
    result: list[Tensor | None] = [None] * len(configs)
    dropping = [at for at, config in enumerate(configs) if config.dropout]
    if dropping:
        shapes = [(rows, projections[at][2].shape[1]) for at in dropping]
        found = draw_dropout(shapes, configs[dropping[0]].dropout, projections[0][0].device)
        for at, dropout_mask in zip(dropping, found, strict=True):
            result[at] = dropout_mask
    return result


def draw_dropout(
    shapes: Sequence[tuple[int, int]], probability: float, device: torch.device
) -> list[Tensor]:
    """Draw which elements of tensors of ``shapes`` dropout sets to 0, each with ``probability``.

    On the CPU the result is the flat positions of these elements. The distances between them follow
    the geometric distribution, so one random number per dropped element is enough. On other devices
    it is boolean masks, because the number of positions would have to be copied to the host.
    """
    if device.type != "cpu":
        masks = (torch.empty(shape, dtype=torch.bool, device=device) for shape in shapes)
        return [mask.bernoulli_(probability) for mask in masks]
    ends = [*itertools.accumulate(rows * columns for rows, columns in shapes)]
    parts, last = [], -1
    while last < ends[-1]:
        # The expected number of positions that are left, and six standard deviations more.
        expected = probability * (ends[-1] - last)
        uniform = torch.rand(int(expected + 6 * math.sqrt(expected)) + 1)
        # A geometric number from a uniform one: floor(log(1 - u) / log(1 - p)) + 1.
        scale = 1 / math.log1p(-probability)
        distances = uniform.neg_().log1p_().mul_(scale).to(torch.int64).add_(1)
        parts.append(distances.cumsum(0).add_(last))
        last = int(parts[-1][-1])
    positions = parts[0] if len(parts) == 1 else torch.cat(parts)
    cuts = [0, *torch.searchsorted(positions, torch.tensor(ends)).tolist()]
    starts = [0, *ends]
    return [positions[a:b] - start for a, b, start in zip(cuts, cuts[1:], starts, strict=False)]


def _dropped(x: Tensor, dropout_mask: Tensor | None) -> Tensor:
    """Return x after dropout, without the factor 1 / (1 - p)."""
    return x if dropout_mask is None else _drop_(x.clone(), dropout_mask)


def _drop_(tensor: Tensor, dropout_mask: Tensor) -> Tensor:
    """Set the elements drawn by `draw_dropout` to 0, in place."""
    if dropout_mask.dtype == torch.bool:
        return tensor.masked_fill_(dropout_mask, 0)
    tensor.view(-1).index_fill_(0, dropout_mask, 0)
    return tensor


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return RMSNorm of x [tokens, size], rounded like transformers' own; and 1 / RMS."""
    full = x.float()
    inverse = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
    inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    unit = (full * inverse).to(x.dtype)
    return (unit.mul_(weight) if unit.dtype == weight.dtype else unit * weight).to(dtype), inverse


def _rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    residual: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Any, Tensor | None]:
    """Return the gradients of x, added to the ``residual`` gradient, and of the weight."""
    # For one token x of n elements: r = (sum_i x_i^2 / n + eps)^(-1/2) and y_i = w_i x_i r.
    #   dw_i = sum over tokens of dy_i x_i r
    # Let g = w * dy, the gradient of x r. As dr/dx_j = -r^3 x_j / n,
    #   dx_j = g_j r + (sum_i g_i x_i) dr/dx_j = g_j r - x_j (g . x) r^3 / n
    full, grad = x.float(), grad.float()
    grad_x = grad_weight = None
    if needs_weight:
        grad_weight = (grad * full).mul_(inverse).sum(0)
    if needs_x:
        g = grad * weight
        factor = (g * full).sum(-1, keepdim=True)
        factor.mul_(inverse).mul_(inverse).mul_(inverse).div_(-x.shape[-1])
        grad_x = g.mul_(inverse).addcmul_(full, factor).add_(residual).to(x.dtype)
    return grad_x, grad_weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Return x [batch, tokens, heads, size] with rotary phases, or the gradient of that x."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return rotate(x, cos, sin, out, back=back)


def _attention(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, config: _LayerConfig
) -> Tensor:
    """Return attention [batch x tokens, heads x size]; ``ctx`` keeps what its backward reads."""
    if config.needs_grad and short_attention.suits(query):
        attended, ctx.attention = short_attention.forward(query, key, value, mask, config.scaling)
        return attended
    parts = [part.transpose(1, 2).detach() for part in (query, key, value)]
    groups = parts[0].shape[1] // parts[1].shape[1]
    with torch.set_grad_enabled(config.needs_grad):
        for part in parts:
            part.requires_grad_(config.needs_grad)
        queries, keys, values = parts
        if groups > 1:
            keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=config.scaling
        ).transpose(1, 2)
    if config.needs_grad:
        ctx.attention = (*parts, attended)
    return attended.detach().reshape(query.shape[0] * query.shape[1], -1)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of query, key and value [batch, tokens, heads, size]."""
    # For one head, with c the scaling and M the mask: S = c Q K^T + M, P = softmax(S) by rows,
    # O = P V. A row p of P depends on its row s of S by dp_i/ds_j = p_i (1[i = j] - p_j), so
    #   dV = P^T dO      dP = dO V^T
    #   dS = P * (dP - t) with t = sum over the row of dP * P, which equals that of dO * O
    #   dQ = c dS K      dK = c dS^T Q
    # Query heads that share keys and values add up their dK and dV. torch's kernel computes this:
    # it keeps O and the log-sum-exp of each row of S, and recomputes P from them block by block.
    if isinstance(ctx.attention, short_attention.Saved):
        return short_attention.backward(ctx.attention, grad)
    *parts, attended = ctx.attention
    return tuple(part.transpose(1, 2) for part in torch.autograd.grad(attended, parts, grad))
