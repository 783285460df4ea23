"""Which device and which number format a computation uses."""

from __future__ import annotations

from typing import Any

import torch

from core.errors import OptionError
from core.runs import devices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device of ``auto``, ``cpu``, ``cuda``, ``cuda:K`` or ``mps``.

    The name means what `core.runs.devices.resolve` says; ``auto`` falls back to the CPU if torch
    cannot use the GPU that the driver lists. Raises `OptionError` when the name is unknown or
    torch has no such device.
    """
    device = torch.device(devices.resolve(name))
    if device.type == "cuda" and not torch.cuda.is_available():
        if name == "auto":
            return torch.device("cpu")
        raise OptionError(
            f"--device: '{name}' asks for CUDA, which is not available here.",
            "Use --device cpu, or install a CUDA build of torch and a driver.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device: '{name}' does not exist.",
            f"There are {torch.cuda.device_count()}, counted from cuda:0.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        if name == "auto":
            return torch.device("cpu")
        raise OptionError("--device: 'mps' is not available here.", "Use --device cpu.")
    return device


def resolve_dtype(name: str, device: torch.device, config: Any = None) -> torch.dtype:
    """Return the dtype in which weights are held on ``device``.

    ``auto`` keeps the dtype that ``config`` (a transformers configuration, a dictionary, or None)
    declares, with one exception: float16 becomes bfloat16 where a GPU has it and float32
    elsewhere, because float16 activations overflow in LLaMA models. Raises `OptionError` for an
    unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise OptionError(f"--dtype: '{name}' is not known.", f"Use auto, {', '.join(DTYPES)}.")
        return DTYPES[name]
    declared = _declared_dtype(config)
    if declared == torch.float32:
        return declared
    if device.type == "cpu":
        return torch.bfloat16 if declared == torch.bfloat16 else torch.float32
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _declared_dtype(config: Any) -> torch.dtype:
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    value = (get("dtype") or get("torch_dtype")) if config is not None else None
    if isinstance(value, torch.dtype):
        return value
    return DTYPES.get(str(value).removeprefix("torch."), torch.float32)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        torch.zeros(1, dtype=torch.bfloat16, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for `torch.float32`, and so on."""
    return str(dtype).removeprefix("torch.")
