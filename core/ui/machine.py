"""Devices and free memory for the sidebar, without torch: NVML for GPUs, psutil for the rest."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass

import psutil

GIB = 2.0**30


@dataclass(frozen=True)
class Device:
    """One device that runs could use."""

    name: str
    label: str
    free_gib: float
    total_gib: float


def devices() -> list[Device]:
    """Return GPUs first, then the CPU with the machine's memory."""
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    found = _gpus()
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        found.append(Device("mps", "Apple GPU", memory.available / GIB, memory.total / GIB))
    cpu = Device("cpu", f"CPU, {cores} cores", memory.available / GIB, memory.total / GIB)
    return [*found, cpu]


def _gpus() -> list[Device]:
    found: list[Device] = []
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                name = pynvml.nvmlDeviceGetName(handle)
                label = name.decode() if isinstance(name, bytes) else str(name)
                free, total = float(memory.free) / GIB, float(memory.total) / GIB
                found.append(Device(f"cuda:{index}", label, free, total))
        finally:
            pynvml.nvmlShutdown()
    return found
