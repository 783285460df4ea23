"""Estimated cost of a model from its shapes alone: memory, and latency as a roofline.

Torch-free, so that a page can update figures while a slider moves. A decoding step reads every
weight once, and the key/value cache once, plus two more passes to extend it. The device needs the
longer of data movement and arithmetic, plus the time of its small kernels. Preparing each kernel
costs the host time: on a CPU this adds to the computing; a GPU computes while the host prepares the
next kernels, so that a step takes the longer of the two. All rates and overheads are measured
(`Rates`).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from core.checkpoint import quantized
from core.checkpoint.drop import Removal
from core.runs.dtypes import BYTES

if TYPE_CHECKING:
    from core.checkpoint.headers import CheckpointInfo

ROUGH_PCT = 30.0
"""Median error above which estimates are called rough. A convention, not measured."""
CACHE_MOVES = 3
"""A step's passes over the cache: one read and one write to extend it, one read by attention."""
SAMPLING_BYTES = 24
"""Bytes per logit during top-k and top-p sampling: float32 logits, their sorted copy,
probabilities and cumulative probabilities (4 each), and the sort indices (8)."""


class Shapes(Protocol):
    """The part of `core.checkpoint.headers.CheckpointInfo` that is needed here."""

    @property
    def hidden(self) -> int:
        """Hidden size."""

    @property
    def vocab(self) -> int:
        """Rows of the head."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""

    @property
    def parameters(self) -> int:
        """Total number of elements."""

    @property
    def parts(self) -> dict[str, int]:
        """Elements of embedding, blocks, norm and head."""

    @property
    def block_shapes(self) -> tuple[dict[str, int], ...]:
        """heads, kv_heads and intermediate of each block."""


@dataclasses.dataclass(frozen=True)
class BlocksLeft:
    """The shapes of a checkpoint without some of its blocks or their parts; a `Shapes`."""

    hidden: int
    vocab: int
    head_dim: int
    tied: bool
    parameters: int
    parts: dict[str, int]
    block_shapes: tuple[dict[str, int], ...]


def without(info: CheckpointInfo, removal: Removal | Iterable[int]) -> BlocksLeft:
    """Return the shapes of ``info`` without ``removal``, blocks or parts of them too."""
    gone = removal if isinstance(removal, Removal) else Removal(tuple({*removal}))
    lost = sum(info.block_parameters[block] for block in gone.drop)
    lost += sum(info.part_parameters(block, part) for block, part in gone.parts)
    lost += sum(info.narrowing(block, neurons) for block, neurons in gone.width)
    shapes, narrow = [], gone.neurons
    for block, shape in enumerate(info.block_shapes):
        if block in gone.drop:
            continue
        left = dict(shape)
        left |= {"heads": 0, "kv_heads": 0} if block in gone.attention else {}
        left |= {"intermediate": 0} if block in gone.mlp else {}
        left |= {"intermediate": narrow[block]} if block in narrow else {}
        shapes.append(left)
    return BlocksLeft(
        info.hidden,
        info.vocab,
        info.head_dim,
        info.tied,
        info.parameters - lost,
        {**info.parts, "blocks": info.parts["blocks"] - lost},
        tuple(shapes),
    )


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured rates and overheads of one device in one dtype."""

    bandwidth_bytes_per_s: float
    """Rate at which a matrix-vector product reads weights."""
    matmul_flops_per_s: float
    """Rate of a square matrix product."""
    block_overhead_s: float = 0.0
    """A decoding step's overhead per block, beyond bytes and operations, for one sequence. On an
    asynchronous device, the host's time to launch a block's kernels. See `blocks_of_overhead`."""
    step_overhead_s: float = 0.0
    """A decoding step's overhead outside the blocks."""
    sampling_s_per_logit: float = 0.0
    """Time to sort for top-k and top-p, per logit."""
    activation_s: float = 0.0
    """Time per element of an activation in each pass over it (`activations`)."""
    generation_overhead_s: float = 0.0
    """A generation's overhead beyond its steps."""
    dtype: str = "float32"
    asynchronous: bool = False
    """Whether the device computes while the host launches further kernels (CUDA, MPS)."""


def mean_rates(found: Sequence[Rates]) -> Rates:
    """Return the mean of several measurements of one device in one dtype."""
    kept = ("dtype", "asynchronous")
    fields = [f.name for f in dataclasses.fields(Rates) if f.name not in kept]
    means = {name: statistics.fmean(getattr(r, name) for r in found) for name in fields}
    return Rates(**means, dtype=found[0].dtype, asynchronous=found[0].asynchronous)


def weight_bytes(info: Shapes, dtype: str) -> int:
    """Return the bytes of all parameters in ``dtype``; tied embeddings count once.

    Quantized weights take what they are stored in.
    """
    return quantized.stored_bytes(
        info.parameters, getattr(info, "quantization", None), BYTES[dtype]
    )


def kv_bytes(info: Shapes, batch: int, context: int, dtype: str) -> int:
    """Return the bytes of keys and values of ``batch`` sequences of ``context`` tokens."""
    heads = sum(shape["kv_heads"] for shape in info.block_shapes)
    return 2 * heads * info.head_dim * batch * context * BYTES[dtype]


def activation_bytes(info: Shapes, batch: int, input_tokens: int, context: int, dtype: str) -> int:
    """Return the estimated peak of memory other than weights and cache.

    This is the larger of the prompt's widest block (its hidden state twice, gate, up and their
    product) and a step's logits during sampling, plus one block's cache, which is copied when it
    grows.
    """
    width = BYTES[dtype]
    widest = max((s["intermediate"] for s in info.block_shapes), default=0)
    heads = max((s["kv_heads"] for s in info.block_shapes), default=0)
    prompt = batch * input_tokens * (2 * info.hidden + 3 * widest) * width
    sampling = batch * info.vocab * (SAMPLING_BYTES + width)
    return max(prompt, sampling) + 2 * heads * info.head_dim * batch * context * width


def memory_bytes(
    info: Shapes, batch: int, input_tokens: int, output_tokens: int, dtype: str
) -> dict[str, int]:
    """Return weights, key/value cache, activations and their sum, at the end of generation."""
    context = input_tokens + output_tokens
    parts = {
        "weights": weight_bytes(info, dtype),
        "kv_cache": kv_bytes(info, batch, context, dtype),
        "activations": activation_bytes(info, batch, input_tokens, context, dtype),
    }
    return {**parts, "total": sum(parts.values())}


def largest_batch(
    info: Shapes, capacity_bytes: float, input_tokens: int, output_tokens: int, dtype: str
) -> int:
    """Return the largest batch whose estimated memory fits ``capacity_bytes``; 0 if none does."""
    empty = memory_bytes(info, 0, input_tokens, output_tokens, dtype)["total"]
    each = memory_bytes(info, 1, input_tokens, output_tokens, dtype)["total"] - empty
    return max(0, int((capacity_bytes - empty) // each)) if each else 0


def _read_per_step(info: Shapes) -> int:
    """Return the parameters that a step reads: all but the embedding, unless it is the head."""
    return info.parameters - (0 if info.tied else info.parts["embedding"])


def activations(info: Shapes) -> int:
    """Return the elements that one token's kernels pass on: norms, rotations, gates, sums.

    Counted for the LLaMA family: per block, twelve passes over the hidden state, six over queries
    and keys, three over the MLP's neurons.
    """
    halves = sum((s["heads"] > 0) + (s["intermediate"] > 0) for s in info.block_shapes)
    return 6 * info.hidden * halves + sum(
        6 * (s["heads"] + s["kv_heads"]) * info.head_dim + 3 * s["intermediate"]
        for s in info.block_shapes
    )


ATTENTION_SHARE = 23 / 34
"""Attention's share of a block's kernels in a decoding step of transformers' LLaMA, counted."""


def blocks_of_overhead(info: Shapes) -> float:
    """Return the overhead of all blocks in whole blocks: one without a part takes its share."""
    return sum(
        ATTENTION_SHARE * (s["heads"] > 0) + (1 - ATTENTION_SHARE) * (s["intermediate"] > 0)
        for s in info.block_shapes
    )


def generation_flops(info: Shapes, batch: int, input_tokens: int, output_tokens: int) -> float:
    """Return the operations of one generation: the prompt, then one step for each further token.

    The head computes one position of a step.
    """
    prompt = step_flops(info, batch, input_tokens / 2, input_tokens)
    middle = input_tokens + output_tokens / 2
    return prompt + (output_tokens - 1) * step_flops(info, batch, middle)


def step_flops(info: Shapes, batch: int, context: float, tokens: int = 1) -> float:
    """Return the operations of a forward pass over ``tokens`` new tokens of every sequence."""
    head = info.vocab * info.hidden
    body = _read_per_step(info) - head
    attention = sum(4 * s["heads"] * info.head_dim * context for s in info.block_shapes)
    return batch * (tokens * (2.0 * body + attention) + 2.0 * head)


def step_s(info: Shapes, rates: Rates, batch: int, context: int, tokens: int = 1) -> float:
    """Return the seconds of one forward pass over ``tokens`` new tokens per sequence.

    The step's own overhead always counts in full: generation waits for each step's token.
    """
    width = BYTES[rates.dtype]
    head = info.vocab * info.hidden
    body = _read_per_step(info) - head
    flops = step_flops(info, batch, context, tokens)
    moved = (body + head) * width + CACHE_MOVES * kv_bytes(info, batch, context, rates.dtype)
    device = max(flops / rates.matmul_flops_per_s, moved / rates.bandwidth_bytes_per_s)
    device += batch * tokens * activations(info) * rates.activation_s
    device += batch * info.vocab * rates.sampling_s_per_logit
    host = blocks_of_overhead(info) * rates.block_overhead_s
    return rates.step_overhead_s + (max(device, host) if rates.asynchronous else device + host)


def first_token_s(info: Shapes, rates: Rates, batch: int, input_tokens: int = 12) -> float:
    """Return the seconds until the first token is generated."""
    prompt = step_s(info, rates, batch, input_tokens, input_tokens)
    return rates.generation_overhead_s + prompt


def latency_s(
    info: Shapes, rates: Rates, batch: int, input_tokens: int = 12, output_tokens: int = 128
) -> float:
    """Return the seconds of one whole generation: the prompt, then one step per token."""
    middle = input_tokens + output_tokens / 2  # a step's cost is linear in the context
    rest = (output_tokens - 1) * step_s(info, rates, batch, int(middle))
    return first_token_s(info, rates, batch, input_tokens) + rest


def latency_ms(
    info: Shapes, rates: Rates, batch: int, input_tokens: int = 12, output_tokens: int = 128
) -> float:
    """Return `latency_s` in milliseconds."""
    return 1000.0 * latency_s(info, rates, batch, input_tokens, output_tokens)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of estimates against measurements."""

    points: int = 0
    median_error_pct: float | None = None
    """Median of abs(estimate / measured - 1); None without points."""
    worst_error_pct: float | None = None
    rough: bool | None = None
    """Whether the median is above `ROUGH_PCT`."""


def errors(pairs: Iterable[tuple[float, float]]) -> Errors:
    """Return the errors of estimates, over (estimated, measured) pairs."""
    off = [100.0 * abs(e / m - 1.0) for e, m in pairs if m > 0]
    if not off:
        return Errors()
    middle = statistics.median(off)
    return Errors(len(off), middle, max(off), middle > ROUGH_PCT)
