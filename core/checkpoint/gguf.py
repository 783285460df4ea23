"""What a GGUF file holds: metadata and where each tensor's bytes lie, read within bounds.

The format (version 2 and 3, little-endian): the magic ``GGUF``, a version, the numbers of tensors
and of metadata entries, the entries, the table of tensors, and from the next multiple of the
alignment on the tensors' data. Nothing here imports torch, transformers or the gguf library, so a
page can read a file's header, and a damaged file is one clear sentence.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import outside
from core.errors import CheckpointError

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those that can be imported; Mistral's files name llama."""
BLOCKS: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
}
"""Storage of a tensor that can be read -> its number in the file, values and bytes per block.

Files of type Q4_K_M and the like mix them: rows that are not a multiple of 256 use Q5_0 or Q8_0.
"""
PLAIN = ("F32", "F16", "BF16")
"""Storage that is not quantized."""
_NAMES = {number: name for name, (number, _, _) in BLOCKS.items()}
_OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Names of other storage, for the message that refuses it."""
MOST_TENSORS = 100_000
MOST_ENTRIES = 65_536
MOST_STRING = 1 << 24
MOST_KEPT = 4096
"""Numbers of a metadata array that are kept; of a longer one, or of strings, only the length."""
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Length:
    """The length of a metadata array whose values are not kept."""

    items: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: [out, in]."""
    storage: str
    """A name of `BLOCKS`."""
    start: int
    """Byte in the file."""
    size: int
    """Bytes."""

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A GGUF file's metadata and tensors."""

    path: Path
    size: int
    """Bytes of the file."""
    architecture: str
    metadata: Mapping[str, Any] = field(repr=False)
    """Entry -> value; long arrays and arrays of strings as `Length`."""
    tensors: Mapping[str, Tensor] = field(repr=False)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry of this architecture: ``block_count`` for ``llama.block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def storage(self) -> dict[str, int]:
        """Number of tensors by storage, the most common one first."""
        return dict(Counter(tensor.storage for tensor in self.tensors.values()).most_common())

    @property
    def quantized(self) -> bool:
        """Whether any tensor is quantized."""
        return any(name not in PLAIN for name in self.storage)

    def floats(self, name: str) -> tuple[float, ...]:
        """Return the values of a small F32 tensor."""
        tensor = self.tensors[name]
        with self.path.open("rb") as handle:
            handle.seek(tensor.start)
            return struct.unpack(f"<{tensor.parameters}f", handle.read(tensor.size))


def is_gguf(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file that exists."""
    return str(name).lower().endswith(SUFFIX) and outside.is_file(name)


def only_file(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that holds exactly one, else None."""
    found = sorted(folder.glob(f"*{SUFFIX}")) if outside.is_folder(folder) else []
    return found[0] if len(found) == 1 else None


def read(path: Path) -> Header:
    """Read the header of a GGUF file and check that all of its tensors are there.

    Raises `CheckpointError` if it is not a GGUF file, truncated or damaged, one part of several,
    of an architecture that is not in `ARCHITECTURES`, or stored in a way that is not in `BLOCKS`.
    """
    _refuse_split(path.name, 0)
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _Reader(path, m).header()
    except ValueError:  # an empty file cannot be mapped
        raise _not_gguf(path, "it is empty") from None
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror or error}.", "Give a GGUF file."
        ) from error


def _not_gguf(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a GGUF file: {reason}.", "Give a .gguf file.")


def _refuse_split(name: str, count: int) -> None:
    match = _SPLIT.search(name)
    parts = int(match[2]) if match else count
    if parts > 1:
        which = f"part {int(match[1])} of {parts}" if match else f"one of {parts} parts"
        raise CheckpointError(
            f"{name} is {which}; split GGUF files are not read.",
            f"Merge them first: llama-gguf-split --merge {name} merged.gguf.",
        )


class _Reader:
    """Walks through a file; every length is checked against what is left of it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._end = len(data)
        self._at = 0

    def header(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise _not_gguf(self._path, "it does not begin with GGUF")
        self._at = 4
        (version,) = self._numbers("I")
        if version & 0xFFFF == 0 and version:
            raise self._refused("It is big-endian.", "Convert it on a little-endian machine.")
        if version not in (2, 3):
            raise self._refused(
                f"It is GGUF version {version}; versions 2 and 3 are read.",
                "Convert the model again with a current llama.cpp.",
            )
        tensor_count, entry_count = self._numbers("QQ")
        if tensor_count > MOST_TENSORS or entry_count > MOST_ENTRIES:
            raise self._damaged(f"it declares {max(tensor_count, entry_count):,} entries")
        metadata = dict(self._entry() for _ in range(entry_count))
        _refuse_split(self._path.name, _count(metadata.get("split.count")))
        architecture = self._architecture(metadata)
        table = [self._declared() for _ in range(tensor_count)]
        if not table:
            raise self._refused("It holds no tensors (a vocabulary only).", "Give a whole model.")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise self._damaged(f"its alignment is {outside.quoted(alignment)}")
        begin = -(-self._at // alignment) * alignment
        tensors = [self._placed(begin, *declared) for declared in table]
        self._check_end(tensors)
        by_name = {tensor.name: tensor for tensor in tensors}
        if len(by_name) < len(tensors):
            raise self._damaged("a tensor's name occurs twice")
        return Header(self._path, self._end, architecture, metadata, by_name)

    def _architecture(self, metadata: Mapping[str, Any]) -> str:
        name = metadata.get("general.architecture")
        if not isinstance(name, str):
            raise self._damaged("it names no general.architecture")
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"{self._path} is a model of the architecture '{outside.brief(name)}', which is "
                "not supported.",
                "Supported: llama (also Mistral), qwen2 and qwen3.",
            )
        return name

    # ---------------------------------------------------------------------------------- tensors

    def _declared(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._numbers("I")
        if not 1 <= dimensions <= 4:
            raise self._damaged(f"{outside.quoted(name)} has {dimensions:,} dimensions")
        shape = self._numbers("Q" * dimensions)
        storage, offset = self._numbers("IQ")
        return name, tuple(reversed(shape)), storage, offset

    def _placed(
        self, begin: int, name: str, shape: tuple[int, ...], number: int, offset: int
    ) -> Tensor:
        storage = _NAMES.get(number)
        if storage is None:
            known = _OTHERS.get(number, f"number {number}")
            raise CheckpointError(
                f"{self._path} stores {outside.quoted(name)} as {known}, a quantization that is "
                "not read here.",
                f"Give a file with {', '.join(BLOCKS)} only.",
            )
        _, values, width = BLOCKS[storage]
        count = math.prod(shape)
        if not count or count > 1 << 48 or shape[-1] % values:
            raise self._damaged(
                f"{outside.quoted(name)} has shape {list(shape)}, which {storage} cannot store"
            )
        return Tensor(name, shape, storage, begin + offset, count // values * width)

    def _check_end(self, tensors: list[Tensor]) -> None:
        last = max(tensors, key=lambda tensor: tensor.start + tensor.size)
        needed = last.start + last.size
        if needed > self._end:
            raise CheckpointError(
                f"{self._path} is truncated: it has {self._end:,} bytes, but its tensors need "
                f"{needed:,}.",
                "Download it again.",
            )

    # --------------------------------------------------------------------------------- metadata

    def _entry(self) -> tuple[str, Any]:
        key = self._string()
        (kind,) = self._numbers("I")
        return key, self._value(kind, key)

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"{outside.quoted(key)} has the unknown type {kind}")
        inner, count = self._numbers("IQ")
        if inner in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[inner])
            if count <= MOST_KEPT:
                return self._numbers(f"{count}{_SCALARS[inner]}")
            self._skip(count * width)
        elif inner == _STRING:
            if count > self._end - self._at:
                raise self._cut_off()
            for _ in range(count):
                (length,) = self._numbers("Q")
                self._skip(length)
        else:
            raise self._damaged(f"{outside.quoted(key)} is an array of the type {inner}")
        return Length(count)

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        if length > MOST_STRING:
            raise self._cut_off() if length > self._end else self._damaged("a text is too long")
        start = self._at
        self._skip(length)
        try:
            return self._data[start : self._at].decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged("a name or text is not UTF-8") from None

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        start, width = self._at, struct.calcsize("<" + kinds)
        self._skip(width)
        return struct.unpack_from("<" + kinds, self._data, start)

    def _skip(self, count: int) -> None:
        if count > self._end - self._at:
            raise self._cut_off()
        self._at += count

    # ----------------------------------------------------------------------------------- errors

    def _cut_off(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is truncated: its header does not end within the file's "
            f"{self._end:,} bytes.",
            "Download it again.",
        )

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is a damaged GGUF file: {reason}.", "Download it again."
        )

    def _refused(self, what: str, hint: str) -> CheckpointError:
        return CheckpointError(f"Cannot import {self._path}. {what}", hint)


def _count(value: Any) -> int:
    return value if type(value) is int else 0
