"""What a checkpoint is, from config.json and the safetensors headers alone.

`TensorIndex` (core.checkpoint.tensors) knows where every tensor's bytes are; `inspect` adds them
up; `core.checkpoint.locate` finds the folder that a name means. Nothing here imports torch or
transformers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint import config_rules, contents, families, other_formats, quantized
from core.checkpoint.healed import healed_by
from core.checkpoint.imported import Imported
from core.checkpoint.tensors import (
    INDEX,
    SINGLE,
    Shard,
    TensorEntry,
    TensorIndex,
    content_key,
    dtype_code,
    dtype_name,
    read_config,
)
from core.checkpoint.tokenizer import TOKENIZER_FILES, tokenizer_info
from core.errors import CheckpointError
from core.runs.dtypes import BYTES, DTYPE_BYTES, computable

__all__ = [
    "INDEX",
    "SINGLE",
    "TOKENIZER_FILES",
    "CheckpointInfo",
    "FileState",
    "Shard",
    "TensorEntry",
    "TensorIndex",
    "check_tokenizer",
    "content_key",
    "dtype_code",
    "dtype_name",
    "file_state",
    "has_weights",
    "inspect",
    "read_config",
    "tokenizer_info",
]
FileState = tuple[tuple[str, int, int], ...]
"""Name, time of change in nanoseconds, and size in bytes of each file."""


def file_state(folder: Path, suffixes: tuple[str, ...] = (".json", ".safetensors")) -> FileState:
    """Return a value that changes when a checkpoint's files do.

    A link to a file that does not exist counts with a time and size of 0.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffixes):
                try:
                    stat = entry.stat()
                except OSError:
                    found.append((entry.name, 0, 0))
                else:
                    found.append((entry.name, stat.st_mtime_ns, stat.st_size))
    return tuple(sorted(found))


def has_weights(folder: Path) -> bool:
    """Whether the folder has safetensors weights."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def check_tokenizer(info: CheckpointInfo, *, needed: bool = True) -> None:
    """Raise `CheckpointError` if a ``needed`` tokenizer is missing or belongs to another model."""
    if needed and info.tokenizer is None:
        raise CheckpointError(
            f"There is no tokenizer in {info.path}.",
            f"Copy the tokenizer's files there ({', '.join(TOKENIZER_FILES)}).",
        )
    if info.tokenizer and info.tokenizer["text_size"] > info.vocab:
        raise CheckpointError(
            f"The tokenizer of {info.path} has {info.tokenizer['size']:,} tokens but the embedding "
            f"has only {info.vocab:,} rows; they are from different models.",
            "Copy the tokenizer that was saved with these weights into the folder.",
        )


# ---------------------------------------------------------------------------------------- inspect


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is; sizes in bytes, parameters as numbers of elements."""

    path: str
    family: str
    """llama, mistral, qwen2 or qwen3."""
    model_type: str
    """As in config.json; starts with depthcut_ if blocks have their own shapes."""
    architecture: str
    has_weights: bool
    """False if there was only config.json; shapes are then computed from it."""
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool
    """Whether the head shares the embedding's weight once loaded."""
    dtype: str
    parameters: int
    parts: dict[str, int]
    """Parameters of embedding, blocks, norm, head; a tied head counts as 0."""
    block_parameters: tuple[int, ...]
    block_modules: tuple[dict[str, int], ...]
    """Parameters by module kind (q_proj, ..., post_attention_layernorm), one dict per block."""
    block_shapes: tuple[dict[str, int], ...]
    """heads, kv_heads and intermediate of each block; 0 for a part that it lacks."""
    disk_bytes: int
    """Size of the weight files; 0 without weights."""
    memory_bytes: dict[str, int]
    """Weights in memory at each dtype."""
    kv_bytes_per_token: dict[str, int]
    """Key/value cache of all blocks at each dtype, per token and sequence."""
    tokenizer: dict[str, Any] | None
    """As `tokenizer_info` returns it."""
    shards: tuple[dict[str, Any], ...]
    """file and bytes of each weight file."""
    key: str
    """Cheap fingerprint of the weights (names, shapes, sampled bytes); empty without weights."""
    warnings: tuple[str, ...]
    unused_tensors: tuple[str, ...] = ()
    """Stored tensors that loading ignores."""
    unused_parameters: int = 0
    """Parameters in `unused_tensors`, which nothing else counts."""
    healed: str = ""
    """How the last cut was healed in closed form: refit, linear, scale; empty if it was not."""
    imported: Imported | None = None
    """The file of another format that the checkpoint, or the one it was cut from, was made from."""
    quantization: quantized.Quantization | None = None
    """How the weights are quantized; None if they are not. Everything else is as without."""

    @property
    def uniform(self) -> bool:
        """Whether all blocks have the same shapes."""
        return all(shape == self.block_shapes[0] for shape in self.block_shapes)

    @property
    def compute_dtype(self) -> str:
        """The stored format if it can be computed in, else float32."""
        return computable(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the parameters as they are stored; of the files, if the format is not known."""
        width = BYTES.get(self.dtype)
        if width is None:
            return self.disk_bytes
        return quantized.stored_bytes(self.parameters, self.quantization, width)

    def projections(self, block: int) -> dict[str, tuple[int, int]]:
        """Return the width out of and into each linear layer that a block has, by module name."""
        shape = self.block_shapes[block]
        hidden, inner = self.hidden, shape["intermediate"]
        query, key = shape["heads"] * self.head_dim, shape["kv_heads"] * self.head_dim
        found = {
            "q_proj": (query, hidden),
            "k_proj": (key, hidden),
            "v_proj": (key, hidden),
            "o_proj": (hidden, query),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        return {name: widths for name, widths in found.items() if all(widths)}

    def part_parameters(self, block: int, part: str) -> int:
        """Return the parameters of a block's attention or mlp, without the block's norms."""
        modules = self.block_modules[block]
        return sum(modules.get(kind, 0) for kind in families.PART_MODULES[part])

    def narrowing(self, block: int, neurons: int) -> int:
        """Return the parameters that go if a block's MLP keeps only ``neurons``.

        Each has a row of gate and up, and a column of down.
        """
        modules, now = self.block_modules[block], self.block_shapes[block]["intermediate"]
        rows = modules.get("gate_proj", 0) + modules.get("up_proj", 0)
        return (now - neurons) * (rows // now + self.hidden) if now else 0

    def kv_bytes(self, batch: int, tokens: int, dtype: str | None = None) -> int:
        """Return the key/value cache in bytes for ``batch`` sequences of ``tokens`` tokens."""
        per_token = self.kv_bytes_per_token
        return batch * tokens * per_token.get(dtype or self.dtype, per_token["float32"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = dataclasses.asdict(self)
        value["parameters"] = {"total": self.parameters, **self.parts}
        del value["parts"]
        return json.loads(json.dumps(value | {"uniform": self.uniform}))


def inspect(path: str | Path, *, allow_config_only: bool = True) -> CheckpointInfo:
    """Return what the checkpoint in a folder is, reading config and headers only.

    Raises `CheckpointError` if it is damaged, of an unsupported kind, or (with
    ``allow_config_only=False``) without weights. A missing or foreign tokenizer is only a warning.
    """
    folder = Path(path)
    config = read_config(folder / "config.json")
    families.of(config)
    other_formats.check(folder)
    index = None
    if not allow_config_only or has_weights(folder) or _has_pickles(folder):
        index = TensorIndex.read(folder)
    tokenizer = tokenizer_info(folder)
    key = content_key(folder, index) if index else ""
    found = describe(str(folder), config, index, tokenizer, key)
    return dataclasses.replace(found, imported=Imported.read(folder), healed=healed_by(folder))


def _has_pickles(folder: Path) -> bool:
    return any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pth"))


def describe(
    path: str,
    config: Mapping[str, Any],
    index: TensorIndex | None,
    tokenizer: dict[str, Any] | None,
    key: str = "",
) -> CheckpointInfo:
    """Add up config and tensor shapes; without ``index`` shapes are computed from the config."""
    family = families.of(config)
    quantization, index = quantized.read(config, index, path)
    notes = config_rules.check(config)
    found = contents.compare(config, index) if index else None
    if index is None or found is None:
        shapes = families.expected_shapes(config)
        dtypes: Counter[str] = Counter({config_rules.declared_dtype(config): 1})
        tied = bool(families.setting(config, "tie_word_embeddings"))
    else:
        shapes, tied = found.used, found.tied
        notes += found.notes
        dtypes = Counter()
        for name in shapes:
            dtypes[index.entries[name].dtype] += index.entries[name].parameters
    parts, modules = _add_up(shapes, families.setting(config, "num_hidden_layers"))
    head_dim = families.setting(config, "head_dim")
    block_shapes = tuple(_block_shape(shapes, b, head_dim) for b in range(len(modules)))
    kv_width = sum(2 * shape["kv_heads"] * head_dim for shape in block_shapes)
    total = sum(parts.values())
    vocab, hidden = shapes["model.embed_tokens.weight"]
    first = {name: max(s[name] for s in block_shapes) for name in block_shapes[0]}
    return CheckpointInfo(
        path=path,
        family=family.name,
        model_type=str(config.get("model_type") or family.name),
        architecture=(config.get("architectures") or [family.architecture])[0],
        has_weights=index is not None,
        blocks=len(modules),
        hidden=hidden,
        intermediate=first["intermediate"],
        heads=first["heads"],
        kv_heads=first["kv_heads"],
        head_dim=head_dim,
        vocab=vocab,
        context=families.setting(config, "max_position_embeddings"),
        tied=tied,
        dtype=dtypes.most_common(1)[0][0],
        parameters=total,
        parts=parts,
        block_parameters=tuple(sum(m.values()) for m in modules),
        block_modules=modules,
        block_shapes=block_shapes,
        disk_bytes=sum(shard.size for shard in index.shards) if index else 0,
        memory_bytes={
            name: quantized.stored_bytes(total, quantization, width)
            for name, width in DTYPE_BYTES.items()
        },
        kv_bytes_per_token={name: kv_width * width for name, width in DTYPE_BYTES.items()},
        tokenizer=tokenizer,
        shards=tuple({"file": s.file, "bytes": s.size} for s in (index.shards if index else ())),
        key=key,
        warnings=(*_warnings(index, tokenizer, vocab, dtypes), *notes),
        unused_tensors=found.unused if found else (),
        unused_parameters=found.unused_parameters if found else 0,
        quantization=quantization,
    )


def _add_up(
    shapes: Mapping[str, families.Shape], blocks: int
) -> tuple[dict[str, int], tuple[dict[str, int], ...]]:
    """Return parameters per part, and per block and module kind."""
    parts = {"embedding": 0, "blocks": 0, "norm": 0, "head": 0}
    modules: list[dict[str, int]] = [{} for _ in range(blocks)]
    for name, shape in shapes.items():
        size = families.count(shape)
        parts[families.part_of(name)] += size
        block = families.block_of(name)
        if block is not None:
            kind = families.module_of(name)
            modules[block][kind] = modules[block].get(kind, 0) + size
    return parts, tuple(modules)


def _block_shape(shapes: Mapping[str, families.Shape], block: int, head_dim: int) -> dict[str, int]:
    """Return the sizes of a block; 0 of what a part that it lacks would have."""

    def rows(module: str) -> int:
        return shapes.get(f"model.layers.{block}.{module}.weight", (0,))[0]

    return {
        "heads": rows("self_attn.q_proj") // head_dim,
        "kv_heads": rows("self_attn.k_proj") // head_dim,
        "intermediate": rows("mlp.gate_proj"),
    }


def _warnings(
    index: TensorIndex | None,
    tokenizer: dict[str, Any] | None,
    vocab: int,
    dtypes: Collection[str],
) -> Iterable[str]:
    if index is None:
        yield (
            "There is only config.json: shapes are computed from it, and the model cannot be "
            "loaded."
        )
    if tokenizer is None:
        yield "There is no tokenizer: this checkpoint cannot read or write text."
    elif tokenizer["text_size"] > vocab:
        yield (
            f"The tokenizer has {tokenizer['size']:,} tokens but the embedding has only {vocab:,} "
            "rows; they are from different models."
        )
    elif tokenizer["size"] > vocab:
        names = [name for name, i in tokenizer["special_beyond"].items() if i >= vocab]
        yield (
            f"The tokenizer has {len(names)} special {'token' if len(names) == 1 else 'tokens'} "
            f"({', '.join(names[:3])}{', ...' if names[3:] else ''}) beyond the {vocab:,} rows of "
            "the embedding. Ordinary text never produces them; text that spells one "
            "out is read as ordinary characters."
        )
    if index and len(dtypes) > 1:
        yield "The weights are stored in more than one dtype; dtype is the most common one."
    if index and not set(dtypes) & set(BYTES):
        yield f"The weights are stored as {next(iter(dtypes))}, a format of unknown size."
