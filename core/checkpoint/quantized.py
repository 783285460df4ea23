"""Weight-only quantized checkpoints in torchao's safetensors layout, read from their headers.

A quantized weight ``q_proj.weight`` is stored as ``q_proj._weight_qdata`` (whole numbers, one byte
each) with ``q_proj._weight_scale`` and ``q_proj._weight_zero_point``; the file's metadata says how
they belong together. `read` shows such a checkpoint as the model it is: names, shapes and
parameters of the unquantized one. Two layouts are read, those that `core.quantize` writes:
``Int8Tensor`` (8 bits) and ``IntxUnpackedToInt8Tensor`` (4 bits, also one byte each).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from core import outside
from core.checkpoint import config_rules, families
from core.checkpoint.tensors import TensorEntry, TensorIndex
from core.errors import CheckpointError

LAYOUTS = {8: "Int8Tensor", 4: "IntxUnpackedToInt8Tensor"}
"""torchao's tensor class by bits; both compute on every device and are stored alike on all."""
CONFIGS = {"Int8WeightOnlyConfig": 8, "IntxWeightOnlyConfig": 4}
"""torchao's configuration of each, as config.json names it."""
DATA, SCALE, ZERO = "qdata", "scale", "zero_point"


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantized."""

    bits: int
    group: int | None
    """Weights that share a scale; None: one scale per output channel."""
    tensors: int = 0
    """Quantized tensors; 0 if there was only config.json."""
    parameters: int = 0
    """Elements of the quantized tensors."""
    stored_bytes: int = 0
    """Bytes of the quantized tensors with their scales, on disk and in memory."""

    @property
    def label(self) -> str:
        """int8 or int4."""
        return f"int{self.bits}"

    @property
    def words(self) -> str:
        """The format in words."""
        per = f"groups of {self.group}" if self.group else "one scale per output channel"
        return f"{self.label}, {per}"


def part_name(weight: str, part: str) -> str:
    """Return the stored name of one part of a weight: ``_weight_qdata`` beside ``weight``."""
    module, _, kind = weight.rpartition(".")
    return f"{module}._{kind}_{part}"


def read(
    config: Mapping[str, Any], index: TensorIndex | None, path: str = "The checkpoint"
) -> tuple[Quantization | None, TensorIndex | None]:
    """Return how a checkpoint is quantized (None if it is not), and its tensors unquantized.

    In the returned index a quantized weight has its own name and shape, the format of the rest,
    and the bytes of its whole numbers; its scales are left out.

    Raises `CheckpointError` for any other kind of quantization, and for missing parts.
    """
    declared = config.get("quantization_config")
    if not declared:
        return None, index
    kind = _kind_of(declared)
    bits = CONFIGS.get(kind)
    if bits is None:
        raise CheckpointError(
            f"{path} is quantized ({kind}), and only weight-only int8 and int4 by torchao is read.",
            "Give the unquantized checkpoint.",
        )
    if index is None:
        return Quantization(bits, _declared_group(declared)), None
    return _of_weights(config, index, bits, path)


def refuse(name: str, quantization: Quantization | None) -> None:
    """Raise `CheckpointError` if a checkpoint that is to be scored, cut or trained is quantized."""
    if quantization:
        raise CheckpointError(
            f"{name} is quantized ({quantization.label}), so its blocks cannot be scored, pruned, "
            "retrained, quantized again or exported.",
            "Prune first, then quantize: give the checkpoint that it was made from.",
        )


def stored_bytes(parameters: int, found: Quantization | None, width: int) -> int:
    """Return the bytes of all weights if those that are not quantized take ``width`` each."""
    left = parameters - (found.parameters if found else 0)
    return left * width + (found.stored_bytes if found else 0)


def _kind_of(declared: Any) -> str:
    """Return torchao's configuration class, or the name of another method."""
    if not isinstance(declared, dict):
        return "unknown"
    method = declared.get("quant_method")
    chosen = declared.get("quant_type")
    chosen = chosen.get("default") if isinstance(chosen, dict) else None
    if method == "torchao" and isinstance(chosen, dict):
        return outside.brief(chosen.get("_type"), 80)
    return outside.brief(method, 80) if isinstance(method, str) else "unknown"


def _declared_group(declared: Mapping[str, Any]) -> int | None:
    data = declared["quant_type"]["default"].get("_data")
    granularity = data.get("granularity") if isinstance(data, dict) else None
    inner = granularity.get("_data") if isinstance(granularity, dict) else None
    group = inner.get("group_size") if isinstance(inner, dict) else None
    return group if isinstance(group, int) and group > 0 else None


def _of_weights(
    config: Mapping[str, Any], index: TensorIndex, bits: int, path: str
) -> tuple[Quantization, TensorIndex]:
    entries = index.entries
    suffix = f"._weight_{DATA}"
    whole = {
        f"{name.removesuffix(suffix)}.weight": entry
        for name, entry in entries.items()
        if name.endswith(suffix)
    }
    if not whole:
        raise CheckpointError(
            f"config.json of {path} says that the weights are quantized, but none is.",
            "Download the checkpoint again.",
        )
    parts: dict[str, str] = {}
    groups: set[int | None] = set()
    for weight, data in whole.items():
        found = [part_name(weight, part) for part in (DATA, SCALE, ZERO)]
        missing = [name for name in found if name not in entries]
        if missing or weight in entries or len(data.shape) != 2:
            what = f"'{missing[0]}' is missing" if missing else f"'{weight}' is stored twice"
            raise CheckpointError(
                f"The quantized weights of {path} are incomplete: {what}.",
                "Quantize the checkpoint again, or download it again.",
            )
        parts |= dict.fromkeys(found, weight)
        groups.add(_group(data, entries[found[1]]))
    size = sum(entries[name].end - entries[name].start for name in parts)
    dtype = config_rules.declared_dtype(config)
    shards = tuple(
        replace(shard, tensors=tuple(_unquantized(shard.tensors, parts, dtype)))
        for shard in index.shards
    )
    count = sum(data.parameters for data in whole.values())
    group = min((g for g in groups if g), default=None)
    return Quantization(bits, group, len(whole), count, size), TensorIndex(index.folder, shards)


def _group(data: TensorEntry, scale: TensorEntry) -> int | None:
    """Return the weights per scale; None if a whole row has one."""
    columns = scale.shape[1] if len(scale.shape) == 2 else 1
    return data.shape[1] // columns if columns > 1 else None


def _unquantized(
    tensors: Iterable[TensorEntry], parts: Mapping[str, str], dtype: str
) -> Iterable[TensorEntry]:
    for entry in tensors:
        if entry.name not in parts:
            yield entry
        elif entry.name.endswith(f"_{DATA}"):
            yield replace(entry, name=parts[entry.name], dtype=dtype)


def is_projection(name: str) -> bool:
    """Whether a tensor is the weight of a block's linear layer, which is what gets quantized."""
    return (
        families.block_of(name) is not None
        and name.endswith("_proj.weight")
        and families.is_parameter(name)
    )
