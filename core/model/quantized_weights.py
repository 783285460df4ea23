"""Quantized weights of a loaded model: torchao's tensors, which hold several plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.errors import RunError


def require() -> str:
    """Return torchao's version; raises `RunError` if it, or what is needed of it, is missing."""
    try:
        import torchao
        from torchao.prototype.safetensors import safetensors_support  # noqa: F401
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor  # noqa: F401
    except ImportError as error:
        raise RunError(
            f"Quantized weights need torchao, which cannot be imported ({error}).",
            "Install the pinned version: pip install -r requirements.txt.",
        ) from error
    return str(torchao.__version__)


def parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors of a weight: itself, or whole numbers, scales and zero points."""
    names: Any = getattr(tensor, "tensor_data_names", None)
    if names is None:
        return [tensor]
    names = [*names, *getattr(tensor, "optional_tensor_data_names", ())]
    found = (getattr(tensor, name, None) for name in names)
    return [part for part in found if isinstance(part, Tensor)]


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is one of torchao's tensors."""
    return hasattr(tensor, "tensor_data_names")


def widen_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make all quantized weights of a model widen to ``dtype``; the stored numbers stay.

    torchao remembers the dtype that the weights had when they were quantized, whatever the model
    is loaded in.
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if is_quantized(weight) and weight.dtype != dtype:
                module.register_parameter(
                    name, torch.nn.Parameter(_as(weight, dtype), requires_grad=False)
                )


def _as(weight: Any, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    if isinstance(weight, Int8Tensor):
        return Int8Tensor(
            weight.qdata, weight.scale, weight.block_size, dtype, zero_point=weight.zero_point
        )
    assert isinstance(weight, IntxUnpackedToInt8Tensor), type(weight)
    return IntxUnpackedToInt8Tensor(
        weight.qdata,
        weight.scale,
        weight.zero_point,
        weight.target_dtype,
        weight.block_size,
        dtype,
        weight.activation_quantization,
    )
