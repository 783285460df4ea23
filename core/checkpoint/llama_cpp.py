"""Which of llama.cpp's architectures a model needs, from its config and shapes alone.

llama.cpp knows LLaMA, Mistral (as ``llama``), Qwen2 and Qwen3. These architectures give all blocks
the same shape; only ``deci`` (Nemotron's) reads head counts and MLP widths as one number per block,
so that is where blocks of individual shapes go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.checkpoint import families
from core.errors import CheckpointError
from core.words import block_ranges

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Family -> its architecture, if all blocks have the same shape."""
_READ_BIAS = {"qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3": ()}
"""Projections whose bias llama.cpp's architecture reads; llama and deci read all of them."""


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of one block; 0 for a part that it lacks."""

    heads: int
    kv_heads: int
    neurons: int


def sizes(
    config: Mapping[str, Any], shapes: Mapping[str, families.Shape]
) -> tuple[BlockSizes, ...]:
    """Return the sizes of every block, from the shapes of the model's tensors."""
    return tuple(_sizes(config, shapes))


def _sizes(config: Mapping[str, Any], shapes: Mapping[str, families.Shape]) -> Iterator[BlockSizes]:
    width = families.setting(config, "head_dim")
    for block in range(families.setting(config, "num_hidden_layers")):
        q, k, gate = (
            shapes.get(f"model.layers.{block}.{module}.weight", (0,))[0]
            for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
        )
        yield BlockSizes(q // width, k // width, gate)


def differences(blocks: Sequence[BlockSizes]) -> str:
    """Return how the blocks differ in shape, as the end of "its blocks have"; empty if alike."""
    lacking = {
        "attention": [number for number, block in enumerate(blocks) if not block.heads],
        "MLP": [number for number, block in enumerate(blocks) if not block.neurons],
    }
    missing = [f"no {part} in {block_ranges(found)}" for part, found in lacking.items() if found]
    if missing:
        return f"different parts ({'; '.join(missing)})"
    for what, found in (
        ("query heads", {b.heads for b in blocks}),
        ("key/value heads", {b.kv_heads for b in blocks}),
        ("MLP neurons", {b.neurons for b in blocks}),
    ):
        if len(found) > 1:
            return f"{min(found):,} to {max(found):,} {what}"
    return ""


def architecture(
    config: Mapping[str, Any], shapes: Mapping[str, families.Shape]
) -> tuple[str, str]:
    """Return llama.cpp's architecture, and why it is deci (empty if it is not).

    Raises `CheckpointError` if llama.cpp has none that computes the model.
    """
    family = families.of(config)
    stock = ARCHITECTURES[family.name]
    why = _why_deci(stock, config, shapes)
    if not why:
        return stock, ""
    if family.qk_norm:
        raise CheckpointError(
            f"llama.cpp cannot run this variant: {why}, and its only architecture for that (deci) "
            f"has no norms on queries and keys, which {family.label} needs.",
            "Export a depth-pruned variant, or one whose blocks all have the same shape.",
        )
    return "deci", why


def _why_deci(stock: str, config: Mapping[str, Any], shapes: Mapping[str, families.Shape]) -> str:
    if differ := differences(sizes(config, shapes)):
        return f"its blocks have {differ}"
    read = _READ_BIAS.get(stock)
    biased = {families.module_of(name) for name in shapes if name.endswith(".bias")}
    added = sorted(biased - set(read)) if read is not None else []
    if added:
        return f"its {', '.join(added)} have biases, which architecture {stock} does not read"
    return ""


def check_activation(config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for an activation that llama.cpp does not compute here."""
    name = config.get("hidden_act") or "silu"
    if name not in ("silu", "swish"):
        raise CheckpointError(
            f"llama.cpp computes these families with the activation silu, not {name}.",
            "This checkpoint cannot be exported to GGUF.",
        )
