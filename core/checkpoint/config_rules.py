"""What config.json may say: the rules by which transformers accepts a configuration, without it.

transformers checks types strictly when it reads a configuration, and some values only when it
builds the model or first computes. Here the same rules are applied to the file, so that a command
says which field is wrong, and why, before anything is read, computed or written. The rules follow
transformers 5.24 (``configuration_llama.py`` and its siblings, ``configuration_utils.py``,
``modeling_rope_utils.py``); a test compares them with its verdict on a table of configurations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core import outside
from core.checkpoint import families
from core.errors import CheckpointError

PREFIX = "torch."
"""Some tools write the name of a format with torch's name in front; transformers refuses that."""
DTYPE_FIELDS = ("dtype", "torch_dtype")
_ALIASES = {"half": "float16", "float": "float32", "double": "float64"}
_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)
MOST_BLOCKS = 1_000
"""Blocks of a checkpoint; the deepest public model of the supported families has 126."""
LARGEST_SIZE = (1 << 31) - 1
"""Of hidden size, vocabulary, context and the like: torch's kernels count in 32 bits."""
_ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python",
    "gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish",
    "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish",
    "tanh", "xielu",
)  # fmt: skip
_LAYERS = ("full_attention", "sliding_attention", "attention")
"""Kinds of block that the four families compute; the last is an old name of the first."""
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
"""The kinds of rotary scaling that the four families compute, and the fields each needs."""
_ROPE_STRETCHED = ("yarn", "longrope", "llama3")
_ROPE_BEFORE = "original_max_position_embeddings"
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", _ROPE_BEFORE)


@dataclass(frozen=True)
class _Type:
    """What JSON values a field may have."""

    kinds: tuple[type, ...]
    label: str
    null: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is of the type; true and false are not numbers."""
        if value is None:
            return self.null
        if isinstance(value, bool):
            return bool in self.kinds
        if list in self.kinds and isinstance(value, list):
            return all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        return isinstance(value, self.kinds)


_WHOLE = _Type((int,), "a whole number")
_WHOLE_OR_NULL = _Type((int,), "a whole number or null", null=True)
_IDS = _Type((int, list), "a whole number, a list of them, or null", null=True)
_DECIMAL = _Type((float,), "a number with a decimal point, e.g. 1e-05 or 1.0")
_NUMBER = _Type((int, float), "a number")
_FLAG = _Type((bool,), "true or false")
_TEXT = _Type((str,), "a string")
_TABLE = _Type((dict,), "an object or null", null=True)

_COMMON = {
    "vocab_size": _WHOLE,
    "hidden_size": _WHOLE,
    "intermediate_size": _WHOLE,
    "num_hidden_layers": _WHOLE,
    "num_attention_heads": _WHOLE,
    "num_key_value_heads": _WHOLE_OR_NULL,
    "head_dim": _WHOLE_OR_NULL,
    "max_position_embeddings": _WHOLE,
    "hidden_act": _TEXT,
    "initializer_range": _DECIMAL,
    "rms_norm_eps": _DECIMAL,
    "use_cache": _FLAG,
    "tie_word_embeddings": _FLAG,
    "attention_dropout": _NUMBER,
    "pad_token_id": _WHOLE_OR_NULL,
    "bos_token_id": _WHOLE_OR_NULL,
    "eos_token_id": _IDS,
    "rope_parameters": _TABLE,
    "rope_scaling": _TABLE,
    "sliding_window": _WHOLE_OR_NULL,
}
_WINDOWS = {"use_sliding_window": _FLAG, "max_window_layers": _WHOLE}
_TYPES: dict[str, dict[str, _Type]] = {
    "llama": _COMMON
    | {
        "attention_bias": _FLAG,
        "mlp_bias": _FLAG,
        "pretraining_tp": _WHOLE_OR_NULL,
    },
    "mistral": _COMMON | {"num_key_value_heads": _WHOLE},
    "qwen2": _COMMON | _WINDOWS | {"head_dim": _WHOLE},
    "qwen3": _COMMON | _WINDOWS | {"attention_bias": _FLAG, "head_dim": _WHOLE},
}


def plain_dtype(name: str) -> str:
    """Return the usual name of a format: ``torch.float16`` and ``half`` are float16."""
    short = name.removeprefix(PREFIX)
    return _ALIASES.get(short, short)


def declared_dtype(config: Mapping[str, Any]) -> str:
    """Return the format that a config names; float32 if it names none."""
    return plain_dtype(str(config.get("dtype") or config.get("torch_dtype") or "float32"))


def readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that transformers reads: formats without ``torch.`` in front."""
    result = dict(config)
    for field in DTYPE_FIELDS:
        if isinstance(result.get(field), str):
            result[field] = result[field].removeprefix(PREFIX)
    return result


def for_variant(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the config to write beside weights whose head is ``tied`` to the embedding, or not.

    A head that is stored beside ``tie_word_embeddings: true`` and differs from the embedding is
    used by transformers 5 but overwritten by transformers 4, so a variant says what is true.
    """
    result = readable(config)
    if families.setting(config, "tie_word_embeddings") and not tied:
        result["tie_word_embeddings"] = False
    return result


def check(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Raise `CheckpointError` for a field that transformers would refuse; return warnings.

    The message names the field, its value and why it is refused.
    """
    _check_types(config)
    _check_sizes(config)
    _check_layers(config)
    _check_rope(config)
    _check_values(config)
    return tuple(_notes(config))


def _refuse(field: str, value: Any, why: str, hint: str = "") -> CheckpointError:
    return CheckpointError(
        f"config.json sets {field} to {outside.quoted(value)}{why}.",
        hint or "Correct it in config.json; stock transformers would refuse it too.",
    )


def _check_types(config: Mapping[str, Any]) -> None:
    for field, kind in _TYPES[families.of(config).name].items():
        if field not in config or kind.accepts(config[field]):
            continue
        value = config[field]
        label = "a whole number above 0" if field in SIZES else kind.label
        raise _refuse(field, value, "", f"It must be {label}.")


def _check_sizes(config: Mapping[str, Any]) -> None:
    for name in SIZES:
        try:
            value = families.setting(config, name)
        except (TypeError, ZeroDivisionError):
            value = None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _refuse(name, value, "", "It must be a whole number above 0.")
        most = MOST_BLOCKS if name == "num_hidden_layers" else LARGEST_SIZE
        if value > most:
            raise CheckpointError(
                f"config.json sets {name} to {value:,}.", f"The maximum is {most:,}."
            )
    _check_layer_sizes(config)
    heads, groups = (
        families.setting(config, name) for name in ("num_attention_heads", "num_key_value_heads")
    )
    hidden, width = (families.setting(config, name) for name in ("hidden_size", "head_dim"))
    if heads % groups:
        raise _refuse(
            "num_key_value_heads", groups, f", which does not divide the {heads} attention heads"
        )
    if families.of(config).name == "llama" and hidden % heads:
        raise _refuse("hidden_size", hidden, f", which is not a multiple of the {heads} heads")
    if width % 2 and width > 4:
        raise _refuse("head_dim", width, ", but rotary positions need an even number")


def _check_layer_sizes(config: Mapping[str, Any]) -> None:
    if not families.is_custom(config):
        return
    blocks = families.setting(config, "num_hidden_layers")
    for name in families.LAYER_FIELDS.values():
        sizes = config.get(name)
        if sizes is None:
            continue
        if not isinstance(sizes, list) or len(sizes) != blocks:
            raise _refuse(
                name,
                sizes,
                "",
                f"It must list a number for each of the {blocks} blocks.",
            )
        for block, size in enumerate(sizes):
            if type(size) is not int or not 0 <= size <= LARGEST_SIZE:
                raise _refuse(
                    f"{name} of block {block}",
                    size,
                    "",
                    f"It must be a whole number from 0 to {LARGEST_SIZE:,}.",
                )
    if families.says_layer_shapes(config):
        for block in range(blocks):
            _check_parts(config, block)


def _check_parts(config: Mapping[str, Any], block: int) -> None:
    """Raise `CheckpointError` for a block of which one kind of head is missing, or all."""
    heads, groups, neurons = (
        families.layer_setting(config, name, block) for name in families.LAYER_FIELDS
    )
    if bool(heads) != bool(groups) or (groups and heads % groups):
        raise _refuse(
            f"layer_num_key_value_heads of block {block}",
            groups,
            f", which does not divide its {heads} attention heads",
        )
    if not heads and not neurons:
        raise CheckpointError(
            f"config.json gives block {block} neither attention heads nor MLP neurons.",
            "Give each block at least one of the two parts.",
        )


def _check_layers(config: Mapping[str, Any]) -> None:
    kinds = config.get("layer_types")
    if kinds is None:
        return
    blocks = families.setting(config, "num_hidden_layers")
    if not isinstance(kinds, list):
        raise _refuse("layer_types", kinds, "", "It must be a list with one name per block.")
    if len(kinds) != blocks:
        raise CheckpointError(
            f"config.json lists {len(kinds)} layer_types for {blocks} blocks "
            "(num_hidden_layers); stock transformers refuses that.",
            "Correct layer_types to one entry per block, or remove it.",
        )
    for kind in kinds:
        if kind not in _LAYERS:
            raise _refuse("layer_types", kind, " for a block", f"Known: {', '.join(_LAYERS)}.")
    if "sliding_attention" in kinds and not _has_window(config):
        raise _refuse(
            "layer_types",
            "sliding_attention",
            " for a block, but no window is in use (see sliding_window and use_sliding_window)",
        )


def _has_window(config: Mapping[str, Any]) -> bool:
    family = families.of(config).name
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        return False
    # All but LLaMA have a window by default, if the field is left out.
    return config.get("sliding_window", None if family == "llama" else 4096) is not None


def _check_rope(config: Mapping[str, Any]) -> None:
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: Mapping[str, Any] = config.get(field) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise _refuse(field, kind, " as its rope_type", f"Known: {', '.join(_ROPE_NEEDS)}.")
    for key in _ROPE_NEEDS[kind]:
        if key not in rope:
            raise CheckpointError(
                f"config.json sets {field} to rope_type '{kind}' without {key}, which it needs.",
                "Copy the field from the original config.json.",
            )
    for key in _ROPE_NUMBERS:
        if key in rope and not (_NUMBER.accepts(rope[key]) and rope[key] > 0):
            if rope[key] is None and key == _ROPE_BEFORE and kind not in _ROPE_STRETCHED:
                continue
            raise _refuse(f"{field}.{key}", rope[key], "", "It must be a number above 0.")
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        if not isinstance(rope[key], list) or not all(map(_NUMBER.accepts, rope[key])):
            raise _refuse(f"{field}.{key}", rope[key], "", "It must be a list of numbers.")
    theta = config.get("rope_theta", 1.0)
    if "rope_theta" not in rope and not (_NUMBER.accepts(theta) and theta > 0):
        raise _refuse("rope_theta", theta, "", "It must be a number above 0.")


def _check_values(config: Mapping[str, Any]) -> None:
    vocabulary = families.setting(config, "vocab_size")
    pad = config.get("pad_token_id")
    if isinstance(vocabulary, int) and pad is not None and not -vocabulary <= pad < vocabulary:
        raise _refuse(
            "pad_token_id",
            pad,
            f", but the embedding has only {vocabulary:,} rows (0 to {vocabulary - 1:,}); stock "
            "transformers cannot build that model",
            "Set pad_token_id to null, or to the id of an existing token.",
        )
    name = config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise _refuse("hidden_act", name, "", f"Known: {', '.join(_ACTIVATIONS)}.")
    spread = config.get("initializer_range", 0.0)
    if spread < 0 or (families.of(config).name == "llama" and spread > 1):
        raise _refuse("initializer_range", spread, "", "It must be between 0.0 and 1.0.")
    if "use_return_dict" in config:
        raise _refuse(
            "use_return_dict",
            config["use_return_dict"],
            ", a field that stock transformers cannot set",
            "Remove it from config.json.",
        )
    for field in DTYPE_FIELDS:
        value = config.get(field)
        if value is not None and (not isinstance(value, str) or plain_dtype(value) not in _DTYPES):
            raise _refuse(
                field, value, "", f"Known: {', '.join(_DTYPES)}. The weights' own format counts."
            )
    labels = config.get("id2label")
    if labels is not None and not (isinstance(labels, dict) and all(map(_is_whole, labels))):
        raise _refuse("id2label", labels, "", "It must map whole numbers to labels; remove it.")


def _is_whole(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _notes(config: Mapping[str, Any]) -> Sequence[str]:
    return [
        f"config.json gives {field} as '{config[field]}', which stock transformers refuses. It is "
        f"read as {plain_dtype(config[field])}, and variants are written with that name."
        for field in DTYPE_FIELDS
        if isinstance(config.get(field), str) and config[field].startswith(PREFIX)
    ]
