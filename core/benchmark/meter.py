"""Memory while generating, three figures kept apart: allocated, reserved, and the whole process."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.runs.devices import MIB
from core.runs.processes import memory_mib

if TYPE_CHECKING:
    import torch

_COUNTED = "depthcut: counted"


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peaks since the last `MemoryMeter.reset`, in MiB; None where a device does not tell."""

    allocated_mib: float | None
    """Tensors. CUDA: peak. MPS: now. CPU: not told; `tensor_peak` counts them."""
    reserved_mib: float | None
    """What the allocator held. CUDA and MPS: torch's, on the device. CPU: the process's resident
    growth since before loading, which is tensors and what the C library's heap has in its gaps."""
    process_mib: float | None
    """CUDA: what the device had in use beyond what was used before this process; else the
    process's peak resident memory."""


class MemoryMeter:
    """Peaks on one device; make it before the model is loaded."""

    def __init__(self, device: torch.device) -> None:
        """Note what was in use on ``device`` before."""
        self.device = device
        self._before_mib = self._device_used_mib() or resident_mib()

    def reset(self) -> None:
        """Start new peaks."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # the kernel's high-water mark of this process
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> Peaks:
        """Return the peaks since `reset`."""
        import torch

        if self.device.type == "cuda":
            used = self._device_used_mib()
            return Peaks(
                torch.cuda.max_memory_allocated(self.device) / MIB,
                torch.cuda.max_memory_reserved(self.device) / MIB,
                None if used is None else used - self._before_mib,
            )
        peak = resident_mib(peak=True)
        if self.device.type == "mps":
            held = torch.mps.driver_allocated_memory() / MIB
            return Peaks(torch.mps.current_allocated_memory() / MIB, held, peak)
        return Peaks(None, max(0.0, peak - self._before_mib), peak)

    def _device_used_mib(self) -> float | None:
        """Return what is in use on a CUDA device by everybody, seen before and after us."""
        if self.device.type != "cuda":
            return None
        import torch

        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free) / MIB


def tensor_peak(work: Callable[[], object], before: Callable[[], object] | None = None) -> int:
    """Do ``work`` on the CPU and return the most bytes of tensors in it, from the allocator's log.

    Counted are tensors made since ``before``, which is done first and may leave some behind.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        if before:
            before()
        with record_function(_COUNTED):
            work()
    log: Any = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    begin = min(e.start_ns() for e in log if e.name() == _COUNTED)
    changes = sorted((e.start_ns(), n, e.nbytes()) for n, e in enumerate(log)
                     if e.name() == "[memory]")  # fmt: skip
    held = itertools.accumulate(size for _, _, size in changes)
    levels = [(at, total) for (at, _, _), total in zip(changes, held, strict=True)]
    there = [total for at, total in levels if at < begin][-1:]
    return max([0, *there, *(total for at, total in levels if at >= begin)])


def resident_mib(peak: bool = False) -> float:
    """Return this process's resident memory in MiB, or its peak since the last reset."""
    return memory_mib("VmHWM:" if peak else "VmRSS:")


def limit(device: torch.device, mib: int) -> None:
    """Let this process have no more than ``mib`` from now on, as on a smaller device.

    CUDA: torch's share of the device. Elsewhere: the process's address space, counted from what
    it has now, so that real allocations fail.
    """
    if device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, mib * MIB / total), device)
        return
    import resource

    most = int((memory_mib("VmSize:") + mib) * MIB)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def capacity_mib(device: torch.device) -> float:
    """Return the memory that ``device`` has in all."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory / MIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
