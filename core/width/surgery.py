"""Remove heads and neurons from a block's tensors. Every method cuts through this module."""

from __future__ import annotations

import torch
from torch import Tensor

from core.width.units import BlockUnits, Keep

_ROWS_OF_GROUPS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ROWS_OF_NEURONS = ("mlp.gate_proj", "mlp.up_proj")


def group_channels(unit: BlockUnits, groups: tuple[int, ...], *, keys: bool = False) -> Tensor:
    """Return the channels of ``groups`` in the queries and attention output, or in the keys.

    A group's query heads are contiguous, because transformers repeats keys and values.
    """
    width = unit.head_dim if keys else unit.group_width
    starts = torch.tensor(groups, dtype=torch.long)[:, None] * width
    return (starts + torch.arange(width)).flatten()


def dropped_channels(unit: BlockUnits, keep: Keep) -> tuple[Tensor, Tensor]:
    """Return the input channels removed from the attention's and the MLP's output projections."""
    groups, neurons = set(keep.groups), set(keep.neurons)
    removed = tuple(g for g in range(unit.groups) if g not in groups)
    return group_channels(unit, removed), torch.tensor(
        [n for n in range(unit.neurons) if n not in neurons], dtype=torch.long
    )


def cut(name: str, tensor: Tensor, keep: Keep, unit: BlockUnits) -> Tensor:
    """Return the part of a block's tensor ``name`` (its name within the block) that is kept.

    These are rows of q, k, v, gate and up (weights and biases) and columns of o and down; all
    other tensors, including the biases of o and down, are unchanged.
    """
    module, _, kind = name.rpartition(".")
    if module in _ROWS_OF_GROUPS:
        keys = module != "self_attn.q_proj"
        if len(keep.groups) == unit.groups:
            return tensor
        rows = group_channels(unit, keep.groups, keys=keys)
        return tensor.index_select(0, rows.to(tensor.device))
    if module in _ROWS_OF_NEURONS:
        return tensor.index_select(0, _index(keep.neurons, tensor))
    if module == "self_attn.o_proj" and kind == "weight":
        return tensor.index_select(1, group_channels(unit, keep.groups).to(tensor.device))
    if module == "mlp.down_proj" and kind == "weight":
        return tensor.index_select(1, _index(keep.neurons, tensor))
    return tensor


def _index(numbers: tuple[int, ...], tensor: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=tensor.device)
