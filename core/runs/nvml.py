"""The NVIDIA GPUs that the driver lists, without torch: NVML through ctypes.

NVML lists the GPUs in the order of the PCI bus; CUDA lists the fastest first, and of those only
what CUDA_VISIBLE_DEVICES names. `visible` gives them as torch numbers them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_NAME_BYTES = 96
_ERRORS = {9: "the driver is not loaded", 18: "driver and library versions differ"}
"""NVML's return codes that say why there is no answer."""

_ASK_CUDA = """
import ctypes, uuid
cuda = ctypes.CDLL("nvcuda.dll" if __import__("os").name == "nt" else "libcuda.so.1")
count = ctypes.c_int(0)
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
for index in range(count.value):
    found = ctypes.create_string_buffer(16)
    assert cuda.cuDeviceGetUuid(found, index) == 0
    print("GPU-" + str(uuid.UUID(bytes=found.raw)))
"""
"""Run in a separate process: one that has initialised CUDA must not fork."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one instance of a partitioned GPU (MIG)."""

    uuid: str
    name: str
    free_bytes: int | None = None
    total_bytes: int | None = None
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    instances: tuple[Gpu, ...] = ()
    """Of a partitioned GPU, which CUDA does not use as a whole."""


@dataclass(frozen=True)
class Listing:
    """What the driver says."""

    driver: str = ""
    """Its version, e.g. 580.65.06; empty if there is no driver."""
    cuda: tuple[int, int] | None = None
    """The newest CUDA that it supports."""
    gpus: tuple[Gpu, ...] = ()
    """In the order of the PCI bus."""
    error: str = ""
    """Why the driver does not answer, if it is installed."""


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def _library() -> Any:
    return ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")


def listing() -> Listing:
    """Ask the driver for its version and its GPUs; an empty listing without one."""
    try:
        library = _library()
        code = library.nvmlInit_v2()
    except (OSError, AttributeError):
        return Listing()
    if code:
        return Listing(error=_ERRORS.get(code, f"NVML error {code}"))
    try:
        return _Reader(library).listing()
    finally:
        library.nvmlShutdown()


class _Reader:
    """Reads from an initialised NVML; what it does not answer is None or empty."""

    def __init__(self, library: Any) -> None:
        self._nvml = library

    def listing(self) -> Listing:
        version = self._number("nvmlSystemGetCudaDriverVersion_v2")
        handles = self._handles(
            self._number("nvmlDeviceGetCount_v2") or 0, self._nvml.nvmlDeviceGetHandleByIndex_v2
        )
        return Listing(
            self._text(self._nvml.nvmlSystemGetDriverVersion),
            (version // 1000, version % 1000 // 10) if version else None,
            tuple(self._gpu(handle) for handle in handles),
        )

    def _handles(self, count: int, get: Callable[..., int]) -> list[ctypes.c_void_p]:
        found = []
        for index in range(count):
            handle = ctypes.c_void_p()
            if get(index, ctypes.byref(handle)) == 0:
                found.append(handle)
        return found

    def _gpu(self, handle: ctypes.c_void_p, capability: tuple[int, int] | None = None) -> Gpu:
        nvml, memory = self._nvml, _Memory()
        known = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
        major, minor = ctypes.c_int(0), ctypes.c_int(0)
        if nvml.nvmlDeviceGetCudaComputeCapability(
            handle, ctypes.byref(major), ctypes.byref(minor)
        ) == 0:  # fmt: skip
            capability = major.value, minor.value
        return Gpu(
            self._text(nvml.nvmlDeviceGetUUID, handle),
            self._text(nvml.nvmlDeviceGetName, handle),
            int(memory.free) if known else None,
            int(memory.total) if known else None,
            capability,
            self._instances(handle, capability),
        )

    def _instances(
        self, handle: ctypes.c_void_p, capability: tuple[int, int] | None
    ) -> tuple[Gpu, ...]:
        mode, pending = ctypes.c_uint(0), ctypes.c_uint(0)
        with contextlib.suppress(AttributeError):  # drivers before MIG
            nvml, at = self._nvml, ctypes.byref
            if nvml.nvmlDeviceGetMigMode(handle, at(mode), at(pending)) or not mode.value:
                return ()
            most = ctypes.c_uint(0)
            nvml.nvmlDeviceGetMaxMigDeviceCount(handle, at(most))
            get = functools.partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle)
            return tuple(self._gpu(h, capability) for h in self._handles(most.value, get))
        return ()

    def _number(self, name: str) -> int | None:
        value = ctypes.c_int(0)
        with contextlib.suppress(AttributeError):
            if getattr(self._nvml, name)(ctypes.byref(value)) == 0:
                return value.value
        return None

    def _text(self, get: Callable[..., int], *handle: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(_NAME_BYTES)
        failed = get(*handle, buffer, _NAME_BYTES)
        return "" if failed else buffer.value.decode(errors="replace")


def visible(found: Listing) -> tuple[Gpu, ...]:
    """Return the GPUs as torch numbers them: ``cuda:K`` is number K.

    CUDA_VISIBLE_DEVICES lists numbers or (beginnings of) UUIDs; like CUDA, this ends at the first
    entry that is not a GPU. A partitioned GPU counts as its first instance.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and not wanted.strip():
        return ()
    gpus = _in_cuda_order(found.gpus)
    if wanted is None:
        return gpus
    instances = [instance for gpu in found.gpus for instance in gpu.instances]
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdigit():
            match = list(gpus[int(entry) : int(entry) + 1])
        else:
            match = [g for g in (*gpus, *instances) if entry and g.uuid.startswith(entry)][:1]
        if not match or match[0] in chosen:
            break
        chosen += match
    return tuple(chosen)


def _in_cuda_order(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return GPUs by the bus if that was asked for or all are alike, else in CUDA's own order."""
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    ordered = list(gpus)
    if not by_bus and len({gpu.name for gpu in gpus}) > 1:
        place = {uuid: at for at, uuid in enumerate(_order_of_cuda())}
        ordered.sort(key=lambda gpu: place.get(gpu.uuid, len(place)))
    return tuple(gpu.instances[0] if gpu.instances else gpu for gpu in ordered)


@functools.cache
def _order_of_cuda() -> tuple[str, ...]:
    """Return the UUIDs of all GPUs in CUDA's order; empty if CUDA does not answer."""
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [sys.executable, "-S", "-c", _ASK_CUDA],
            env=env, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        return tuple(done.stdout.split())
    return ()
