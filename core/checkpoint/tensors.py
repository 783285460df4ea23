"""Where every tensor of a checkpoint is: safetensors headers and the index file, no torch."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import outside
from core.errors import CheckpointError
from core.runs.dtypes import BYTES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_STORED = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32",
    "U64": "uint64",
}  # fmt: skip
_MAX_HEADER = 100_000_000
"""Bytes; safetensors refuses longer ones too."""
_MOST_ITEMS = 2_000_000
"""Values in a header: 200,000 tensors. The largest model of the supported families has 1,200."""
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 255
"""Bytes of a file name; every common file system allows as many."""
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")
SHARDS_KEPT = 32
"""Headers whose parts are kept; one of 32 blocks takes about 200 KB."""
LONGEST_KEPT = 1 << 20
"""Bytes of a header that is kept."""
_SAMPLE = 1024
_CHUNK = 8 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is."""

    name: str
    file: str
    dtype: str
    """The name that transformers uses: float32, bfloat16, ..."""
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
    """Return the transformers name of a safetensors dtype: BF16 -> bfloat16."""
    return _STORED.get(code, code.lower())


def dtype_code(name: str) -> str:
    """Return the safetensors code of a dtype: bfloat16 -> BF16."""
    return next((code for code, known in _STORED.items() if known == name), name.upper())


def parse_header(file: str, size: int, header: bytes, advice: str = "Download it again.") -> Shard:
    """Read a safetensors header (the JSON after the 8-byte length) of a file of ``size`` bytes.

    Raises `CheckpointError` with ``advice`` if it is damaged or does not describe exactly the
    file's bytes.
    """
    try:
        table = outside.loads(header, most_items=_MOST_ITEMS)
        if not isinstance(table, dict):
            raise outside.Malformed("it is not a JSON object")
        metadata = table.pop("__metadata__", None)
    except outside.Malformed as error:
        raise _unreadable(file, error, advice) from error
    return _shard_of(file, size, 8 + len(header), table, metadata, advice)


def _shard_of(
    file: str,
    size: int,
    base: int,
    table: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any] | None,
    advice: str,
) -> Shard:
    """Return a file of ``size`` bytes whose tensors begin at byte ``base``.

    ``table``: the header's tensors, name -> dtype, shape and data_offsets. Raises
    `CheckpointError` with ``advice`` if they do not cover exactly the bytes from ``base`` on.
    """
    try:
        if not isinstance(metadata, dict | None):
            raise outside.Malformed("__metadata__ is not a JSON object")
        notes = {key: str(value) for key, value in (metadata or {}).items()}
        tensors = sorted(
            (_entry(file, size, name, item, base) for name, item in table.items()),
            key=lambda tensor: (tensor.start, tensor.end),
        )
    except outside.Malformed as error:
        raise _unreadable(file, error, advice) from error
    end = base
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(
                f"{file} is damaged: '{tensor.name}' starts at byte {tensor.start:,} instead of "
                f"{end:,}.",
                advice,
            )
        end = tensor.end
    if end != size:
        state = "truncated" if size < end else "damaged"
        raise CheckpointError(
            f"{file} is {state}: it has {size:,} bytes, but its header describes {end:,}.", advice
        )
    return Shard(file, size, notes, tuple(tensors))


def _unreadable(file: str, error: outside.Malformed, advice: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: its header cannot be read ({error}).", advice)


def _entry(file: str, size: int, name: str, item: Any, base: int) -> TensorEntry:
    """Return a tensor of a header; raises `outside.Malformed` if it cannot lie in the file."""
    shown = outside.brief(name)
    if not isinstance(item, dict):
        raise outside.Malformed(f"'{shown}' is not a JSON object")
    code, shape, offsets = (item.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        raise outside.Malformed(f"'{shown}' has the dtype {outside.brief(code)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise outside.Malformed(
            f"the shape of '{shown}' is not a list of up to {_MOST_DIMENSIONS} sizes"
        )
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise outside.Malformed(f"the data_offsets of '{shown}' are not two numbers")
    try:
        sizes = tuple(outside.whole(n) for n in shape)
        start, end = (outside.whole(n) for n in offsets)
    except outside.Malformed as error:
        raise outside.Malformed(f"in '{shown}', {error}") from error
    dtype, stored = dtype_name(code), end - start
    width, elements = BYTES.get(dtype, 0), math.prod(sizes)
    # the smallest formats have four bits per element
    if stored < 0 or (stored != elements * width if width else elements > 2 * stored):
        raise outside.Malformed(
            f"'{shown}' occupies {stored} bytes, which does not match its shape {list(sizes)}"
        )
    return TensorEntry(name, file, dtype, sizes, base + start, base + end)


def read_shard(path: Path) -> Shard:
    """Read one safetensors file's header; raises `CheckpointError` if it is damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 0 < length <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path.name} is truncated or not a safetensors file ({size:,} bytes).",
                    "Download it again.",
                )
            header = handle.read(length)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror}.", "Check that the file exists and is readable."
        ) from error
    if len(header) > LONGEST_KEPT:
        return parse_header(path.name, size, header)
    return _parsed(path.name, size, header)


@functools.lru_cache(maxsize=SHARDS_KEPT)
def _parsed(file: str, size: int, header: bytes) -> Shard:
    """Return what a header says; of many variants with the same tensors it is the same."""
    return parse_header(file, size, header)


@dataclass(frozen=True)
class TensorIndex:
    """Every tensor of a checkpoint: name -> file, dtype, shape, byte range."""

    folder: Path | None
    shards: tuple[Shard, ...]

    @functools.cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @classmethod
    def read(cls, folder: Path) -> TensorIndex:
        """Read the headers of all shards.

        Raises `CheckpointError` for a missing or damaged shard, a tensor that is not where the
        index says, and weights that are available only as pickles.
        """
        index = folder / INDEX
        if (folder / SINGLE).is_file():
            return cls(folder, (read_shard(folder / SINGLE),))
        if not index.is_file():
            raise _no_weights(folder)
        weight_map = weight_map_of(index)
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
        """Return self if every tensor is where the index file says; raise otherwise."""
        entries = self.entries
        for name, file in weight_map.items():
            if name not in entries or entries[name].file != file:
                raise CheckpointError(
                    f"{INDEX} places '{name}' in {file}, but it is not there.",
                    "Download the checkpoint again; its files are from different versions.",
                )
        return self

    def read_bytes(self, entry: TensorEntry) -> bytes:
        """Return one tensor's bytes."""
        assert self.folder is not None, "remote weights have headers only"
        with (self.folder / entry.file).open("rb") as handle:
            handle.seek(entry.start)
            return handle.read(entry.end - entry.start)


def weight_map_of(index: Path) -> dict[str, str]:
    """Return an index file's tensor name -> weight file, all beside the index.

    Raises `CheckpointError` if it lists none, or a file somewhere else.
    """
    table = read_config(index)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", "Download it again.")
    for file in set(map(str, weight_map.values())):
        if not file.isprintable() or len(file.encode()) > _LONGEST_NAME or Path(file).name != file:
            raise CheckpointError(
                f"{index} lists '{outside.brief(file)}', which is not a file next to it.",
                "Download it again.",
            )
    return {name: str(file) for name, file in weight_map.items()}


def _no_weights(folder: Path) -> CheckpointError:
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    pickles = sorted(p.name for pattern in patterns for p in folder.glob(pattern))
    pickles = [name for name in pickles if name not in ("training_args.bin", "optimizer.pt")]
    if pickles:
        return CheckpointError(
            f"The weights in {folder} are available only as pickle files ({pickles[0]}), which "
            "can execute code when loaded.",
            "Convert them once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).",
        )
    return CheckpointError(
        f"{folder} has a config.json but no weights ({SINGLE} or {INDEX}).",
        "Give a folder with weights; config.json alone is enough for dry runs and random weights.",
    )


def read_config(path: Path, content: bytes | None = None) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; raises `CheckpointError` if it is damaged.

    ``content``: the file's bytes, if they have been read already.
    """
    try:
        value = outside.loads(outside.data(path) if content is None else content)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror}.", "Check that the file exists and is readable."
        ) from error
    except outside.Malformed as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}).", "Download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not contain a JSON object.", "Download it again.")
    return value


def content_key(path: str | Path, index: TensorIndex | None = None, *, full: bool = False) -> str:
    """Return a hash (32 hex digits) of the weights' content, however they are sharded.

    Names, dtypes, shapes and three samples of 1 KiB per tensor; with ``full`` every byte.
    """
    folder = Path(path)
    index = index or TensorIndex.read(folder)
    digest = hashlib.sha256()
    handles = {s.file: (folder / s.file).open("rb", buffering=_SAMPLE) for s in index.shards}
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
