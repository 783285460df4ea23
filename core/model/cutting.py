"""Remove blocks, and parts of blocks, from a model in memory: what remains is what is loaded.

A checkpoint that was pruned in the same way loads as the same model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from core.checkpoint import families, own_code
from core.checkpoint.drop import Removal, check_removal
from core.errors import CheckpointError
from core.model.blocks import BlockView


def remove(model: Any, removal: Removal) -> Any:
    """Remove blocks and parts of blocks from ``model`` in place, and return it.

    The kept blocks are renumbered for the key/value cache, and the configuration changes as that
    of a pruned checkpoint does: number of blocks, layer types, sizes per block. A model that loses
    parts becomes one of `core.model.modeling_depthcut`, which `save_pretrained` copies beside the
    weights.

    Raises `PlanError` for what cannot be removed. MLPs cannot be made narrower here.
    """
    view = BlockView(model)
    found = view.check_skip(check_removal(removal, view.sizes()))
    config = view.config
    before = config.to_dict()
    cut = own_code.without_parts(before, _shapes(view), found)
    after = families.without_blocks(cut, found.drop)
    if found.partial:
        _take_own_classes(view)
    for block, layer in enumerate(view.blocks):
        one: Any = layer
        if block in found.attention:
            one.self_attn = None
        if block in found.mlp:
            one.mlp = None
    kept = [layer for number, layer in enumerate(view.blocks) if number not in found.drop]
    for number, layer in enumerate(layer for layer in kept if layer.self_attn is not None):
        layer.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    for name, value in after.items():
        if name != own_code.PER_LAYER and (name not in before or before[name] != value):
            setattr(config, name, value)
    return model


def _shapes(view: BlockView) -> list[dict[str, int]]:
    """Return the sizes of every block, as `CheckpointInfo.block_shapes` has them."""
    result = []
    for block, size in enumerate(view.sizes()):
        heads = keys = 0
        if size["heads"]:
            attention: Any = view.blocks[block].self_attn
            heads, keys = (
                linear.out_features // attention.head_dim
                for linear in (attention.q_proj, attention.k_proj)
            )
        result.append({"heads": heads, "kv_heads": keys, "intermediate": size["intermediate"]})
    return result


def _take_own_classes(view: BlockView) -> None:
    """Make a stock model one of Depthcut's own classes, which differ in methods alone."""
    from core.model import modeling_depthcut as own

    model: Any = view.model
    if families.is_custom({"model_type": view.config.model_type}):
        return
    name = own_code.class_name(view.family)
    for layer in view.blocks:
        layer.__class__ = getattr(own, f"{name}DecoderLayer")
    view.config.__class__ = getattr(own, f"{name}Config")
    model.__class__ = getattr(own, f"{name}ForCausalLM")
    # makes save_pretrained copy the code, which it only asks the class
    model.__class__.register_for_auto_class("AutoModelForCausalLM")


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
