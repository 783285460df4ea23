"""Tensors read from safetensors, converted and written piece by piece; numpy, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from core.checkpoint.tensors import TensorEntry
from core.errors import CheckpointError, NotFiniteError
from core.export.layout import OutTensor

_PIECE = 4 << 20
"""Weights that are converted at once: 16 MiB as float32, whatever the tensor's size."""


class Streamed:
    """One tensor on its way into the file; GGUFWriter takes it like an array.

    It is read when it is written, in pieces of whole rows, so that memory does not depend on the
    tensor's size.
    """

    def __init__(
        self, tensor: OutTensor, folder: Path, entry: TensorEntry, written: Callable[[int], None]
    ) -> None:
        """Prepare ``tensor``, stored as ``entry``; ``written`` gets the bytes of each piece."""
        self._tensor, self._path, self._entry = tensor, folder / entry.file, entry
        self._written = written
        self.nbytes = tensor.bytes

    def tofile(self, handle: BinaryIO) -> None:
        """Append the converted tensor to an open file."""
        for piece in self._pieces():
            data = converted(piece, self._tensor)
            handle.write(data)
            self._written(len(data))

    def _pieces(self) -> Iterator[Any]:
        """Yield float32 (or bfloat16 as uint16) arrays of whole rows, [rows, width]."""
        shape = self._entry.shape
        width = shape[1] if len(shape) == 2 else 1
        together = shape[0] // self._tensor.heads if self._tensor.heads else 1
        rows = max(1, _PIECE // (width * together)) * together
        with self._path.open("rb") as source:
            source.seek(self._entry.start)
            for at in range(0, shape[0], rows):
                count = min(rows, shape[0] - at)
                array = _read(source, self._entry, count * width).reshape(count, width)
                yield interleaved(array, count // together) if self._tensor.heads else array


def interleaved(array: Any, heads: int) -> Any:
    """Reorder the rows of ``heads`` heads: row i of a head's second half follows its row i.

    ``array``: [heads * head_dim, width].
    """
    rows, width = array.shape
    return array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _read(source: BinaryIO, entry: TensorEntry, count: int) -> Any:
    import numpy as np

    kind = np.dtype("uint16" if entry.dtype == "bfloat16" else entry.dtype).newbyteorder("<")
    data = source.read(count * kind.itemsize)
    if len(data) < count * kind.itemsize:
        raise CheckpointError(
            f"{entry.file} was truncated while it was being read.",
            "Do not change the checkpoint during the export; start again.",
        )
    return np.frombuffer(data, dtype=kind)


def converted(array: Any, tensor: OutTensor) -> bytes:
    """Return a piece's bytes in the tensor's type; ``array``: [rows, width], uint16 is bfloat16.

    Raises `NotFiniteError` for NaN and infinity, and for weights beyond float16's range.
    """
    import numpy as np

    if array.dtype.kind == "u" and tensor.type == "bf16":
        _check(_widened(array), tensor)
        return np.ascontiguousarray(array).tobytes()
    wide = _widened(array) if array.dtype.kind == "u" else array.astype(np.float32, copy=False)
    _check(wide, tensor)
    if tensor.type == "f32":
        return np.ascontiguousarray(wide).tobytes()
    if tensor.type == "f16":
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise NotFiniteError(
                f"{tensor.source} has weights up to {float(np.abs(wide).max()):,.0f}, beyond the "
                "65,504 that float16 can hold.",
                "Export with --type bf16 or f32.",
            )
        return narrow.tobytes()
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.BF16 if tensor.type == "bf16" else GGMLQuantizationType.Q8_0
    return quants.quantize(np.ascontiguousarray(wide), kind).tobytes()


def _widened(array: Any) -> Any:
    """Return bfloat16, given as uint16, as float32: its bits are the upper half."""
    import numpy as np

    return (array.astype(np.uint32) << 16).view(np.float32)


def _check(array: Any, tensor: OutTensor) -> None:
    import numpy as np

    if not math.isfinite(float(np.abs(array).max(initial=0.0))):
        raise NotFiniteError(
            f"{tensor.source} has NaN or infinity among its weights.",
            "Give a checkpoint whose weights are numbers; nothing was written.",
        )
