"""The devices of this machine, without torch: what ``--device`` means, and free memory.

NVML reports NVIDIA GPUs (`core.runs.nvml`), psutil the rest. psutil is imported only to list
memory, since a machine that only computes may not have it.

A GPU that is there but that the installed torch cannot use is reported with the reason and with
the command that installs a fitting build (`unusable`); ``auto`` passes over it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from core.errors import OptionError
from core.runs import nvml, torch_build

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


def meant(name: str) -> str:
    """Return the device that ``name`` means, as `resolve` does; an unknown name as it is."""
    try:
        return resolve(name)
    except OptionError:
        return name


def _best() -> str:
    build = torch_build.installed()
    if build.kind == "cuda":
        found = nvml.listing()
        gpus = enumerate(nvml.visible(found))
        usable = (at for at, gpu in gpus if torch_build.why_not(build, found, gpu) is None)
        first = next(usable, None)
        if first is not None:
            return f"cuda:{first}"
    if build.kind == "hip" and Path("/dev/kfd").exists():
        return "cuda:0"  # torch uses the name cuda for AMD GPUs too
    return "mps" if _is_apple_silicon() else "cpu"


@dataclass(frozen=True)
class Unusable:
    """A GPU that is there and that runs cannot use."""

    gpu: str
    """Its name."""
    why: str
    fix: str
    """What to do, as a sentence; the command is in it."""

    def __str__(self) -> str:
        """Return the three as sentences."""
        return f"{self.gpu} is present but cannot be used: {self.why}. {self.fix}"


def unusable(*, hidden: bool = False) -> tuple[Unusable, ...]:
    """Return the NVIDIA GPUs that are present and that torch cannot use, with the reasons.

    With ``hidden`` also those that CUDA_VISIBLE_DEVICES leaves out, which is somebody's choice.
    Empty without torch, and with a build for AMD GPUs.
    """
    build = torch_build.installed()
    if not build.version or build.kind == "hip":
        return ()
    found = nvml.listing()
    if not found.gpus:
        return _without_driver(found)
    seen = nvml.visible(found)
    left = []
    for gpu in seen:
        why = torch_build.why_not(build, found, gpu)
        if why:
            left.append(Unusable(gpu.name, why, torch_build.fix(build, found, gpu)))
    if hidden and not seen:
        value = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        why, fix = f"CUDA_VISIBLE_DEVICES is '{value}'", "Unset it to use the GPU."
        left += [Unusable(gpu.name, why, fix) for gpu in found.gpus]
    return tuple(left)


def _without_driver(found: nvml.Listing) -> tuple[Unusable, ...]:
    """Return the NVIDIA GPUs on the PCI bus if the driver does not answer."""
    places = _on_the_bus()
    why = found.error or "its driver is not installed here"
    fix = (
        f"Install NVIDIA's driver {torch_build.DRIVERS[13]} or newer, or restart the machine if it "
        "was just updated; in a container, start it with access to the GPU (--gpus all)."
    )
    if found.error and not places:
        places = ("",)
    return tuple(Unusable(f"An NVIDIA GPU{f' ({at})' if at else ''}", why, fix) for at in places)


@functools.cache
def _on_the_bus() -> tuple[str, ...]:
    """Return the PCI addresses of NVIDIA's display and 3D controllers; empty outside Linux."""
    found = []
    with contextlib.suppress(OSError):
        for folder in sorted(Path("/sys/bus/pci/devices").iterdir()):
            with contextlib.suppress(OSError):
                vendor = (folder / "vendor").read_text().strip()
                if vendor == "0x10de" and (folder / "class").read_text().startswith("0x03"):
                    found.append(f"PCI {folder.name}")
    return tuple(found)


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
    gpu = _gpu(index)
    return gpu.capability if gpu else None


def _gpu(index: int) -> nvml.Gpu | None:
    """Return the GPU that torch calls ``cuda:INDEX``; None if the driver does not list it."""
    return next(iter(nvml.visible(nvml.listing())[index : index + 1]), None)


def lock_name(device: str) -> str:
    """Return the name of a device's lock: of a GPU that the driver lists, its UUID.

    CUDA_VISIBLE_DEVICES may give one GPU different numbers in two processes, and two GPUs one.
    """
    kind, _, index = device.partition(":")
    gpu = _gpu(int(index or 0)) if kind == "cuda" else None
    return gpu.uuid.replace("/", "-") if gpu and gpu.uuid else device.replace(":", "-")


def free_bytes(name: str) -> tuple[str, int | None]:
    """Return the device that ``--device NAME`` means and its free memory in bytes.

    None if it is not known: Apple GPUs do not tell, and NVIDIA's are asked through NVML, so that
    torch is not needed.
    """
    device = resolve(name)
    if device.startswith("cuda"):
        gpu = _gpu(int(device.partition(":")[2]))
        return device, gpu.free_bytes if gpu else None
    if device == "cpu":
        with contextlib.suppress(OSError):
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("MemAvailable:"):
                    return device, int(line.split()[1]) * 1024
    return device, None


@dataclass(frozen=True)
class Device:
    """One device that runs can use."""

    name: str
    label: str
    free_gib: float
    total_gib: float


def devices() -> list[Device]:
    """List the GPUs that runs can use, then the CPU with the machine's memory."""
    import psutil

    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    found = _gpus()
    if _is_apple_silicon():
        found.append(Device("mps", "Apple GPU", memory.available / GIB, memory.total / GIB))
    cpu = Device("cpu", f"CPU, {cores} cores", memory.available / GIB, memory.total / GIB)
    return [*found, cpu]


def gpu_names() -> tuple[str, ...] | None:
    """Return the names of the GPUs that runs can use, in order; None if only torch knows."""
    if torch_build.installed().kind == "hip":
        return None
    return tuple(gpu.name for gpu in _gpus())


def _gpus() -> list[Device]:
    """Return the NVIDIA GPUs that torch should be able to use (all of them without torch)."""
    build, found = torch_build.installed(), nvml.listing()
    return [
        Device(f"cuda:{index}", gpu.name, (gpu.free_bytes or 0) / GIB, (gpu.total_bytes or 0) / GIB)
        for index, gpu in enumerate(nvml.visible(found))
        if not build.version or torch_build.why_not(build, found, gpu) is None
    ]
