"""What a run takes, whatever device it runs on: for its dry run, and for the planning table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.runs import devices
from core.runs.devices import MIB

FITS, STREAMS, CANNOT = "fits", "streams", "cannot"
"""All weights are in memory; they are read block by block; even that does not fit."""
WHOLE, NO_MEMORY = "whole", "no memory"
"""It needs all weights in memory, which fit; which do not."""
FILES = "files"
"""It reads and writes files on the CPU, whatever the device."""

PROCESS_BYTES = {"cpu": 500 * MIB, "gpu": 1024 * MIB}
"""What a process takes before any weight: the interpreter with its libraries (430 MiB were measured
on Linux), or a GPU's context and libraries."""
CONVERTED_PER_S = 1e8
"""Weights that one core converts in a second. Measured on one core of a Zen 4 with 695 million
weights in bfloat16, beyond the start of the process: quantize to int8 took 5.9 s and to int4 3.7 s
for 629 million of them, export to GGUF 3.2 s (bf16), 5.1 s (q8_0) and 6.7 s (f16)."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory, operations and bytes of a run, from shapes alone."""

    memory_bytes: int
    """Of one process, the way it runs; if it cannot run, what it would need."""
    way: str
    """One of the names above."""
    flops: float = 0.0
    """Operations of all processes together."""
    float64_flops: float = 0.0
    """Those of them that are in float64."""
    passes: int = 0
    """How often all weights move through the memory of a process's device."""
    cache_bytes: float = 0.0
    """Keys and values that move through it too."""
    read_bytes: int = 0
    """From the disk, by one process; states that are kept there count when they are written too."""
    written_bytes: int = 0
    converted: int = 0
    """Weights that the CPU converts to another format, at `CONVERTED_PER_S`."""
    processes: int = 1

    @property
    def can_run(self) -> bool:
        """Whether there is memory for it."""
        return self.way not in (CANNOT, NO_MEMORY)

    @property
    def overlaps(self) -> bool:
        """Whether the disk is read while it computes, and not before."""
        return self.way in (STREAMS, CANNOT, FILES)

    @property
    def convert_s(self) -> float:
        """Seconds of converting weights on one core."""
        return self.converted / CONVERTED_PER_S

    def facts(self) -> dict[str, Any]:
        """Return what a dry run says of the disk."""
        return {"read_bytes": self.read_bytes, "written_bytes": self.written_bytes}


def whole(memory_bytes: int, limit: int | None) -> str:
    """Return how a computation runs that needs all weights in memory; without a limit it fits."""
    return WHOLE if limit is None or memory_bytes <= limit else NO_MEMORY


def kind_of(device: str) -> str:
    """Return cpu or gpu, the key of what is held on a device."""
    return "cpu" if devices.resolve(device) == "cpu" else "gpu"
