"""Memory during generation, as three separate figures: allocated, reserved, and whole process."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
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
    """Peaks since the last `MemoryMeter.reset`, in MiB; None if the device does not report them."""

    allocated_mib: float | None
    """Tensors. CUDA: peak. MPS: current. CPU: not reported; `tensor_peak` counts them."""
    reserved_mib: float | None
    """Memory held by the allocator. CUDA and MPS: torch's, on the device. CPU: growth of the
    process's resident memory since before loading: tensors plus gaps in the C library's heap."""
    process_mib: float | None
    """CUDA: memory in use on the device beyond that in use before this process; otherwise the
    process's peak resident memory."""


class MemoryMeter:
    """Memory peaks on one device; create it before the model is loaded."""

    def __init__(self, device: torch.device) -> None:
        """Record the memory already in use on ``device``."""
        self.device = device
        self._before_mib = self._device_used_mib() or resident_mib()

    def reset(self) -> None:
        """Restart the peaks."""
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
        """Return the memory in use on a CUDA device, by all processes; None on other devices."""
        if self.device.type != "cuda":
            return None
        import torch

        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free) / MIB


def tensor_peak(work: Callable[[], object], before: Callable[[], object] | None = None) -> int:
    """Run ``work`` on the CPU and return its peak bytes of tensors, from the allocator's log.

    This includes tensors that ``before``, which runs first, leaves behind.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    gc.collect()  # tensors of earlier work that are freed meanwhile would count as freed by this
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
    """Limit this process to ``mib`` more memory, to simulate a smaller device.

    CUDA: limits torch's share of the device. Elsewhere: limits the process's address space,
    counted from its current size, so that real allocations fail.
    """
    if device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, mib * MIB / total), device)
        return
    import resource

    most = int((memory_mib("VmSize:") + mib) * MIB)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def free_mib(device: torch.device, total_mib: float) -> float:
    """Return the memory of ``device`` that is free; ``total_mib`` if the device does not tell."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    if device.type == "mps":  # what Metal recommends one process to use
        return torch.mps.recommended_max_memory() / MIB
    return total_mib


def capacity_mib(device: torch.device) -> float:
    """Return the total memory of ``device``."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory / MIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
