"""Device memory: out-of-memory errors, freeing memory, and its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from core.errors import OutOfMemoryError
from core.model import quantized_weights
from core.runs.devices import MIB
from core.runs.failures import is_out_of_memory
from core.runs.processes import memory_mib

BEYOND_LAUNCH = ("invalid configuration argument", "canuse32bitindexmath", "int_max")
"""What messages contain when a tensor is too large for a GPU kernel, whatever the memory."""


@contextlib.contextmanager
def out_of_memory_explained(what: str) -> Iterator[None]:
    """Turn torch's out-of-memory exceptions into `OutOfMemoryError`, naming the work."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        detail = next(iter(str(error).splitlines()), "")[:200].rstrip(" .")
        raise OutOfMemoryError(
            f"Out of memory while {what}{': ' * bool(detail)}{detail}.",
            "Use --dtype bfloat16, fewer samples or shorter rows, or a larger device.",
        ) from error


def free_memory(device: torch.device) -> None:
    """Return memory that no tensor uses any more to the device and the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    if sys.platform == "linux":  # the allocator keeps freed pages until it is asked
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def weight_bytes(weights: Iterable[torch.Tensor]) -> int:
    """Return the bytes that weights take in memory; tensors that share memory count once."""
    plain = [part for weight in weights for part in quantized_weights.parts(weight)]
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in plain}.values())


_baseline_mib: dict[str, float] = {}


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring peak memory on ``device`` from here."""
    if device.type == "cuda":
        torch.cuda.init()  # the statistics refuse to be reset before any use of the GPU
        torch.cuda.reset_peak_memory_stats(device)
        return
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
        _baseline_mib["cpu"] = memory_mib()


def peak_memory_mib(device: torch.device) -> float:
    """Return peak memory since `reset_peak_memory`, in MiB.

    CUDA: peak allocated by torch. MPS: current driver allocation of this process (there is no
    peak). CPU: growth of the process's peak resident memory, which includes more than tensors.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / MIB
    return max(0.0, memory_mib("VmHWM:") - _baseline_mib.get("cpu", 0.0))
