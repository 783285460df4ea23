"""Inference through one block and through the head, written for many rows at a time.

The same arithmetic as the stock decoder layer, with the weights prepared once and used for every
row: one product for query, key and value, one for gate and up, residuals added by the product
itself, scratch memory reused. On a CPU without native instructions for them, bfloat16 and float16
weights are upcast to float32, block by block: this is exact, and several times faster there than
computing in 16 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.importance.capacity import CPU_TOKENS, GPU_TOKENS, HEAD_TOKENS
from core.model.arithmetic import rms_norm, rotate
from core.model.blocks import BlockView

LOGITS_CPU = 2**21
"""Logits held at once on a CPU: 8 MiB in float32. Chosen to fit a cache, not measured."""
LOGITS_GPU = 2**28
"""The same on a GPU: 1 GiB in float32. Chosen, not measured."""
__all__ = (
    "CPU_TOKENS", "GPU_TOKENS", "HEAD_TOKENS", "LOGITS_CPU", "LOGITS_GPU",
    "Channels", "FastBlock", "Head", "Scratch", "StockBlock", "chunk_rows", "is_plain",
)  # fmt: skip


def chunk_rows(device: torch.device, tokens: int) -> int:
    """Return how many rows of ``tokens`` go through a block together.

    On a CPU, a chunk's activations should fit in the cache; on a GPU, it should fill the device.
    """
    budget = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return max(1, round(budget / tokens))


class Scratch:
    """Buffers that are reused between calls: fresh large ones cost a page fault per 4 KiB."""

    def __init__(self) -> None:
        """Start empty."""
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialised tensor of ``shape`` with the dtype and device of ``like``."""
        size = 1
        for extent in shape:
            size *= extent
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


def is_plain(layer: Any) -> bool:
    """Whether ``layer`` is a decoder layer, or a part of one, with the arithmetic implemented here.

    A part is missing if its attribute is there and None.
    """
    attention, mlp = getattr(layer, "self_attn", layer), getattr(layer, "mlp", layer)
    parts: list[Any] = []
    if attention is not None:
        parts += [getattr(attention, n, None) for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    if mlp is not None:
        parts += [getattr(mlp, n, None) for n in ("gate_proj", "up_proj", "down_proj")]
    norms = [getattr(layer, n, None) for n in ("input_layernorm", "post_attention_layernorm")]
    return (
        all(type(part) is nn.Linear for part in parts)
        and all(type(norm).__name__.endswith("RMSNorm") for norm in norms)
        and (mlp is None or hasattr(mlp, "act_fn"))
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    )


@dataclass(frozen=True)
class Channels:
    """What a narrower block keeps, by numbers in the whole block; None: all."""

    neurons: Tensor | None = None
    queries: Tensor | None = None
    """Channels of the queries, and inputs of the attention's output projection."""
    keys: Tensor | None = None
    """Channels of the keys, and of the values."""
    o_bias: Tensor | None = None
    """Added to the bias of the attention's output projection, [hidden]."""
    down_bias: Tensor | None = None
    """The same of the MLP's."""

    def inputs(self, part: int) -> Tensor | None:
        """Return the input channels of the attention's (0) or the MLP's (1) output projection."""
        return self.neurons if part else self.queries


class FastBlock:
    """One block to apply in place to many rows; holds prepared copies of its weights.

    A part that the block lacks is one without channels: it adds nothing, and is not observed.
    Memory: a second copy of the block's weights (q, k, v and gate, up joined), freed with it.
    """

    def __init__(self, view: BlockView, block: int, dtype: torch.dtype, scratch: Scratch) -> None:
        """Prepare block ``block`` of ``view`` for activations of ``dtype``."""
        self.view, self.block, self.scratch = view, block, scratch
        self.observe: Callable[[str, Tensor], None] | None = None
        """Called with the output projections' inputs: ("o" or "down", [tokens, channels])."""
        layer: Any = view.layer(block)
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = int(attention.head_dim) if attention is not None else 1
        self.scale = float(attention.scaling) if attention is not None else 1.0
        self.act: Any = mlp.act_fn if mlp is not None else None
        self.is_silu = isinstance(self.act, nn.SiLU) or type(self.act).__name__ == "SiLUActivation"

        def joined(*parts: Any) -> tuple[Tensor, Tensor | None]:
            sizes = [part.weight.shape[0] for part in parts]
            first = parts[0].weight
            weight = torch.empty(sum(sizes), first.shape[1], dtype=dtype, device=first.device)
            for piece, part in zip(weight.split(sizes), parts, strict=True):
                piece.copy_(part.weight.detach())  # without a copy in between
            biases = [part.bias for part in parts]
            if all(bias is None for bias in biases):
                return weight, None
            filled = [
                part.weight.new_zeros(part.out_features) if part.bias is None else part.bias
                for part in parts
            ]
            return weight, torch.cat([bias.detach().to(dtype) for bias in filled])

        nothing = torch.empty(view.hidden_size, 0, dtype=dtype, device=view.device)
        self.sizes = [0, 0]
        self.qkv: tuple[Tensor, Tensor | None] = (nothing, None)
        self.o = self.gate_up = self.down = self.qkv
        if attention is not None:
            self.sizes = [p.out_features for p in (attention.q_proj, attention.k_proj)]
            self.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
            self.o = joined(attention.o_proj)
        if mlp is not None:
            self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
            self.down = joined(mlp.down_proj)
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.qk_norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))

    def attention_(self, hidden: Tensor) -> None:
        """Add the attention's output to ``hidden`` [rows, tokens, hidden], in place."""
        if not self.sizes[0]:
            return
        rows, tokens, width = hidden.shape
        flat = hidden.view(-1, width)
        x = rms_norm(self.norms[0], flat, self.scratch.get("norm", tuple(flat.shape), flat))
        joint = _linear(x, self.qkv, self.scratch, "qkv")
        joint = joint.view(rows, tokens, -1, self.head_dim).transpose(1, 2)
        queries = self.sizes[0] // self.head_dim
        keys = self.sizes[1] // self.head_dim
        q, k, v = joint.split([queries, keys, joint.shape[1] - queries - keys], dim=1)
        cos, sin = self.view.rotary(tokens, hidden.dtype, hidden.device)
        q = self._turn(q, cos, sin, self.qk_norms[0], "q")
        k = self._turn(k, cos, sin, self.qk_norms[1], "k")
        mask = self.view.mask(self.block, tokens, hidden.device)
        if queries != keys:
            k, v = _repeat(k, queries // keys), _repeat(v, queries // keys)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and tokens > 1, scale=self.scale
        )
        mixed = mixed.transpose(1, 2).reshape(rows * tokens, -1)
        if self.observe:
            self.observe("o", mixed)
        _add_linear_(flat, mixed, self.o)

    def mlp_(self, hidden: Tensor) -> None:
        """Add the feed-forward output to ``hidden`` [rows, tokens, hidden], in place."""
        if not self.down[0].shape[1]:
            return
        flat = hidden.view(-1, hidden.shape[-1])
        x = rms_norm(self.norms[1], flat, self.scratch.get("norm", tuple(flat.shape), flat))
        gate, up = _linear(x, self.gate_up, self.scratch, "gate_up").chunk(2, dim=-1)
        gate = F.silu(gate, inplace=True) if self.is_silu else self.act(gate)
        product = gate.mul_(up)
        if self.observe:
            self.observe("down", product)
        _add_linear_(flat, product, self.down)

    def thinned(self, kept: Channels) -> FastBlock:
        """Return this block with only the channels ``kept``; holds a copy of what is cut."""
        other = copy.copy(self)
        other.observe = None
        if kept.neurons is not None:
            at = kept.neurons.to(self.down[0].device)
            neurons = self.down[0].shape[1]
            other.gate_up = _picked(self.gate_up, torch.cat([at, at + neurons]))
            other.down = (self.down[0][:, at].contiguous(), self.down[1])
        if kept.queries is not None and kept.keys is not None:
            queries, keys = (x.to(self.o[0].device) for x in (kept.queries, kept.keys))
            low, size = self.sizes
            other.qkv = _picked(self.qkv, torch.cat([queries, keys + low, keys + low + size]))
            other.o = (self.o[0][:, queries].contiguous(), self.o[1])
            other.sizes = [len(queries), len(keys)]
        other.o = _shifted(other.o, kept.o_bias)
        other.down = _shifted(other.down, kept.down_bias)
        return other

    def narrowed(self, kept: Sequence[int]) -> Callable[[Tensor], None]:
        """Return `mlp_` with only the neurons ``kept``; holds a copy of their weights."""
        return self.thinned(Channels(torch.tensor(list(kept)))).mlp_

    def leave_out(self, o: Tensor, down: Tensor) -> None:
        """Ignore these channels of the output projections' inputs from now on."""
        for (weight, _), columns in ((self.o, o), (self.down, down)):
            weight[:, columns.to(weight.device)] = 0  # a copy, not the model's own weights

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, norm: Any, name: str) -> Tensor:
        """Return ``x`` [rows, heads, tokens, head width], normed if asked, with rotary phase."""
        if norm is not None:
            x = rms_norm(norm, x, torch.empty_like(x))
        return rotate(x, cos, sin, self.scratch.get(name, tuple(x.shape), x))


class StockBlock:
    """A block run by its own module, for layers that are not plain. Weights are upcast once."""

    def __init__(self, view: BlockView, block: int, dtype: torch.dtype) -> None:
        """Prepare block ``block`` of ``view`` for activations of ``dtype``."""
        self.view, self.block = view, block
        layer = view.layer(block)
        tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
        self.tensors = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
        self.layer = layer

    def __call__(self, hidden: Tensor) -> None:
        """Replace ``hidden`` by the block's output, in place."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.layer, self.tensors, args, kwargs)

        hidden.copy_(self.view.call_layer(call, self.block, hidden))


def _linear(x: Tensor, pair: tuple[Tensor, Tensor | None], scratch: Scratch, name: str) -> Tensor:
    weight, bias = pair
    out = scratch.get(name, (x.shape[0], weight.shape[0]), x)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _shifted(
    pair: tuple[Tensor, Tensor | None], added: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if added is None:
        return pair
    own = added.to(pair[0])
    return pair[0], own if pair[1] is None else pair[1] + own


def _picked(pair: tuple[Tensor, Tensor | None], rows: Tensor) -> tuple[Tensor, Tensor | None]:
    weight, bias = pair
    return weight[rows], None if bias is None else bias[rows]


def _add_linear_(target: Tensor, x: Tensor, pair: tuple[Tensor, Tensor | None]) -> None:
    target.addmm_(x, pair[0].t())
    if pair[1] is not None:
        target.add_(pair[1])


def _repeat(x: Tensor, times: int) -> Tensor:
    """Repeat each key/value head of ``x`` [rows, heads, tokens, width] ``times`` in a row."""
    rows, heads, tokens, width = x.shape
    return (
        x[:, :, None]
        .expand(rows, heads, times, tokens, width)
        .reshape(rows, heads * times, tokens, width)
    )


class Head:
    """The final norm, the output matrix and the loss, without materializing all logits."""

    def __init__(self, view: BlockView, dtype: torch.dtype, scratch: Scratch) -> None:
        """Prepare the head of ``view`` for hidden states of ``dtype``."""
        self.view, self.dtype, self.scratch = view, dtype, scratch

    def normed_(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to ``hidden`` in place and return it."""
        return rms_norm(self.view.final_norm, hidden, hidden)

    def losses(self, normed: Tensor, targets: Tensor, check: Any = None) -> Tensor:
        """Return the negative log-likelihood [n], float32, of ``targets`` [n].

        ``normed`` is [n, hidden]. The vocabulary is processed in chunks, each upcast once, with a
        running maximum and sum of exponentials per position; ``check`` is called per chunk.
        """
        weight = self.view.head_weight.detach()
        count, vocabulary = normed.shape[0], weight.shape[0]
        on_cpu = normed.device.type == "cpu"
        step = min(count, CPU_TOKENS if on_cpu else GPU_TOKENS)
        piece = max(256, min(vocabulary, (LOGITS_CPU if on_cpu else LOGITS_GPU) // max(step, 1)))
        top = torch.full((count,), -torch.inf, dtype=torch.float32, device=normed.device)
        total = torch.zeros_like(top)
        at_target = torch.zeros_like(top)
        for low in range(0, vocabulary, piece):
            part = weight[low : low + piece].to(self.dtype)
            for start in range(0, count, step):
                if check is not None:
                    check()
                rows = slice(start, start + step)
                x = normed[rows]
                logits = self.scratch.get("logits", (x.shape[0], part.shape[0]), x)
                torch.mm(x, part.t(), out=logits)
                logits = logits.float()
                local = targets[rows] - low
                here = (local >= 0) & (local < part.shape[0])
                picked = logits.gather(1, local.clamp(0, part.shape[0] - 1)[:, None])[:, 0]
                at_target[rows] = torch.where(here, picked, at_target[rows])
                peak = torch.maximum(top[rows], logits.amax(1))
                total[rows] *= torch.exp(top[rows] - peak)
                total[rows] += logits.sub_(peak[:, None]).exp_().sum(1)
                top[rows] = peak
        return top + total.log() - at_target

    def divergences(
        self, dense: Tensor, normed: Tensor, targets: Tensor, check: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return (negative log-likelihood of ``targets``, KL from dense), each [states, n].

        ``dense`` is [n, hidden], ``normed`` [states, n, hidden], ``targets`` [n]. KL(p || q) is
        sum_v p(v) (z_p(v) - z_q(v)) - log Z_p + log Z_q. Numerator and normalisers add up while the
        vocabulary passes in pieces: one piece of dense logits serves every state.
        """
        weight = self.view.head_weight.detach()
        (count, _), vocabulary, device = dense.shape, weight.shape[0], dense.device
        budget = LOGITS_CPU if device.type == "cpu" else LOGITS_GPU
        piece = max(256, min(vocabulary, budget // max(count, 1)))
        exact = torch.float32 if device.type == "mps" else torch.float64
        states = len(normed)
        top = torch.full((states + 1, count), -torch.inf, device=device)  # the last is dense
        total = torch.zeros(states + 1, count, dtype=exact, device=device)
        apart = torch.zeros(states, count, dtype=exact, device=device)
        at_target = torch.zeros(states, count, device=device)

        def add(at: int, logits: Tensor) -> tuple[Tensor, Tensor]:
            """Count a piece in; return its exponentials, and how much what was before shrinks."""
            peak = torch.maximum(top[at], logits.amax(1))
            shrink = torch.exp(top[at] - peak)
            powers = torch.exp(logits - peak[:, None])
            total[at] = total[at] * shrink + powers.sum(1)
            top[at] = peak
            return powers, shrink

        for low in range(0, vocabulary, piece):
            part = weight[low : low + piece].to(self.dtype)
            of_dense = torch.mm(dense, part.t()).float()
            powers, shrink = add(states, of_dense)
            apart *= shrink
            local = targets - low
            here = (local >= 0) & (local < len(part))
            place = local.clamp(0, len(part) - 1)[:, None]
            for at, x in enumerate(normed):
                if check is not None:
                    check()
                logits = self.scratch.get("logits", (count, len(part)), x)
                logits = torch.mm(x, part.t(), out=logits).float()
                picked = logits.gather(1, place)[:, 0]
                at_target[at] = torch.where(here, picked, at_target[at])
                add(at, logits)
                apart[at] += torch.sub(of_dense, logits, out=logits).mul_(powers).sum(1)
        log_total = total.log() + top
        nll = log_total[:-1] - at_target
        kl = apart / total[-1] - log_total[-1] + log_total[:-1]
        return nll, kl
