"""What an import takes: disk and memory, estimated from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from core.runs.dtypes import DTYPE_BYTES
from core.runs.footprint import FILES, Footprint

LIBRARIES_BYTES = 1 << 30
"""Memory that torch and transformers take by themselves, generously."""


@dataclass(frozen=True)
class Needs:
    """Bytes on disk, and in memory at the peak."""

    disk_bytes: int
    memory_bytes: int


def of(parameters: int, largest: int, dtype: str) -> Needs:
    """Return what a model of this size takes; ``largest`` is its largest tensor.

    transformers holds each tensor once in its final format; one tensor at a time is also in
    float32, twice (dequantized, and as a copy).
    """
    weights = parameters * DTYPE_BYTES[dtype]
    return Needs(weights, weights + 2 * 4 * largest + LIBRARIES_BYTES)


def footprint(parameters: int, largest: int, dtype: str, file_bytes: int) -> Footprint:
    """Return what importing a GGUF file of ``file_bytes`` takes; for the others see `of`."""
    needed = of(parameters, largest, dtype)
    return Footprint(
        memory_bytes=needed.memory_bytes,
        way=FILES,
        read_bytes=file_bytes,
        written_bytes=needed.disk_bytes,
        converted=parameters,
    )
