"""LLaMA, Mistral, Qwen2 and Qwen3 models whose blocks differ in shape.

Every checkpoint that needs this file has a copy beside its weights. It depends only on torch and
transformers::

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The configuration is the unpruned family's, with these additional fields:

``layer_num_attention_heads``, ``layer_num_key_value_heads``, ``layer_intermediate_size``
    One number per block. The fields without ``layer_`` keep the unpruned sizes.
``o_bias``, ``down_bias``
    The output projections of attention and MLP have a bias (FLAP's compensation).
``per_layer_config``
    The sizes again, in transformers' own form; not read here. It is left out with added biases,
    which it cannot express.

Attention, masks, rotary phases and the cache come from the family's stock classes: only the sizes
of the linear layers differ.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
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


class _OwnSizes:
    """Keeps transformers from reading ``per_layer_config``, which repeats the sizes of the blocks.

    It would make the fields without ``layer_`` unreadable, and the stock classes read those.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        """Take the other fields."""
        kwargs.pop("per_layer_config", None)
        super().__post_init__(**kwargs)  # type: ignore[misc]


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


def build_block(layer_class: Any, config: Any, index: int) -> nn.Module:
    """Return decoder layer ``index`` with that block's sizes."""
    own = copy.copy(config)
    own.num_attention_heads = config.layer_num_attention_heads[index]
    own.num_key_value_heads = config.layer_num_key_value_heads[index]
    own.intermediate_size = config.layer_intermediate_size[index]
    layer = layer_class(own, index)
    attention, mlp = layer.self_attn, layer.mlp
    # All blocks share one configuration, so that changing the attention implementation works.
    attention.config = config
    if hasattr(mlp, "config"):
        mlp.config = config
    if getattr(config, "o_bias", False) and attention.o_proj.bias is None:
        attention.o_proj = _with_bias(attention.o_proj)
    if getattr(config, "down_bias", False) and mlp.down_proj.bias is None:
        mlp.down_proj = _with_bias(mlp.down_proj)
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
    layer_class = LlamaDecoderLayer


class DepthcutMistralForCausalLM(_OwnBlocks, MistralForCausalLM):
    """Mistral with individual block sizes."""

    config_class = DepthcutMistralConfig
    layer_class = MistralDecoderLayer


class DepthcutQwen2ForCausalLM(_OwnBlocks, Qwen2ForCausalLM):
    """Qwen2 with individual block sizes."""

    config_class = DepthcutQwen2Config
    layer_class = Qwen2DecoderLayer


class DepthcutQwen3ForCausalLM(_OwnBlocks, Qwen3ForCausalLM):
    """Qwen3 with individual block sizes."""

    config_class = DepthcutQwen3Config
    layer_class = Qwen3DecoderLayer
