"""Weights as torchao's quantized tensors: 8 bits per channel or group, 4 bits per group.

Both round to the nearest value. 8 bits are symmetric: a scale s = max|w| / 127.5 per row or group
and whole numbers q = round(w / s) in [-128, 127], w = s q. 4 bits are asymmetric: s = (max - min) /
15 with 0 between them, a zero point z = -8 - round(min / s), and q = round(w / s) + z in [-8, 7],
w = s (q - z). Scales are float32, computed from the weights in float32, on the CPU.

4-bit numbers take one byte each: torchao's packed layouts compute only on CUDA, or only on Intel
GPUs, while this one computes, and is stored alike, on the CPU, CUDA and MPS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def quantize(weight: Tensor, bits: int, group: int | None) -> Tensor:
    """Return a weight [out, in] as torchao's tensor, which widens to the weight's own dtype."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, MappingType
    from torchao.quantization.granularity import PerGroup, PerRow

    wide = weight.detach().to(torch.float32)
    if bits == 8:
        found = Int8Tensor.from_hp(wide, PerGroup(group) if group else PerRow())
        return Int8Tensor(
            found.qdata, found.scale, found.block_size, weight.dtype, zero_point=found.zero_point
        )
    found = IntxUnpackedToInt8Tensor.from_hp(
        wide, [1, group or weight.shape[1]], torch.int4, mapping_type=MappingType.ASYMMETRIC
    )
    return IntxUnpackedToInt8Tensor(
        found.qdata, found.scale, found.zero_point, torch.int4, found.block_size, weight.dtype, None
    )


def configuration(bits: int, group: int | None) -> dict[str, Any]:
    """Return the ``quantization_config`` that makes transformers load such weights."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow
    from transformers import TorchAoConfig

    if bits == 8:
        chosen: Any = Int8WeightOnlyConfig(
            granularity=PerGroup(group) if group else PerRow(), set_inductor_config=False
        )
    else:
        chosen = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=PerGroup(group) if group else PerAxis(0),
            mapping_type=MappingType.ASYMMETRIC,
        )
    return dict(TorchAoConfig(chosen).to_dict())


def flatten(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], str]:
    """Return the plain tensors of one weight under their stored names, and its metadata."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    parts, notes = flatten_tensor_state_dict({name: tensor})
    return parts, notes[name]
