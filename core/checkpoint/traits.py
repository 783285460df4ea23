"""What decides which programs run a checkpoint: its shapes, biases and format, from its config.

What matters is whether all blocks have one shape, whether a head's width is hidden size / heads,
whether output projections got a bias, and whether the weights are quantized.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.checkpoint import families, llama_cpp
from core.errors import CheckpointError

GROUPS = (128, 64, 32, 16, 8)
"""Weights that share a scale in 4 bits; quantizers have kernels for these."""
_MAX_PARALLEL = 8


@dataclass(frozen=True)
class Traits:
    """What decides where a checkpoint runs."""

    family: families.Family
    blocks: tuple[llama_cpp.BlockSizes, ...]
    hidden: int
    head_dim: int
    unusual: str
    """What no stock class has, so that Depthcut's modelling code is needed; empty without."""
    architecture: str
    """llama.cpp's; empty if it has none."""
    why_architecture: str
    """Why it is deci, or why there is none."""
    quantized: str
    """int8, int4 or another format; empty if the weights are not quantized."""

    @property
    def own_head_dim(self) -> bool:
        """Whether the width of a head is not hidden size / heads."""
        return self.head_dim * self.blocks[0].heads != self.hidden

    @property
    def group(self) -> int | None:
        """The largest of `GROUPS` that divides the input widths of all matrices."""
        widths = {self.hidden}
        for block in self.blocks:
            widths |= {block.heads * self.head_dim, block.neurons}
        common = math.gcd(*widths)
        return next((group for group in GROUPS if common % group == 0), None)

    @property
    def parallel(self) -> list[int]:
        """Numbers of GPUs that can share every layer, as vLLM and SGLang divide heads."""
        first = self.blocks[0]

        def fits(size: int) -> bool:
            keys = max(first.kv_heads, size) % min(first.kv_heads, size) == 0
            return first.heads % size == 0 and keys and first.neurons % size == 0

        return [size for size in range(1, _MAX_PARALLEL + 1) if fits(size)]


def of(config: Mapping[str, Any]) -> Traits:
    """Return what decides where the checkpoint with this config.json runs."""
    shapes = families.expected_shapes(config)
    blocks = llama_cpp.sizes(config, shapes)
    try:
        llama_cpp.check_activation(config)
        architecture, why = llama_cpp.architecture(config, shapes)
    except CheckpointError as error:
        architecture, why = "", error.message
    return Traits(
        family=families.of(config),
        blocks=blocks,
        hidden=families.setting(config, "hidden_size"),
        head_dim=families.setting(config, "head_dim"),
        unusual=_unusual(config, blocks) if families.is_custom(config) else "",
        architecture=architecture,
        why_architecture=why,
        quantized=_quantized(config.get("quantization_config")),
    )


def _unusual(config: Mapping[str, Any], blocks: Sequence[llama_cpp.BlockSizes]) -> str:
    """Return why a checkpoint needs Depthcut's modelling code."""
    if differ := llama_cpp.differences(blocks):
        return f"the blocks have {differ}"
    added = [name for name, field in families.ADDED_BIAS.items() if config.get(field)]
    if added:
        names = " and ".join(name.rpartition(".")[2] for name in added)
        return f"the output projections ({names}) have biases"
    hidden = families.setting(config, "hidden_size")
    return f"the {blocks[0].heads} heads do not divide the hidden size {hidden:,}"


def _quantized(declared: Any) -> str:
    """Return the format of quantized weights; empty without."""
    if not declared:
        return ""
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    if method != "torchao":
        return str(method or "an unknown format")
    kind = json.dumps(declared.get("quant_type"))
    return "int4" if "int4" in kind or "IntxWeightOnly" in kind else "int8"
