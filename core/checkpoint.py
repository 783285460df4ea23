"""What a checkpoint is, from config.json and the safetensors headers alone.

`resolve` turns what the user typed into a folder, `TensorIndex` knows where every tensor's bytes
lie, and `inspect` tells what they add up to. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import families
from core.errors import CheckpointError
from core.progress import SILENT, Progress
from core.workspace import BOOKKEEPING, default_root, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "U16": ("uint16", 2), "U32": ("uint32", 4), "U64": ("uint64", 8),
}  # fmt: skip
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)
_MAX_HEADER = 100_000_000
_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")
_SAMPLE = 1024
_CHUNK = 8 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    file: str
    dtype: str
    """As transformers writes it: float32, bfloat16, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    end: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    file: str
    size: int
    """Bytes."""
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]
    """In the order of their bytes."""


def dtype_name(code: str) -> str:
    """Return transformers' name of a safetensors dtype: BF16 -> bfloat16."""
    return _STORED.get(code, (code.lower(), 0))[0]


def dtype_code(name: str) -> str:
    """Return the safetensors code of a dtype: bfloat16 -> BF16."""
    return next((code for code, (known, _) in _STORED.items() if known == name), name.upper())


def parse_header(file: str, size: int, header: bytes) -> Shard:
    """Read a safetensors header (the JSON after the 8-byte length) of a file of ``size`` bytes.

    Raises `CheckpointError` where it is damaged or does not describe exactly the file's bytes.
    """
    base = 8 + len(header)
    try:
        table = json.loads(header)
        metadata = {str(k): str(v) for k, v in (table.pop("__metadata__", None) or {}).items()}
        tensors = sorted(
            (_entry(file, name, item, base) for name, item in table.items()),
            key=lambda tensor: (tensor.start, tensor.end),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged: its header cannot be read ({error}).", "Download it again."
        ) from error
    end = base
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(
                f"{file} is damaged: '{tensor.name}' starts at byte {tensor.start:,}, not {end:,}.",
                "Download it again.",
            )
        end = tensor.end
    if end != size:
        state = "truncated" if size < end else "damaged"
        raise CheckpointError(
            f"{file} is {state}: it has {size:,} bytes, its header describes {end:,}.",
            "Download it again.",
        )
    return Shard(file, size, metadata, tuple(tensors))


def _entry(file: str, name: str, item: Mapping[str, Any], base: int) -> TensorEntry:
    dtype, width = _STORED.get(item["dtype"], (str(item["dtype"]).lower(), 0))
    shape = tuple(int(n) for n in item["shape"])
    start, end = (int(n) for n in item["data_offsets"])
    if width and end - start != math.prod(shape) * width:
        raise ValueError(f"'{name}' takes {end - start} bytes, its shape {list(shape)} another")
    return TensorEntry(name, file, dtype, shape, base + start, base + end)


def read_shard(path: Path) -> Shard:
    """Read one safetensors file's header; raises `CheckpointError` where it is damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 0 < length <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path.name} is truncated or no safetensors file ({size:,} bytes).",
                    "Download it again.",
                )
            header = handle.read(length)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror}.", "Check that the file is there and readable."
        ) from error
    return parse_header(path.name, size, header)


@dataclass(frozen=True)
class TensorIndex:
    """Every tensor of a checkpoint: name -> file, dtype, shape, byte range."""

    folder: Path | None
    shards: tuple[Shard, ...]

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @classmethod
    def read(cls, folder: Path) -> TensorIndex:
        """Read the headers of all shards.

        Raises `CheckpointError` for a missing or damaged shard, a tensor that is not where the
        index says, and weights that are only there as pickles.
        """
        index = folder / INDEX
        if (folder / SINGLE).is_file():
            return cls(folder, (read_shard(folder / SINGLE),))
        if not index.is_file():
            raise _no_weights(folder)
        weight_map = _weight_map(index)
        files = sorted(set(weight_map.values()))
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            raise CheckpointError(
                f"{len(absent)} of {len(files)} weight files are missing in {folder}: "
                f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}.",
                "Download them again into this folder.",
            )
        result = cls(folder, tuple(read_shard(folder / file) for file in files))
        return result.checked(weight_map)

    def checked(self, weight_map: Mapping[str, str]) -> TensorIndex:
        """Return self if every tensor lies where the index file says, else raise."""
        entries = self.entries
        for name, file in weight_map.items():
            if name not in entries or entries[name].file != file:
                raise CheckpointError(
                    f"{INDEX} says that '{name}' is in {file}, but it is not.",
                    "Download the checkpoint again; its files do not belong together.",
                )
        return self

    def read_bytes(self, entry: TensorEntry) -> bytes:
        """Return one tensor's bytes."""
        assert self.folder is not None, "remote weights have headers only"
        with (self.folder / entry.file).open("rb") as handle:
            handle.seek(entry.start)
            return handle.read(entry.end - entry.start)


def _weight_map(index: Path) -> dict[str, str]:
    table = read_config(index)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", "Download it again.")
    for file in weight_map.values():
        if Path(str(file)).name != file:
            raise CheckpointError(
                f"{index} names '{file}', which is not a file beside it.", "Download it again."
            )
    return weight_map


def _no_weights(folder: Path) -> CheckpointError:
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    pickles = sorted(p.name for pattern in patterns for p in folder.glob(pattern))
    pickles = [name for name in pickles if name not in ("training_args.bin", "optimizer.pt")]
    if pickles:
        return CheckpointError(
            f"The weights in {folder} are only there as a pickle ({pickles[0]}), which may run "
            "code when loaded.",
            "Only safetensors are read: load it once with transformers and save_pretrained it.",
        )
    return CheckpointError(
        f"{folder} has a config.json but no weights ({SINGLE} or {INDEX}).",
        "Give a folder with weights; config.json alone will do for dry runs and random weights.",
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; raises `CheckpointError` where it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror}.", "Check that the file is there and readable."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}).", "Download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.", "Download it again.")
    return value


# ---------------------------------------------------------------------------------------- resolve


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as a Hub id (owner/name, optionally @revision) and is no folder."""
    return bool(_HUB_ID.match(name)) and not Path(name).expanduser().exists()


def local_folder(name: str) -> Path | None:
    """Return the checkpoint folder that ``name`` means on this machine, or None if it has none.

    A folder, a run's folder (by path, or by id in the workspace), or ``demo``.
    """
    if name == "demo" and not Path("demo").is_dir():
        from core.demo import CHECKPOINT

        return CHECKPOINT if (CHECKPOINT / "config.json").is_file() else None
    given = Path(name).expanduser()
    for folder in (given, default_root() / name):
        for inner in (folder, folder / "merged"):
            if (inner / "config.json").is_file():
                return inner
    return None


def resolve(
    name: str | Path,
    progress: Progress = SILENT,
    *,
    allow_config_only: bool = False,
    need_tokenizer: bool = True,
) -> Path:
    """Return the folder of the checkpoint that ``name`` means, checked by its headers.

    ``name``: a folder, a run's folder that holds a checkpoint (itself or in ``merged/``), a run's
    id, a Hub id (downloaded into the Hub's cache), or ``demo``. With ``allow_config_only`` a
    folder with only config.json will do, and only that much is downloaded.

    Raises `CheckpointError` with what is wrong and what to do.
    """
    name = str(name)
    folder = local_folder(name)
    if folder is None:
        if not is_hub_id(name):
            raise _not_there(name)
        from core import hub

        folder = hub.fetch(name, progress, config_only=allow_config_only)
    config_only = allow_config_only and not has_weights(folder)
    check(folder, config_only=config_only, need_tokenizer=need_tokenizer and not config_only)
    return folder


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _not_there(name: str) -> CheckpointError:
    folder = Path(name).expanduser()
    if name == "demo":
        return CheckpointError(
            "The bundled demo checkpoint is not there.",
            "Train it with: python -m core.demo.train.",
        )
    if folder.is_file():
        return CheckpointError(
            f"{name} is a file, not a checkpoint folder.",
            "Give the folder that holds config.json and the safetensors files.",
        )
    if not folder.is_dir():
        return CheckpointError(
            f"There is no folder {name}, and it is not a Hub id (owner/name).",
            "Give a checkpoint folder, a run's folder, a Hub id, or demo.",
        )
    if (folder / "adapter").is_dir() or (folder / "adapter_config.json").is_file():
        return CheckpointError(
            f"{name} holds an adapter, not a whole checkpoint.",
            "Give its merged/ folder: retrain with --merge writes one.",
        )
    if (folder / BOOKKEEPING).is_dir():
        status = read_json(folder / BOOKKEEPING / "status.json") or {}
        return CheckpointError(
            f"The run {name} holds no checkpoint (its state: {status.get('state', 'unknown')}).",
            "Give a finished prune, width or merged retrain run.",
        )
    return CheckpointError(
        f"{name} has no config.json, so it is not a checkpoint.",
        "Give a Hugging Face checkpoint folder.",
    )


def check(folder: Path, *, config_only: bool = False, need_tokenizer: bool = True) -> None:
    """Raise `CheckpointError` for the first thing that makes a checkpoint unusable."""
    info = inspect(folder, allow_config_only=config_only)
    if need_tokenizer and info.tokenizer is None:
        raise CheckpointError(
            f"There is no tokenizer in {folder}.",
            f"Put the tokenizer's files there ({', '.join(TOKENIZER_FILES)}).",
        )
    if info.tokenizer and info.tokenizer["size"] > info.vocab:
        raise CheckpointError(
            f"The tokenizer of {folder} has {info.tokenizer['size']:,} tokens, the embedding only "
            f"{info.vocab:,} rows: they do not belong together.",
            "Put the tokenizer that was saved with these weights into the folder.",
        )


# ---------------------------------------------------------------------------------------- inspect


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is; sizes in bytes, parameters as numbers of elements."""

    path: str
    family: str
    """llama, mistral, qwen2 or qwen3."""
    model_type: str
    """As in config.json; starts with depthcut_ where blocks have their own shapes."""
    architecture: str
    has_weights: bool
    """False where only config.json was there; shapes are then computed from it."""
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool
    dtype: str
    parameters: int
    parts: dict[str, int]
    """Parameters of embedding, blocks, norm, head; a tied head counts as none."""
    block_parameters: tuple[int, ...]
    block_modules: tuple[dict[str, int], ...]
    """Parameters by module kind (q_proj, ..., post_attention_layernorm), one dict a block."""
    block_shapes: tuple[dict[str, int], ...]
    """heads, kv_heads and intermediate of each block."""
    disk_bytes: int
    """Size of the weight files; 0 without weights."""
    memory_bytes: dict[str, int]
    """Weights in memory at each dtype."""
    kv_bytes_per_token: dict[str, int]
    """Key/value cache of all blocks at each dtype, per token and sequence."""
    tokenizer: dict[str, Any] | None
    """kind, file, size (highest id + 1)."""
    shards: tuple[dict[str, Any], ...]
    """file and bytes of each weight file."""
    key: str
    """Identifies the weights' content cheaply (names, shapes, sampled bytes); empty without."""
    warnings: tuple[str, ...]

    @property
    def uniform(self) -> bool:
        """Whether all blocks have the same shapes."""
        return all(shape == self.block_shapes[0] for shape in self.block_shapes)

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

    Raises `CheckpointError` where it is damaged, of an unsupported kind, or (with
    ``allow_config_only=False``) without weights. A missing or foreign tokenizer is a warning here.
    """
    folder = Path(path)
    config = read_config(folder / "config.json")
    families.of(config)
    index = None
    if not allow_config_only or has_weights(folder) or _has_pickles(folder):
        index = TensorIndex.read(folder)
    tokenizer = tokenizer_info(folder)
    key = content_key(folder, index) if index else ""
    return describe(str(folder), config, index, tokenizer, key)


def _has_pickles(folder: Path) -> bool:
    return any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pth"))


def describe(
    path: str,
    config: Mapping[str, Any],
    index: TensorIndex | None,
    tokenizer: dict[str, Any] | None,
    key: str = "",
) -> CheckpointInfo:
    """Add up config and tensor shapes; ``index`` None computes the shapes from the config."""
    family = families.of(config)
    _check_config(config)
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path} is quantised ({_quantisation(config)}).",
            "Give the unquantised checkpoint; blocks of quantised weights cannot be scored.",
        )
    if index is None:
        shapes = families.expected_shapes(config)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    else:
        entries = index.entries
        check_tensors(config, entries)
        shapes = {n: e.shape for n, e in entries.items() if families.is_parameter(n)}
        sizes: Counter[str] = Counter()
        for entry in entries.values():
            sizes[entry.dtype] += entry.parameters
        dtype = sizes.most_common(1)[0][0]
    tied = bool(families.setting(config, "tie_word_embeddings"))
    if tied:
        shapes = {n: s for n, s in shapes.items() if families.part_of(n) != "head"}
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
        dtype=dtype,
        parameters=total,
        parts=parts,
        block_parameters=tuple(sum(m.values()) for m in modules),
        block_modules=modules,
        block_shapes=block_shapes,
        disk_bytes=sum(shard.size for shard in index.shards) if index else 0,
        memory_bytes={name: total * width for name, width in DTYPE_BYTES.items()},
        kv_bytes_per_token={name: kv_width * width for name, width in DTYPE_BYTES.items()},
        tokenizer=tokenizer,
        shards=tuple({"file": s.file, "bytes": s.size} for s in (index.shards if index else ())),
        key=key,
        warnings=tuple(_warnings(index, tokenizer, vocab, shapes, tied)),
    )


def _quantisation(config: Mapping[str, Any]) -> str:
    details = config["quantization_config"]
    return str(details.get("quant_method", "unknown")) if isinstance(details, dict) else "unknown"


def _check_config(config: Mapping[str, Any]) -> None:
    for name in _SIZES:
        try:
            value = families.setting(config, name)
        except (TypeError, ZeroDivisionError):
            value = None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            if families.is_custom(config) and isinstance(config.get(name), list):
                continue
            raise CheckpointError(
                f"config.json gives {name} as {value!r}.", "It must be a whole number above 0."
            )


def check_tensors(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> None:
    """Raise `CheckpointError` where the weights are not those that the config describes."""
    wanted = families.setting(config, "num_hidden_layers")
    held = {b for b in map(families.block_of, entries) if b is not None}
    if held != set(range(wanted)):
        absent, extra = sorted(set(range(wanted)) - held), sorted(held - set(range(wanted)))
        which = f"block {absent[0]} is missing" if absent else f"block {extra[0]} is too many"
        raise CheckpointError(
            f"config.json says {wanted} blocks, the weights hold {len(held)} ({which}).",
            "Give a checkpoint whose config.json belongs to its weights.",
        )
    custom = families.is_custom(config)
    expected = _custom_names(config) if custom else families.expected_shapes(config)
    for name, shape in expected.items():
        if name not in entries:
            others = sum(other not in entries for other in expected) - 1
            more = f" and {others} more" if others else ""
            raise CheckpointError(
                f"The weights lack '{name}'{more}.",
                "Give a checkpoint whose config.json belongs to its weights.",
            )
        if not custom and entries[name].shape != shape:
            raise CheckpointError(
                f"'{name}' has the shape {list(entries[name].shape)}, config.json means "
                f"{list(shape)}.",
                "Give a checkpoint whose config.json belongs to its weights.",
            )


def _custom_names(config: Mapping[str, Any]) -> dict[str, families.Shape]:
    """The tensors a checkpoint with its own block shapes cannot do without (shapes left open)."""
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
               "input_layernorm", "post_attention_layernorm")  # fmt: skip
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for block in range(families.setting(config, "num_hidden_layers")):
        names += [f"model.layers.{block}.{module}.weight" for module in modules]
    if not families.setting(config, "tie_word_embeddings"):
        names.append("lm_head.weight")
    return dict.fromkeys(names, ())


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
    prefix = f"model.layers.{block}."
    return {
        "heads": shapes[prefix + "self_attn.q_proj.weight"][0] // head_dim,
        "kv_heads": shapes[prefix + "self_attn.k_proj.weight"][0] // head_dim,
        "intermediate": shapes[prefix + "mlp.gate_proj.weight"][0],
    }


def _warnings(
    index: TensorIndex | None,
    tokenizer: dict[str, Any] | None,
    vocab: int,
    shapes: Mapping[str, families.Shape],
    tied: bool,
) -> Iterable[str]:
    if index is None:
        yield "Only config.json is there: shapes are computed from it, and nothing can be loaded."
    if tokenizer is None:
        yield "There is no tokenizer: text cannot be read or written with this checkpoint."
    elif tokenizer["size"] > vocab:
        yield (
            f"The tokenizer has {tokenizer['size']:,} tokens, the embedding only {vocab:,} rows: "
            "they do not belong together."
        )
    if index and len({e.dtype for e in index.entries.values()}) > 1:
        yield "The weights are stored in more than one dtype; dtype names the most common."
    if index and tied and any(families.part_of(n) == "head" for n in index.entries):
        yield "The head is tied to the embedding; the stored lm_head is not used or counted."


# -------------------------------------------------------------------------------------- tokenizer


def tokenizer_info(folder: Path) -> dict[str, Any] | None:
    """Return the tokenizer's kind, file and size (highest id + 1), or None without one.

    Raises `CheckpointError` where its file is broken.
    """
    for file in TOKENIZER_FILES:
        path = folder / file
        if not path.is_file():
            continue
        kind, ids = _token_ids(path)
        extra = folder / "added_tokens.json"
        if file != "tokenizer.json" and extra.is_file():
            ids += [int(i) for i in read_config(extra).values()]
        return {"kind": kind, "file": file, "size": max(ids, default=-1) + 1}
    return None


def _token_ids(path: Path) -> tuple[str, list[int]]:
    if path.name == "tokenizer.model":
        return "sentencepiece", list(range(_sentencepiece_size(path.read_bytes())))
    table = read_config(path)
    if path.name == "vocab.json":
        return "BPE", [int(i) for i in table.values()]
    model = table.get("model") or {}
    vocab = model.get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [int(token["id"]) for token in table.get("added_tokens") or []]
    return str(model.get("type") or "BPE"), ids


def _sentencepiece_size(data: bytes) -> int:
    """Count the pieces of a sentencepiece model: field 1 of its protocol buffer, repeated."""
    pieces = position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 == 2:
            length, position = _varint(data, position)
            position += length
            pieces += tag >> 3 == 1
        elif tag & 7 == 0:
            _, position = _varint(data, position)
        else:
            position += 8 if tag & 7 == 1 else 4
    return pieces


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return value, position


# ------------------------------------------------------------------------------------ content key


def content_key(path: str | Path, index: TensorIndex | None = None, *, full: bool = False) -> str:
    """Return a hash (32 hex digits) of the weights' content, whatever way they are sharded.

    Names, dtypes, shapes and three samples of 1 KiB per tensor; with ``full`` every byte.
    """
    folder = Path(path)
    index = index or TensorIndex.read(folder)
    digest = hashlib.sha256()
    handles = {shard.file: (folder / shard.file).open("rb") for shard in index.shards}
    try:
        for name, entry in sorted(index.entries.items()):
            digest.update(f"{name}|{entry.dtype}|{entry.shape}|".encode())
            handle = handles[entry.file]
            for start, length in _pieces(entry.start, entry.end, full):
                handle.seek(start)
                digest.update(handle.read(length))
    finally:
        for handle in handles.values():
            handle.close()
    return digest.hexdigest()[:32]


def _pieces(start: int, end: int, full: bool) -> Iterable[tuple[int, int]]:
    if full:
        return [(at, min(_CHUNK, end - at)) for at in range(start, end, _CHUNK)]
    if end - start <= 3 * _SAMPLE:
        return [(start, end - start)]
    middle = (start + end - _SAMPLE) // 2
    return [(start, _SAMPLE), (middle, _SAMPLE), (end - _SAMPLE, _SAMPLE)]
