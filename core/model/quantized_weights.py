"""Quantized weights of a loaded model: torchao's tensors, which hold several plain ones.

Where it is installed, bitsandbytes holds weights in NF4, the four bits of QLoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.errors import RunError

_DATA, _STATE = "tensor_data_names", "quant_state"
"""What torchao's tensors and bitsandbytes' have, and no others."""


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
    state: Any = getattr(tensor, _STATE, None)
    if state is not None:  # the scales are quantized as well: they have a state of their own
        inner = getattr(state, "state2", None)
        scales = [state.absmax, state.offset, state.code]
        scales += [inner.absmax, inner.code] if inner else []
        return [tensor.data, *(part for part in scales if isinstance(part, Tensor))]
    names: Any = getattr(tensor, _DATA, None)
    if names is None:
        return [tensor]
    names = [*names, *getattr(tensor, "optional_tensor_data_names", ())]
    found = (getattr(tensor, name, None) for name in names)
    return [part for part in found if isinstance(part, Tensor)]


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is one of torchao's or bitsandbytes' tensors."""
    return hasattr(tensor, _DATA) or getattr(tensor, _STATE, None) is not None


def widened(weight: Any) -> Tensor:
    """Return a quantized weight as a plain tensor, in the format that it was quantized from."""
    if getattr(weight, _STATE, None) is None:
        plain: Tensor = weight.dequantize()
        return plain
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found


def to_nf4(linear: torch.nn.Linear) -> torch.nn.Module:
    """Return a layer with the weight of ``linear`` in NF4 (blocks of 64, scales in 8 bits).

    Raises `RunError` if bitsandbytes cannot be imported.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise RunError(
            f"NF4 weights need bitsandbytes, which cannot be imported ({error}).",
            "Install it with pip install bitsandbytes, or hold the base in int8 or int4.",
        ) from error
    weight, bias = linear.weight.detach(), linear.bias
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=bias is not None,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
    ).to(weight.device)
    # On a CPU it would repack the weight at its first use, into a layout that only it reads and
    # that not every width has.
    layer.support_avx512bf16_for_cpu = False
    if bias is not None:
        layer.bias = bias
    return layer


def free(model: torch.nn.Module) -> None:
    """Free the memory of a model's weights; it cannot be used afterwards."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if getattr(weight, _STATE, None) is not None:  # cannot be moved to meta
                module.register_parameter(name, None)
    model.to("meta")


def widen_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make all quantized weights of a model widen to ``dtype``; the stored numbers stay.

    torchao remembers the dtype that the weights had when they were quantized, whatever the model
    is loaded in.
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if hasattr(weight, _DATA) and weight.dtype != dtype:
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
