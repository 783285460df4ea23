"""The devices of this machine, without torch: what ``--device`` means, and free memory.

NVML reports NVIDIA GPUs, psutil the rest. psutil is imported only to list memory, since a machine
that only computes may not have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import OptionError

MIB, GIB = 2**20, 2**30
"""In bytes."""


def resolve(name: str) -> str:
    """Return the device that ``--device NAME`` means: ``cpu``, ``cuda:K`` or ``mps``.

    ``auto`` is the first GPU if the installed torch was built for it and the driver lists one.
    Whether torch can actually use the device is checked once torch is loaded
    (`core.model.precision.resolve_device`).

    Raises:
        OptionError: The name is unknown.
    """
    if name == "auto":
        return _best()
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise OptionError(
            f"--device: unknown device '{name}'.", "Use auto, cpu, cuda, cuda:1 or mps."
        )
    return f"cuda:{int(index or 0)}" if kind == "cuda" else kind


def _best() -> str:
    built_for = _torch_build()
    if built_for == "cuda" and _count_nvidia() > 0:
        return "cuda:0"
    if built_for == "hip" and Path("/dev/kfd").exists():
        return "cuda:0"  # torch uses the name cuda for AMD GPUs too
    return "mps" if _is_apple_silicon() else "cpu"


def _torch_build() -> str:
    """Return ``cuda`` or ``hip`` if the installed torch was built for it, else ``""``."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return ""
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    built = dict(re.findall(r"^(cuda|hip)\b[^=\n]*=\s*(.+)$", text, re.MULTILINE))
    return next((kind for kind in ("cuda", "hip") if built.get(kind, "None").strip() != "None"), "")


def _count_nvidia() -> int:
    """Return how many NVIDIA GPUs the driver lists; 0 if CUDA_VISIBLE_DEVICES hides them all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return 0
    count = ctypes.c_uint(0)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        if library.nvmlInit_v2() == 0:
            library.nvmlDeviceGetCount_v2(ctypes.byref(count))
            library.nvmlShutdown()
    return count.value


def _is_apple_silicon() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; False where the kernel does not list it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return bool({"avx512_bf16", "amx_tile"} & set(line.split()))
    return False


@functools.cache
def cuda_capability(index: int) -> tuple[int, int] | None:
    """Return the compute capability of ``cuda:INDEX`` as NVML knows it; None if it does not."""
    with contextlib.suppress(Exception), _nvml_handle(index) as (pynvml, handle):
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return int(major), int(minor)
    return None


def free_bytes(name: str) -> tuple[str, int | None]:
    """Return the device that ``--device NAME`` means and its free memory in bytes.

    None if it is not known: Apple GPUs do not tell, and NVIDIA's are asked through NVML, else
    through nvidia-smi, so that torch is not needed.
    """
    device = resolve(name)
    if device.startswith("cuda"):
        return device, _free_bytes_of_gpu(int(device.partition(":")[2]))
    if device == "cpu":
        with contextlib.suppress(OSError):
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("MemAvailable:"):
                    return device, int(line.split()[1]) * 1024
    return device, None


def _free_bytes_of_gpu(index: int) -> int | None:
    with contextlib.suppress(Exception), _nvml_handle(index) as (pynvml, handle):
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        text = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(text.split()[index]) * MIB
    return None


@contextlib.contextmanager
def _nvml_handle(index: int) -> Iterator[tuple[Any, Any]]:
    """Give NVML and its handle of ``cuda:INDEX``, which CUDA_VISIBLE_DEVICES numbers or names."""
    import pynvml

    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    which = visible[index] if visible else str(index)
    pynvml.nvmlInit()
    try:
        if which.isdigit():
            yield pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(which))
        else:
            yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(which)
    finally:
        pynvml.nvmlShutdown()


@dataclass(frozen=True)
class Device:
    """One device that runs can use."""

    name: str
    label: str
    free_gib: float
    total_gib: float


def devices() -> list[Device]:
    """List the GPUs, then the CPU with the machine's memory."""
    import psutil

    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    found = _gpus()
    if _is_apple_silicon():
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
