"""Python code in a checkpoint folder: only the file that Depthcut wrote itself is ever passed on.

``auto_map`` in a config makes transformers run Python files of the folder, or of a repository on
the Hub, if it is loaded with ``trust_remote_code=True``. Everything Depthcut supports loads with
stock classes, or with its own `core.model.modeling_depthcut`; so foreign code is never needed.
"""

from __future__ import annotations

import copy as copying
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.checkpoint import families
from core.checkpoint.drop import Removal
from core.errors import CheckpointError

MODELLING = Path(__file__).parents[1] / "model" / "modeling_depthcut.py"
"""Saved beside the weights if the blocks have different shapes."""
_EARLIER = (
    "3255af222125a55d5fad3db11903a74ae8c3f19d8f23be01e51a21033c0915b5",
    "3be563b82ab7ebaf81a759ae319e08ce8dbf2c236f5806972c996664607480fa",
)
"""SHA-256 of what earlier versions saved there."""
PER_LAYER = "per_layer_config"
"""transformers' own field for the sizes of single blocks: block -> fields that differ."""
_CLASS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_CODE_KEYS = ("auto_map", "custom_pipelines")
"""Fields that name Python code for transformers to run."""
_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files in which transformers looks for them."""


def class_name(family: str) -> str:
    """Return the stem of Depthcut's class names for a family: ``DepthcutLlama``."""
    return f"Depthcut{_CLASS[family]}"


def without_code(value: Any) -> Any:
    """Return a JSON value without the fields that name code, at any depth."""
    if isinstance(value, Mapping):
        return {k: without_code(v) for k, v in value.items() if k not in _CODE_KEYS}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def with_own_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` naming no code but Depthcut's own, and that only if its blocks need it.

    The blocks' sizes are then also given in transformers' own terms (`per_layer_config`).
    """
    result = _with_auto_map(config)
    if families.is_custom(config):
        result.pop(PER_LAYER, None)
        if sizes := per_layer_config(config):
            result[PER_LAYER] = sizes
    return result


def _with_auto_map(config: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = without_code(config)
    if families.is_custom(config):
        name = class_name(families.of(config).name)
        result["auto_map"] = {
            "AutoConfig": f"{MODELLING.stem}.{name}Config",
            "AutoModelForCausalLM": f"{MODELLING.stem}.{name}ForCausalLM",
        }
    return result


def with_layer_sizes(
    config: Mapping[str, Any], sizes: Sequence[Sequence[int]], **added: bool
) -> dict[str, Any]:
    """Return the config of Depthcut's modelling code with these ``sizes`` of the blocks.

    ``sizes`` are lists with one number per block, in the order of `families.LAYER_FIELDS`;
    ``added`` are the flags of `families.ADDED_BIAS`.
    """
    family = families.of(config)
    name = class_name(family.name)
    result = {key: copying.deepcopy(value) for key, value in without_code(config).items()}
    result |= {field: families.setting(config, field) for field in families.LAYER_FIELDS}
    result |= {
        "head_dim": families.setting(config, "head_dim"),
        "model_type": families.CUSTOM_PREFIX + family.name,
        "architectures": [f"{name}ForCausalLM"],
        **{f: [*own] for f, own in zip(families.LAYER_FIELDS.values(), sizes, strict=True)},
        **added,
    }
    return with_own_code(result)


def without_parts(
    config: Mapping[str, Any], shapes: Sequence[Mapping[str, int]], removal: Removal
) -> dict[str, Any]:
    """Return the config of the model without the parts of ``removal``; whole blocks stay.

    ``shapes`` are the sizes of its blocks (`CheckpointInfo.block_shapes`).
    """
    if not removal.partial:
        return dict(config)
    narrow = removal.neurons

    def sizes(field: str, part: str) -> list[int]:
        lost = getattr(removal, part)
        left = narrow if part == "mlp" else {}
        return [
            0 if block in lost else left.get(block, shape[field])
            for block, shape in enumerate(shapes)
        ]

    return with_layer_sizes(
        config,
        (sizes("heads", "attention"), sizes("kv_heads", "attention"), sizes("intermediate", "mlp")),
    )


def per_layer_config(config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return the blocks' sizes as transformers' configurations express them, by block number.

    transformers 5.24 has this field, but its LLaMA, Mistral and Qwen classes do not build blocks by
    it: they raise an error. Once they do build them, the modelling code is no longer needed.
    Biases of the output projections alone cannot be expressed, so with them this is empty: a class
    that read only the sizes would leave the biases out. Nor can a missing part, as 0 heads.
    """
    added = any(config.get(field) for field in families.ADDED_BIAS.values())
    if added or not families.is_custom(config) or not families.says_layer_shapes(config):
        return {}
    found = {
        str(block): {
            name: families.layer_setting(config, name, block) for name in families.LAYER_FIELDS
        }
        for block in range(families.setting(config, "num_hidden_layers"))
    }
    return found if all(all(sizes.values()) for sizes in found.values()) else {}


def copy(config: Mapping[str, Any], target: Path) -> bool:
    """Copy Depthcut's own modelling code into ``target`` if ``config`` needs it; return whether."""
    if families.is_custom(config):
        shutil.copyfile(MODELLING, target / MODELLING.name)
    return families.is_custom(config)


def copy_config(source: Path, target: Path) -> None:
    """Copy a file; of a JSON config, leave out the fields that name code."""
    if source.name in _CONFIGS:
        found = _read(source)
        clean = without_code(found)
        if clean != found:
            target.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
            return
    shutil.copyfile(source, target)


def foreign(folder: Path) -> list[str]:
    """Return what a checkpoint brings of others' code: Python files, and configs that name code.

    Only Depthcut's own file, byte for byte as this or an earlier version wrote it, with its own
    ``auto_map`` does not count.
    """
    files = [p.name for p in sorted(folder.glob("*.py")) if not _is_ours(p)]
    named = []
    for name in _CONFIGS:
        found = _read(folder / name)
        if isinstance(found, dict) and without_code(found) != found:
            try:
                own = name == "config.json" and found == _with_auto_map(found)
            except CheckpointError:  # a family that Depthcut does not know
                own = False
            if not own:
                keys = [k for k in _CODE_KEYS if f'"{k}"' in json.dumps(found)]
                named.append(f"{' and '.join(keys)} of {name}")
    return [*files, *named]


def is_trusted(folder: Path) -> bool:
    """Whether loading with ``trust_remote_code=True`` is needed and runs Depthcut's own file only.

    Whatever differs from the files that this version and earlier ones wrote is foreign.
    """
    own = folder / MODELLING.name
    config = _read(folder / "config.json")
    custom = isinstance(config, dict) and families.is_custom(config)
    return custom and own.is_file() and not foreign(folder)


def _is_ours(path: Path) -> bool:
    try:
        content = path.read_bytes() if path.name == MODELLING.name else b""
        return content == MODELLING.read_bytes() or (
            hashlib.sha256(content).hexdigest() in _EARLIER
        )
    except OSError:
        return False


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
