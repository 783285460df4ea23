"""Facts about each supported model family, without loading it: names, shapes, config fields.

All four families share LLaMA's tensor names; they differ in which projections have a bias, in the
norms on queries and keys, and in config defaults. In ``depthcut_llama`` and the like each block has
its own shapes; those are read from the weights' headers.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core import outside
from core.errors import CheckpointError

CUSTOM_PREFIX = "depthcut_"
LAYER_FIELDS = {
    "num_attention_heads": "layer_num_attention_heads",
    "num_key_value_heads": "layer_num_key_value_heads",
    "intermediate_size": "layer_intermediate_size",
}
"""Config fields with one size per block, in checkpoints whose blocks have their own shapes.

0 heads mean a block without attention, 0 neurons one without an MLP.
"""
PART_MODULES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Part of a block -> the kinds of module that it consists of; the block's norms stay without it."""
ADDED_BIAS = {"self_attn.o_proj": "o_bias", "mlp.down_proj": "down_bias"}
"""Projections that may have a bias unlike the rest of their family -> the config field for it."""
_BLOCK = re.compile(r"^model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)$")
# Lists that may happen to have one item per block, but are not about blocks.
_NOT_PER_BLOCK = re.compile(
    r"architectures|auto_map|.*token_ids?|.*_labels?|id2label|label2id|rope_.*|quantization_config"
    r"|lineage"
)

NAMES_KEPT = 4096
"""Tensors whose places are kept: all variants of a model have the same names."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """The torch-free facts of one model family."""

    name: str
    """The config's model_type."""
    label: str
    architecture: str
    """The stock transformers class."""
    defaults: Mapping[str, Any]
    """Values of fields that config.json leaves out."""
    qkv_bias: bool = False
    """Queries, keys and values always have a bias (if not: the config's attention_bias)."""
    qk_norm: bool = False
    """Queries and keys are normalised per head."""


_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LLaMA",
            "LlamaForCausalLM",
            _COMMON
            | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
        ),
        Family(
            "mistral",
            "Mistral",
            "MistralForCausalLM",
            _COMMON
            | {
                "vocab_size": 32000,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
            },
        ),
        Family(
            "qwen2",
            "Qwen2",
            "Qwen2ForCausalLM",
            _COMMON
            | {
                "vocab_size": 151936,
                "intermediate_size": 22016,
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
                "max_window_layers": 28,
            },
            qkv_bias=True,
        ),
        Family(
            "qwen3",
            "Qwen3",
            "Qwen3ForCausalLM",
            _COMMON
            | {
                "vocab_size": 151936,
                "intermediate_size": 22016,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "max_position_embeddings": 32768,
                "max_window_layers": 28,
            },
            qk_norm=True,
        ),
    )
}
SUPPORTED = tuple(FAMILIES)


def is_custom(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint comes with its own modelling code (blocks of different shapes)."""
    return str(config.get("model_type", "")).startswith(CUSTOM_PREFIX)


def of(config: Mapping[str, Any]) -> Family:
    """Return the family a config belongs to.

    Raises `CheckpointError` if it is not a causal language model or its family is not supported.
    """
    given, listed = config.get("model_type") or "", config.get("architectures") or []
    if not isinstance(given, str):
        raise CheckpointError(
            f"config.json sets model_type to {outside.quoted(given)}.", "It must be a name."
        )
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(
            f"config.json sets architectures to {outside.quoted(listed)}.",
            "It must be a list of names.",
        )
    kind, names = outside.brief(given), [outside.brief(name) for name in listed[:3]]
    causal = any("ForCausalLM" in n or "LMHeadModel" in n for n in names)
    family = FAMILIES.get(kind.removeprefix(CUSTOM_PREFIX))
    if names and not causal:
        raise CheckpointError(
            f"This is not a causal language model: its architecture is {', '.join(names)}.",
            f"Give a checkpoint of one of these families: {', '.join(SUPPORTED)}.",
        )
    if not kind and not names:
        raise CheckpointError(
            "config.json has neither model_type nor architectures.",
            "Give a Hugging Face checkpoint of a causal language model.",
        )
    if family is None:
        raise CheckpointError(
            f"The model family '{kind or names[0]}' is not supported.",
            f"Supported families: {', '.join(SUPPORTED)}.",
        )
    return family


def setting(config: Mapping[str, Any], name: str) -> Any:
    """Return a config field, or the family's default if it is left out (None without one)."""
    value = config.get(name)
    if value is not None:
        return value
    default = of(config).defaults.get(name)
    if name == "num_key_value_heads" and (default is None or name in config):
        # null means one key for each query, also in families with another default
        return setting(config, "num_attention_heads")
    if default is None and name == "head_dim":
        return setting(config, "hidden_size") // setting(config, "num_attention_heads")
    return default


@functools.lru_cache(maxsize=NAMES_KEPT)
def block_of(name: str) -> int | None:
    """Return the block a tensor belongs to, or None for embedding, final norm and head."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


@functools.lru_cache(maxsize=NAMES_KEPT)
def module_of(name: str) -> str:
    """Return the module kind of a tensor.

    ``model.layers.3.self_attn.q_proj.weight`` -> ``q_proj``.
    """
    match = _BLOCK.match(name)
    inner = match[2] if match else name
    return inner.rsplit(".", 1)[0].rsplit(".", 1)[-1]


@functools.lru_cache(maxsize=NAMES_KEPT)
def part_of(name: str) -> str:
    """Return ``embedding``, ``blocks``, ``norm`` or ``head``."""
    if block_of(name) is not None:
        return "blocks"
    if name.startswith("lm_head"):
        return "head"
    return "embedding" if "embed_tokens" in name else "norm"


def is_parameter(name: str) -> bool:
    """Whether a stored tensor counts as a parameter (old files also store rotary tables)."""
    return not name.endswith("inv_freq")


def sublayer_of(name: str) -> str:
    """Return which part of a block a tensor belongs to: attention, mlp, or empty for its norms."""
    kind = module_of(name)
    return next((part for part, kinds in PART_MODULES.items() if kind in kinds), "")


def renamed(name: str, block: int) -> str:
    """Return a block tensor's name under another block number."""
    match = _BLOCK.match(name)
    return f"model.layers.{block}.{match[2]}" if match else name


def layer_setting(config: Mapping[str, Any], name: str, block: int) -> Any:
    """Return a block's own size if the config lists one per block, otherwise `setting`."""
    sizes = config.get(LAYER_FIELDS[name]) if is_custom(config) else None
    return sizes[block] if isinstance(sizes, list) and block < len(sizes) else setting(config, name)


def says_layer_shapes(config: Mapping[str, Any]) -> bool:
    """Whether the config gives the sizes of every block."""
    blocks = setting(config, "num_hidden_layers")
    lists = [config.get(name) for name in LAYER_FIELDS.values()]
    return all(isinstance(sizes, list) and len(sizes) == blocks for sizes in lists)


def block_shapes(config: Mapping[str, Any], block: int = 0) -> dict[str, Shape]:
    """Return the tensors of one block, name within the block -> shape [out, in].

    A block without attention or without an MLP has no tensors of it, but both norms.
    """
    family = of(config)
    hidden = setting(config, "hidden_size")
    inner = layer_setting(config, "intermediate_size", block)
    width = setting(config, "head_dim")
    query = layer_setting(config, "num_attention_heads", block) * width
    key = layer_setting(config, "num_key_value_heads", block) * width
    linear: dict[str, tuple[int, int]] = {}
    if query:
        linear |= {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
        }
    if inner:
        linear |= {
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    attention_bias = family.name in ("llama", "qwen3") and bool(config.get("attention_bias"))
    mlp_bias = family.name == "llama" and bool(config.get("mlp_bias"))
    shapes: dict[str, Shape] = {}
    for name, shape in linear.items():
        shapes[f"{name}.weight"] = shape
        projection = name.rpartition(".")[2]
        biased = mlp_bias if name.startswith("mlp") else attention_bias
        added = is_custom(config) and bool(config.get(ADDED_BIAS.get(name, "")))
        if biased or added or (family.qkv_bias and projection in ("q_proj", "k_proj", "v_proj")):
            shapes[f"{name}.bias"] = shape[:1]
    if family.qk_norm and query:
        shapes |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
    shapes["input_layernorm.weight"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    return shapes


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return every tensor that the config implies, name -> shape; tied heads are left out."""
    vocabulary, hidden = setting(config, "vocab_size"), setting(config, "hidden_size")
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for block in range(setting(config, "num_hidden_layers")):
        one = block_shapes(config, block)
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in one.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not setting(config, "tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def count(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)


def without_blocks(config: Mapping[str, Any], drop: Sequence[int]) -> dict[str, Any]:
    """Return the config of the model without the blocks ``drop``.

    The number of blocks, the sliding-window boundary and every list (or dictionary keyed by block
    number) with one item per block are adjusted; otherwise `from_pretrained` would refuse, or the
    key/value cache would have the wrong kind of layer.
    """
    blocks = setting(config, "num_hidden_layers")
    gone = set(drop)
    keep = [block for block in range(blocks) if block not in gone]
    result = {key: _select(key, value, keep, blocks) for key, value in config.items()}
    result["num_hidden_layers"] = len(keep)
    border = setting(config, "max_window_layers")
    if border is not None and ("max_window_layers" in config or config.get("use_sliding_window")):
        result["max_window_layers"] = sum(block < border for block in keep)
    return result


def _select(key: str, value: Any, keep: Sequence[int], blocks: int) -> Any:
    if _NOT_PER_BLOCK.fullmatch(key):
        return copy.deepcopy(value)
    if isinstance(value, list) and len(value) == blocks:
        return [value[block] for block in keep]
    if isinstance(value, dict):
        if blocks > 1 and set(value) == {str(block) for block in range(blocks)}:
            return {str(new): value[str(old)] for new, old in enumerate(keep)}
        return {name: _select(name, item, keep, blocks) for name, item in value.items()}
    return copy.deepcopy(value)
