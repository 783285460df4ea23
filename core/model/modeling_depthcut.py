"""LLaMA, Mistral, Qwen2 and Qwen3 models whose blocks differ in shape, or lack a part.

Every checkpoint that needs this file has a copy beside its weights. It depends only on torch and
transformers::

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The configuration is the unpruned family's, with these additional fields:

``layer_num_attention_heads``, ``layer_num_key_value_heads``, ``layer_intermediate_size``
    One number per block. The fields without ``layer_`` keep the unpruned sizes. 0 heads mean a
    block without attention, 0 neurons one without an MLP; it keeps both norms.
``o_bias``, ``down_bias``
    The output projections of attention and MLP have a bias (FLAP's compensation).
``per_layer_config``
    The sizes again, in transformers' own form; not read here. It is left out with added biases and
    missing parts, which it cannot express.

Attention, masks, rotary phases and the cache come from the family's stock classes: only the sizes
of the linear layers differ. The key/value cache has a layer for each block that has attention, and
none for the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


def cached_layers(config: Any, attends: Sequence[bool]) -> Any:
    """Return ``config`` with only the blocks that attend, by which a cache makes its layers."""
    if all(attends) or not any(attends):
        return config
    own = copy.copy(config)
    own.__dict__.pop("get_text_config", None)
    own.num_hidden_layers = sum(attends)
    for name, values in vars(config).items():
        if name.startswith("layer_") and isinstance(values, list) and len(values) == len(attends):
            setattr(own, name, [v for v, yes in zip(values, attends, strict=True) if yes])
    return own


class _OwnSizes:
    """Keeps transformers from reading ``per_layer_config``, which repeats the sizes of the blocks.

    It would make the fields without ``layer_`` unreadable, and the stock classes read those.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        """Take the other fields."""
        kwargs.pop("per_layer_config", None)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """Return the configuration; for a decoder's cache, that of the blocks that attend."""
        heads = getattr(self, "layer_num_attention_heads", None)
        if decoder and not encoder and heads and len(heads) == self.num_hidden_layers:  # type: ignore[attr-defined]
            return cached_layers(self, [number > 0 for number in heads])
        return self


class DepthcutLlamaConfig(_OwnSizes, LlamaConfig):
    """LLaMA's configuration, with the sizes of every block."""

    model_type = "depthcut_llama"


class DepthcutMistralConfig(_OwnSizes, MistralConfig):
    """Mistral's configuration, with the sizes of every block."""

    model_type = "depthcut_mistral"


class DepthcutQwen2Config(_OwnSizes, Qwen2Config):
    """Qwen2's configuration, with the sizes of every block."""

    model_type = "depthcut_qwen2"


class DepthcutQwen3Config(_OwnSizes, Qwen3Config):
    """Qwen3's configuration, with the sizes of every block."""

    model_type = "depthcut_qwen3"


class _Parts:
    """A decoder layer that may lack its attention or its MLP."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output; a missing part adds nothing."""
        layer: Any = self
        if layer.self_attn is not None and layer.mlp is not None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return run_part(layer, hidden_states, *args, **kwargs)


def run_part(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Return the output of a decoder layer without its MLP or without its attention."""
    if layer.self_attn is None:
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        **kwargs,
    )
    return hidden_states + attended


class DepthcutLlamaDecoderLayer(_Parts, LlamaDecoderLayer):
    """LLaMA's layer, or a part of it."""


class DepthcutMistralDecoderLayer(_Parts, MistralDecoderLayer):
    """Mistral's layer, or a part of it."""


class DepthcutQwen2DecoderLayer(_Parts, Qwen2DecoderLayer):
    """Qwen2's layer, or a part of it."""


class DepthcutQwen3DecoderLayer(_Parts, Qwen3DecoderLayer):
    """Qwen3's layer, or a part of it."""


def build_block(layer_class: Any, config: Any, index: int) -> nn.Module:
    """Return decoder layer ``index`` with that block's sizes."""
    heads, neurons = config.layer_num_attention_heads, config.layer_intermediate_size[index]
    own = copy.copy(config)
    if heads[index]:
        own.num_attention_heads = heads[index]
        own.num_key_value_heads = config.layer_num_key_value_heads[index]
    if neurons:
        own.intermediate_size = neurons
    layer = layer_class(own, index)
    attention, mlp = layer.self_attn, layer.mlp
    if heads[index]:
        # All blocks share one configuration, so that changing the attention implementation works.
        attention.config = config
        attention.layer_idx = sum(number > 0 for number in heads[:index])
        if getattr(config, "o_bias", False) and attention.o_proj.bias is None:
            attention.o_proj = _with_bias(attention.o_proj)
    else:
        layer.self_attn = None
    if neurons:
        if hasattr(mlp, "config"):
            mlp.config = config
        if getattr(config, "down_bias", False) and mlp.down_proj.bias is None:
            mlp.down_proj = _with_bias(mlp.down_proj)
    else:
        layer.mlp = None
    return layer


def _with_bias(linear: nn.Linear) -> nn.Linear:
    weight = linear.weight
    return nn.Linear(
        linear.in_features, linear.out_features, device=weight.device, dtype=weight.dtype
    )


class _OwnBlocks:
    """Builds the stock model without blocks, then each block with its own sizes."""

    layer_class: Any

    def __init__(self, config: Any) -> None:
        """Build the model that ``config`` describes."""
        blocks = config.num_hidden_layers
        config.num_hidden_layers = 0
        try:
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = blocks
        model: Any = self
        model.model.layers = nn.ModuleList(
            build_block(self.layer_class, config, index) for index in range(blocks)
        )
        model.post_init()


class DepthcutLlamaForCausalLM(_OwnBlocks, LlamaForCausalLM):
    """LLaMA with individual block sizes."""

    config_class = DepthcutLlamaConfig
    layer_class = DepthcutLlamaDecoderLayer
    _no_split_modules = ["DepthcutLlamaDecoderLayer"]


class DepthcutMistralForCausalLM(_OwnBlocks, MistralForCausalLM):
    """Mistral with individual block sizes."""

    config_class = DepthcutMistralConfig
    layer_class = DepthcutMistralDecoderLayer
    _no_split_modules = ["DepthcutMistralDecoderLayer"]


class DepthcutQwen2ForCausalLM(_OwnBlocks, Qwen2ForCausalLM):
    """Qwen2 with individual block sizes."""

    config_class = DepthcutQwen2Config
    layer_class = DepthcutQwen2DecoderLayer
    _no_split_modules = ["DepthcutQwen2DecoderLayer"]


class DepthcutQwen3ForCausalLM(_OwnBlocks, Qwen3ForCausalLM):
    """Qwen3 with individual block sizes."""

    config_class = DepthcutQwen3Config
    layer_class = DepthcutQwen3DecoderLayer
    _no_split_modules = ["DepthcutQwen3DecoderLayer"]
