"""Which tensors and hyperparameters a GGUF file of a checkpoint has; headers only, no torch.

`core.checkpoint.llama_cpp` chooses the architecture. ``deci`` rotates queries and keys as ``llama``
does, so their rows are reordered alike. Its blocks may lack attention (no heads); where the MLP is
missing, the file has one of `_ZERO_WIDTH` neurons whose weights are zero, because llama.cpp drops
the output of attention in a block without neurons. transformers rotates the two halves of a head
(``rotate_half``); llama.cpp's ``llama`` rotates neighbouring rows, so row i of the first half and
row i of the second are stored next to each other. Its ``qwen2`` and ``qwen3`` rotate halves as
transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from core.checkpoint import contents, families, llama_cpp
from core.checkpoint.headers import TensorIndex
from core.checkpoint.llama_cpp import BlockSizes
from core.errors import CheckpointError
from core.export import rope

Type = Literal["f32", "f16", "bf16", "q8_0"]
TYPES: tuple[Type, ...] = ("f32", "f16", "bf16", "q8_0")
QUANT_BLOCK = 32
"""Weights of a row that share one scale in q8_0."""
_QUANT_BYTES = 34
"""Bytes of such a group: 32 of one byte, and a float16 scale."""
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
ALIGNMENT = 32
"""Bytes; every tensor of a GGUF file starts at a multiple."""
_INTERLEAVED = ("llama", "deci")
"""Architectures that rotate neighbouring rows."""
_ZERO_WIDTH = 32
"""Neurons of an MLP of zeros: one group of q8_0."""
_READABLE = ("float32", "float16", "bfloat16", "float64")
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the file."""

    name: str
    """In llama.cpp's terms, e.g. ``blk.3.attn_q.weight``."""
    source: str
    """The checkpoint's tensor; empty for one that is computed, or all zeros."""
    shape: tuple[int, ...]
    type: Type
    heads: int = 0
    """Heads whose rows are reordered; 0 leaves the rows as they are."""
    zeros: bool = False
    """Whether all weights are zero: a part that the checkpoint does not have."""

    @property
    def bytes(self) -> int:
        """Size in the file, without the padding behind it."""
        count = math.prod(self.shape)
        if self.type == "q8_0":
            return count // QUANT_BLOCK * _QUANT_BYTES
        return count * _BYTES[self.type]


@dataclass(frozen=True)
class Layout:
    """The contents of a GGUF file, apart from the vocabulary."""

    architecture: str
    type: Type
    why_deci: str
    """Why the blocks need ``deci``; empty for every other architecture."""
    values: dict[str, Any]
    """Hyperparameters by their keys without the architecture; lists have one number per block."""
    tensors: tuple[OutTensor, ...]
    rope_factors: tuple[float, ...]
    """Divisors of the rotary frequencies (rope_freqs.weight); empty without."""
    vocab: int
    notes: tuple[str, ...]
    """What differs from the checkpoint, or was decided."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors with their padding."""
        return sum(-(-tensor.bytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensors)


def plan(config: Mapping[str, Any], index: TensorIndex | None, kind: Type) -> Layout:
    """Return the layout of a checkpoint's GGUF file with weights of type ``kind``.

    Without weights (``index`` is None) shapes are computed from the config. Raises
    `CheckpointError` if llama.cpp cannot compute the model, with the reason.
    """
    family = families.of(config)
    used = contents.compare(config, index).used if index else families.expected_shapes(config)
    stored = {index.entries[name].dtype for name in used} if index else set()
    unreadable = sorted(stored - set(_READABLE))
    if unreadable:
        raise CheckpointError(
            f"The weights are stored as {unreadable[0]}, which cannot be converted.",
            "Give a checkpoint in bfloat16, float16 or float32.",
        )
    llama_cpp.check_activation(config)
    blocks = llama_cpp.sizes(config, used)
    architecture, why = llama_cpp.architecture(config, used)
    rotary = rope.read(config, architecture)
    tensors = tuple(_tensors(used, kind, architecture, blocks))
    if not all(block.heads and block.neurons for block in blocks):
        stored_blocks = blocks
        blocks = tuple(_filled(number, block) for number, block in enumerate(blocks))
        tensors = (*_of_parts(tensors, stored_blocks), *_zeros(config, stored_blocks, blocks, kind))
    if rotary.factors:
        freqs = OutTensor("rope_freqs.weight", "", (len(rotary.factors),), "f32")
        tensors = (*tensors, freqs)
    limit, window_notes = _context(config, rotary.context)
    values = _values(config, architecture, blocks) | {"context_length": limit} | rotary.values
    notes = [*window_notes, *rotary.notes, *_row_notes(tensors, kind)]
    if family.name == "mistral" and architecture == "llama":
        notes.append("llama.cpp runs Mistral as architecture llama.")
    notes += _zero_notes(tensors)
    vocab = used["model.embed_tokens.weight"][0]
    return Layout(architecture, kind, why, values, tensors, rotary.factors, vocab, tuple(notes))


def default_type(dtype: str) -> Type:
    """Return the 16-bit type that loses least of weights stored as ``dtype``."""
    return "bf16" if dtype == "bfloat16" else "f16"


# ----------------------------------------------------------------------------------------- tensors


def _name(source: str) -> str:
    """Return llama.cpp's name of a tensor."""
    module, _, kind = source.rpartition(".")
    block = families.block_of(source)
    if block is None:
        return f"{_TOP[module]}.{kind}"
    return f"blk.{block}.{_MODULES[module.removeprefix(f'model.layers.{block}.')]}.{kind}"


def _tensors(
    used: Mapping[str, families.Shape], kind: Type, architecture: str, blocks: Sequence[BlockSizes]
) -> Iterator[OutTensor]:
    for source in sorted(used, key=_place):
        shape, name = used[source], _name(source)
        block = families.block_of(source)
        heads = 0
        if block is not None and architecture in _INTERLEAVED:
            heads = {
                "attn_q": blocks[block].heads, "attn_k": blocks[block].kv_heads
            }.get(name.split(".")[2], 0)  # fmt: skip
        yield OutTensor(name, source, shape, _type_of(shape, kind), heads)


def _filled(number: int, block: BlockSizes) -> BlockSizes:
    """Return the sizes of a block in the file: those of a part that it lacks are filled in.

    llama.cpp reads the width of all heads off block 0, so that one keeps a head, of zeros.
    """
    if not block.neurons:
        return replace(block, neurons=_ZERO_WIDTH)
    return replace(block, heads=1, kv_heads=1) if not block.heads and number == 0 else block


def _of_parts(tensors: Sequence[OutTensor], blocks: Sequence[BlockSizes]) -> Iterator[OutTensor]:
    """Yield the tensors that llama.cpp reads: no attention norm of blocks without attention."""
    bare = {f"blk.{b}.attn_norm.weight" for b, block in enumerate(blocks) if not block.heads and b}
    yield from (tensor for tensor in tensors if tensor.name not in bare)


def _zeros(
    config: Mapping[str, Any],
    stored: Sequence[BlockSizes],
    filled: Sequence[BlockSizes],
    kind: Type,
) -> Iterator[OutTensor]:
    """Yield tensors of zeros for what ``filled`` has and ``stored`` does not."""
    hidden, width = families.setting(config, "hidden_size"), families.setting(config, "head_dim")
    for number, (had, has) in enumerate(zip(stored, filled, strict=True)):
        shapes: dict[str, tuple[int, int]] = {}
        if has.heads > had.heads:
            rows = has.heads * width
            shapes |= {name: (rows, hidden) for name in ("attn_q", "attn_k", "attn_v")}
            shapes["attn_output"] = (hidden, rows)
        if has.neurons > had.neurons:
            shapes |= {name: (has.neurons, hidden) for name in ("ffn_gate", "ffn_up")}
            shapes["ffn_down"] = (hidden, has.neurons)
        for name, shape in shapes.items():
            yield OutTensor(
                f"blk.{number}.{name}.weight", "", shape, _type_of(shape, kind), zeros=True
            )


def _place(source: str) -> tuple[int, str]:
    block = families.block_of(source)
    return (-1 if block is None else block, source)


def _type_of(shape: families.Shape, kind: Type) -> Type:
    """Return the type that a tensor is stored in: vectors (norms, biases) stay float32."""
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % QUANT_BLOCK else kind


def _zero_notes(tensors: Sequence[OutTensor]) -> list[str]:
    mlp = sum(tensor.zeros and "ffn_down" in tensor.name for tensor in tensors)
    head = any(tensor.zeros and "attn_q" in tensor.name for tensor in tensors)
    notes = []
    if mlp:
        notes.append(
            f"{mlp:,} block{'s' * (mlp > 1)} without an MLP: the file has {_ZERO_WIDTH} neurons of "
            "zeros there, as llama.cpp cannot run attention alone."
        )
    if head:
        notes.append(
            "Block 0 has no attention: the file has one head of zeros there, as llama.cpp reads "
            "the width of all heads off that block; it takes a key/value cache."
        )
    return notes


def _row_notes(tensors: Sequence[OutTensor], kind: Type) -> list[str]:
    odd = [t for t in tensors if len(t.shape) == 2 and t.type != kind]
    if not odd:
        return []
    widths = ", ".join(f"{width:,}" for width in sorted({t.shape[1] for t in odd}))
    return [
        f"{len(odd):,} of {sum(len(t.shape) == 2 for t in tensors):,} matrices are stored as f16: "
        f"their rows of {widths} weights do not divide by {QUANT_BLOCK}, as {kind} needs."
    ]


# ---------------------------------------------------------------------------------- hyperparameters


def _values(
    config: Mapping[str, Any], architecture: str, blocks: Sequence[BlockSizes]
) -> dict[str, Any]:
    def sizes(numbers: list[int]) -> int | list[int]:
        return numbers if architecture == "deci" else numbers[0]

    width = families.setting(config, "head_dim")
    return {
        "block_count": len(blocks),
        "embedding_length": families.setting(config, "hidden_size"),
        "vocab_size": families.setting(config, "vocab_size"),
        "feed_forward_length": sizes([b.neurons for b in blocks]),
        "attention.head_count": sizes([b.heads for b in blocks]),
        "attention.head_count_kv": sizes([b.kv_heads for b in blocks]),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": width,
    }


def _context(config: Mapping[str, Any], context: int) -> tuple[int, list[str]]:
    """Return the context length, limited to a sliding window that llama.cpp does not apply."""
    window = config.get("sliding_window")
    family = families.of(config).name
    if family == "mistral" and "sliding_window" not in config:
        window = 4096
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" not in kinds:
        window = None
    if family == "llama" or not isinstance(window, int) or window >= context:
        return context, []
    return window, [
        f"Attention is limited to a sliding window of {window:,} tokens, which llama.cpp does not "
        f"apply to this architecture: the context length is set to {window:,} (not {context:,}), "
        "within which both compute the same."
    ]
