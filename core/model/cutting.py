"""Remove blocks from a model in memory; what remains is what a pruned checkpoint loads as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from core.checkpoint import families
from core.checkpoint.drop import Removal, check_drop
from core.errors import CheckpointError
from core.model.blocks import BlockView


def remove_blocks(model: Any, drop: Sequence[int]) -> Any:
    """Remove the blocks ``drop`` from ``model`` in place, and return it.

    The kept blocks are renumbered for the key/value cache, and the configuration changes as that
    of a pruned checkpoint does: number of blocks, layer types, sizes per block.

    Raises `PlanError` for blocks that cannot be removed.
    """
    view = BlockView(model)
    dropped = view.check_skip(Removal(check_drop(drop, len(view)))).drop
    config = view.config
    before = config.to_dict()
    after = families.without_blocks(before, dropped)
    kept = [layer for number, layer in enumerate(view.blocks) if number not in dropped]
    for number, layer in enumerate(layer for layer in kept if layer.self_attn is not None):
        layer.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    for name, value in after.items():
        if name not in before or before[name] != value:
            setattr(config, name, value)
    return model


def refuse_quantized(model: Any) -> None:
    """Raise `CheckpointError` if the weights of ``model`` are quantized, by any method."""
    declared = getattr(model.config, "quantization_config", None)
    if declared is not None:
        method = getattr(declared, "quant_method", "") or "unknown"
        method = getattr(method, "value", method)
        raise CheckpointError(
            f"The model is quantized ({method}), so its blocks cannot be scored or pruned.",
            "Prune first, then quantize: load it without quantization_config.",
        )
