"""Device and number format of a computation: `core.runs.dtypes` in terms of torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from core.errors import OptionError
from core.runs import devices, dtypes

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in dtypes.COMPUTED}


def resolve_device(name: str) -> torch.device:
    """Return the device of ``auto``, ``cpu``, ``cuda``, ``cuda:K`` or ``mps``.

    The name means what `core.runs.devices.resolve` says; ``auto`` falls back to the CPU, with a
    line on standard error, if torch cannot use the GPU that the driver lists. Raises `OptionError`
    when the name is unknown or torch has no such device.
    """
    device = torch.device(devices.resolve(name))
    if device.type == "cuda" and not torch.cuda.is_available():
        if name == "auto":
            return _fallen_back(device, _why_no_cuda())
        known = next(iter(devices.unusable(hidden=True)), None)
        raise OptionError(
            f"--device: '{name}' needs CUDA, which is not available here: "
            f"{f'{known.gpu} is present, but {known.why}' if known else _why_no_cuda()}.",
            known.fix if known else "Use --device cpu.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device: '{name}' does not exist.",
            f"{torch.cuda.device_count()} CUDA devices are available, starting at cuda:0.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        if name == "auto":
            return _fallen_back(device, "torch reports that it is not available")
        raise OptionError("--device: 'mps' is not available here.", "Use --device cpu.")
    return device


def _fallen_back(device: torch.device, why: str) -> torch.device:
    print(f"Computing on the CPU: {device} cannot be used: {why}.", file=sys.stderr, flush=True)
    return torch.device("cpu")


def _why_no_cuda() -> str:
    """Return torch's own reason for not using CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return "torch gives no reason"


@dataclass(frozen=True)
class Precision:
    """The dtype of a model's weights, and the dtype that it computes in."""

    weights: torch.dtype
    arithmetic: torch.dtype

    @property
    def compute(self) -> torch.dtype | None:
        """Autocast dtype for training; None if the weights' own format is used."""
        return None if self.arithmetic == torch.float32 else self.arithmetic


def decide(
    asked: str, device: torch.device, declared: str, purpose: dtypes.Purpose = "whole"
) -> Precision:
    """Return the precision for one model by the rule of `core.runs.dtypes`.

    Args:
        asked: ``--dtype``.
        device: Device of the model.
        declared: Storage format of the checkpoint, e.g. ``bfloat16``.
        purpose: How the model is used.

    Raises:
        OptionError: ``asked`` is unknown.
    """
    if asked not in ("auto", *DTYPES):
        known = ", ".join(DTYPES)
        raise OptionError(f"--dtype: unknown value '{asked}'.", f"Use auto, {known}.")
    found = dtypes.choose(asked, declared, device.type, native_formats(device), purpose)
    return Precision(DTYPES[found.weights], DTYPES[found.arithmetic])


def native_formats(device: torch.device) -> frozenset[str]:
    """Return the 16-bit formats that ``device`` has instructions for."""
    return dtypes.native_formats(
        device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        cpu_bfloat16=device.type == "cpu" and cpu_has_bfloat16(),
    )


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; False if torch does not report it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def arithmetic_of(held: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the compute dtype of weights held in ``held`` if blocks are prepared one at a time.

    Their own format, but float32 on a CPU without instructions for it; upcasting is exact.
    """
    return decide(dtype_name(held), device, dtype_name(held), "blocks").arithmetic


def gradients_of(held: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for gradients of weights held in ``held``, computed block by block."""
    return DTYPES[dtypes.for_gradients(dtype_name(arithmetic_of(held, device)))]


def not_finite_hint(computed: torch.dtype) -> str:
    """Return what to do about NaN or infinity that a computation in ``computed`` gave."""
    if computed == torch.float16:
        return "Use --dtype bfloat16 or float32: float16 overflows in some LLaMA models."
    return (
        f"It was computed in {dtype_name(computed)}, which has the range of float32, so the "
        "weights are probably damaged; load an intact copy of the checkpoint."
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for `torch.float32`, and so on."""
    return str(dtype).removeprefix("torch.")
