"""What the device is, and what it can do in each format."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from core.benchmark import rates
from core.doctor import plan
from core.doctor.results import Machine, Rate
from core.model import precision
from core.runs import devices, nvml


def machine(device: torch.device) -> dict[str, Any]:
    """Return the fields of `Machine`; measuring the rates takes a few seconds."""
    free, total = _memory(device)
    cuda = device.type == "cuda"
    found = nvml.listing() if cuda or devices.unusable(hidden=True) else nvml.Listing()
    properties = torch.cuda.get_device_properties(device) if cuda else None
    libraries = sorted({need for check in plan.CHECKS for need in check.needs})
    absent = (name for name in libraries if importlib.util.find_spec(name) is None)
    return asdict(
        Machine(
            device=str(device),
            device_name=properties.name if properties else _processor(device),
            driver=found.driver,
            driver_cuda=_dotted(found.cuda),
            capability=_dotted(torch.cuda.get_device_capability(device)) if cuda else "",
            uuid=str(getattr(properties, "uuid", "")) if properties else "",
            free_bytes=free,
            total_bytes=total,
            threads=torch.get_num_threads() if device.type == "cpu" else None,
            python=platform.python_version(),
            torch=torch.__version__,
            torch_cuda=torch.version.cuda or "",
            transformers=version("transformers"),
            missing=tuple(plan.PACKAGES.get(name, name) for name in absent),
            rates=tuple(_rate(device, name) for name in precision.DTYPES),
            unusable_gpus=tuple(str(gpu) for gpu in devices.unusable(hidden=True)),
        )
    )


def _dotted(number: tuple[int, int] | None) -> str:
    return f"{number[0]}.{number[1]}" if number else ""


def _memory(device: torch.device) -> tuple[int | None, int | None]:
    """Return free and total bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        return None, torch.mps.recommended_max_memory()
    total = None
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    return devices.free_bytes("cpu")[1], total


def _processor(device: torch.device) -> str:
    if device.type == "mps":
        return "Apple GPU"
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo")
             if line.startswith("model name")]  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _rate(device: torch.device, name: str) -> Rate:
    """Return the rates in one format; without them if the device does not compute in it."""
    native = name == "float32" or name in precision.native_formats(device)
    if not native and device.type == "cpu":  # never computed in there
        return Rate(dtype=name)
    try:
        bandwidth, flops = rates.basic(device, precision.DTYPES[name])
    except RuntimeError:
        return Rate(dtype=name)
    return Rate(
        dtype=name, native=native, bandwidth_bytes_per_s=bandwidth, matmul_flops_per_s=flops
    )
