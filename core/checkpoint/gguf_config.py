"""A GGUF file's metadata as the config.json of the same model, and its tensors' names.

transformers builds a config from a GGUF too, but leaves out what changes the result: rope scaling
(entries, and LLaMA 3's factors, which are a tensor), head sizes other than hidden / heads, and
biases of LLaMA's projections. So the config is built here, and every tensor of the file has to be
one that the config's model has, in its shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from core import outside
from core.checkpoint import config_rules, families
from core.checkpoint.gguf import Header, Length
from core.errors import CheckpointError

FREQUENCIES = "rope_freqs.weight"
"""LLaMA 3's divisors of the rotary frequencies, [head dimension / 2]; a config field elsewhere."""
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP_BIASES = ("ffn_gate", "ffn_up", "ffn_down")
_SCALING = {"type", "factor", "original_context_length", "finetuned"}
"""Entries of rope scaling that are understood."""
_SPECIAL = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def gguf_name(name: str) -> str:
    """Return a transformers tensor's name in a GGUF file.

    ``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``.
    """
    if name in _TOP:
        return _TOP[name]
    block = families.block_of(name)
    module, _, kind = name.removeprefix(f"model.layers.{block}.").rpartition(".")
    return f"blk.{block}.{_MODULES[module]}.{kind}"


def config_of(header: Header) -> dict[str, Any]:
    """Return the config.json of a GGUF file's model, without ``dtype``.

    Raises `CheckpointError` if an entry is missing or of the wrong kind, if the tensors are not
    those of the config, or if the rope scaling is not known.
    """
    family = families.FAMILIES[header.architecture]
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise _incomplete(header, "token_embd.weight")
    hidden, heads = _whole(header, "embedding_length"), _whole(header, "attention.head_count")
    head_dim = _head_dim(header, hidden, heads)
    context = _whole(header, "context_length")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _whole(header, "feed_forward_length"),
        "num_hidden_layers": _whole(header, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(header, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": _number(header, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "use_cache": True,
    }
    if family.name == "llama":
        config["attention_bias"] = _has_biases(header, _ATTENTION_BIASES)
        config["mlp_bias"] = _has_biases(header, _MLP_BIASES)
    config |= {key: token_id(header, entry) for key, entry in _SPECIAL.items()}
    config_rules.check(config)
    _check_tensors(header, config)
    return config


def token_id(header: Header, entry: str) -> int | None:
    """Return a special token's id, or None without one within the vocabulary."""
    value = header.metadata.get(entry)
    embedding = header.tensors["token_embd.weight"]
    return value if type(value) is int and 0 <= value < embedding.shape[0] else None


def stop_ids(header: Header) -> list[int]:
    """Return the ids of the tokens that end a text or a turn, the end of text first."""
    entries = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [token_id(header, f"tokenizer.ggml.{entry}") for entry in entries]
    return list(dict.fromkeys(i for i in found if i is not None))


# ------------------------------------------------------------------------------------------ sizes


def _whole(header: Header, key: str, default: int | None = None) -> int:
    value = header.get(key, default)
    if isinstance(value, tuple) and len(set(value)) == 1:  # one number for each block, all equal
        value = value[0]
    if isinstance(value, tuple | Length):
        raise CheckpointError(
            f"{header.path} gives every block its own {key}, which a {header.architecture} "
            "checkpoint cannot.",
            "Give the safetensors checkpoint it was made from.",
        )
    try:
        return outside.whole(value, 1)
    except outside.Malformed as error:
        raise _wrong(header, key, str(error)) from error


def _number(header: Header, key: str) -> float:
    value = header.get(key)
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise _wrong(header, key, f"{outside.quoted(value)} is not a number above 0")
    return _decimal(value)


def _decimal(value: float) -> float:
    """Return the decimal number that single precision stands for: 1e-05, not 9.99999974e-06."""
    return float(f"{value:.7g}")


def _wrong(header: Header, key: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path} is a damaged GGUF file: in {header.architecture}.{key}, {reason}.",
        "Download it again.",
    )


def _head_dim(header: Header, hidden: int, heads: int) -> int:
    """Return values per head; llama.cpp's default is hidden / heads."""
    key = _whole(header, "attention.key_length", max(1, hidden // heads))
    value = _whole(header, "attention.value_length", key)
    rotary = _whole(header, "rope.dimension_count", key)
    if len({key, value, rotary}) > 1:
        raise CheckpointError(
            f"{header.path} has keys of {key}, values of {value} and rotary embeddings of {rotary} "
            "dimensions per head.",
            "Only models with one size for all three are supported.",
        )
    return key


# ------------------------------------------------------------------------------------------- rope


def _rope(header: Header, head_dim: int) -> dict[str, Any]:
    theta = 10000.0 if header.get("rope.freq_base") is None else _number(header, "rope.freq_base")
    kind = header.get("rope.scaling.type")
    linear = header.get("rope.scale_linear")  # of old files
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    prefix = f"{header.architecture}.rope.scaling."
    others = {key.removeprefix(prefix) for key in header.metadata if key.startswith(prefix)}
    if unknown := sorted(others - _SCALING):
        raise _unknown_rope(header, f"has the rope scaling entry {outside.quoted(unknown[0])}")
    if kind in (None, "none") and linear in (None, 0.0, 1.0):
        return rope | _llama3(header, theta, head_dim)
    if kind in (None, "none", "linear"):
        factor = _number(header, "rope.scale_linear" if kind != "linear" else "rope.scaling.factor")
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": _number(header, "rope.scaling.factor"),
            "original_max_position_embeddings": _whole(
                header, "rope.scaling.original_context_length"
            ),
        }
    else:
        raise _unknown_rope(header, f"scales its rotary embeddings by {outside.quoted(kind)}")
    if FREQUENCIES in header.tensors:
        raise _unknown_rope(header, f"has {FREQUENCIES} beside the scaling {kind}")
    return rope


def _llama3(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Return LLaMA 3's scaling, recovered from the divisors that the file stores instead of it."""
    if FREQUENCIES not in header.tensors:
        return {}
    tensor = header.tensors[FREQUENCIES]
    if tensor.storage != "F32" or tensor.shape != (head_dim // 2,):
        raise _unknown_rope(header, f"stores {FREQUENCIES} as {tensor.storage} {tensor.shape}")
    stored = header.floats(FREQUENCIES)
    if all(value == 1.0 for value in stored):
        return {}
    factor = max(stored)
    for power in range(5, 21):
        scaling = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1 << power,
        }
        expected = llama3_divisors(scaling, theta, head_dim)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(stored, expected, strict=True)):
            return {"rope_type": "llama3", **scaling}
    raise _unknown_rope(header, f"has a {FREQUENCIES} that does not follow LLaMA 3's rule")


def llama3_divisors(scaling: Mapping[str, float], theta: float, head_dim: int) -> list[float]:
    """Return what LLaMA 3 divides each rotary frequency by, [head dimension / 2].

    Long wavelengths by ``factor``, short ones by 1, with a smooth passage between (transformers'
    ``_compute_llama3_parameters``).
    """
    old, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    found = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        smooth = min(1.0, max(0.0, (old / wavelength - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def _unknown_rope(header: Header, what: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path} {what}, which is not known here; imported without it, the model would "
        "compute something else.",
        "Give the safetensors checkpoint it was made from.",
    )


# ---------------------------------------------------------------------------------------- tensors


def _has_biases(header: Header, modules: Sequence[str]) -> bool:
    return all(f"blk.0.{module}.bias" in header.tensors for module in modules)


def _check_tensors(header: Header, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the file's tensors are exactly those of the config's model."""
    expected = {gguf_name(name): s for name, s in families.expected_shapes(config).items()}
    for name, shape in expected.items():
        found = header.tensors.get(name)
        if found is None:
            raise _incomplete(header, name)
        if found.shape != shape:
            raise CheckpointError(
                f"{header.path} stores '{name}' with shape {list(found.shape)}, but its metadata "
                f"implies {list(shape)}.",
                "Download it again.",
            )
    others = [name for name in header.tensors if name not in expected and name != FREQUENCIES]
    if others:
        shown = ", ".join(outside.quoted(name) for name in others[:3])
        raise CheckpointError(
            f"{header.path} holds tensors that a {header.architecture} checkpoint here has no "
            f"place for: {shown}{', ...' if others[3:] else ''}.",
            "Mixtures of experts and models with added tensors are not supported.",
        )


def _incomplete(header: Header, name: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path} does not hold the tensor '{name}', which its metadata implies.",
        "Download it again.",
    )
