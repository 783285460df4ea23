"""The units that width pruning removes, and their parameter counts; no torch.

A unit is either a *group*, i.e. a key/value head with its contiguous query heads (one attention
head if there are as many key/value heads as query heads), or an MLP neuron, i.e. a row of gate and
up and a column of down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from core.checkpoint.headers import CheckpointInfo


class Counts(NamedTuple):
    """Number of groups and neurons that a block keeps."""

    groups: int
    neurons: int


class Keep(NamedTuple):
    """Groups and neurons that a block keeps, ascending."""

    groups: tuple[int, ...]
    neurons: tuple[int, ...]

    @property
    def counts(self) -> Counts:
        """Number of kept groups and neurons."""
        return Counts(len(self.groups), len(self.neurons))


@dataclass(frozen=True)
class BlockUnits:
    """The units of one block, and the parameters of each; none of a part that it lacks."""

    block: int
    groups: int
    """Key/value heads; 0 without attention."""
    queries: int
    """Query heads per group."""
    neurons: int
    """0 without an MLP."""
    head_dim: int
    hidden: int
    group_parameters: int
    """Rows of q, k, v (with their biases) and columns of o."""
    neuron_parameters: int
    """A row of gate and up (with their biases) and a column of down."""
    missing_biases: int
    """Parameters that biases of o and down would add if the block has none."""

    @property
    def all(self) -> Keep:
        """All units of the block."""
        return Keep(tuple(range(self.groups)), tuple(range(self.neurons)))

    @property
    def group_width(self) -> int:
        """Channels of the attention output that belong to one group."""
        return self.queries * self.head_dim


def units_of(info: CheckpointInfo) -> tuple[BlockUnits, ...]:
    """Return the units of every block of a checkpoint, from its shapes."""
    result = []
    for block, (shape, sizes) in enumerate(zip(info.block_shapes, info.block_modules, strict=True)):
        groups, neurons, hidden = shape["kv_heads"], shape["intermediate"], info.hidden
        queries = shape["heads"] // max(1, groups)
        o_weight = shape["heads"] * info.head_dim * hidden
        group = neuron = biases = 0
        if groups:
            projected = sizes["q_proj"] + sizes["k_proj"] + sizes["v_proj"]
            group = (projected + o_weight) // groups
            biases += sizes["o_proj"] == o_weight
        if neurons:
            neuron = (sizes["gate_proj"] + sizes["up_proj"]) // neurons + hidden
            biases += sizes["down_proj"] == neurons * hidden
        result.append(
            BlockUnits(
                block=block,
                groups=groups,
                queries=queries,
                neurons=neurons,
                head_dim=info.head_dim,
                hidden=hidden,
                group_parameters=group,
                neuron_parameters=neuron,
                missing_biases=biases * hidden,
            )
        )
    return tuple(result)


def parameters_left(
    info: CheckpointInfo,
    units: tuple[BlockUnits, ...],
    counts: Mapping[int, Counts],
    *,
    biases: bool = False,
) -> int:
    """Return the exact number of parameters with ``counts`` kept; other blocks are unchanged.

    ``biases`` adds one to every o and down projection that has none.
    """
    left = info.parameters
    for block, kept in counts.items():
        unit = units[block]
        left -= (unit.groups - kept.groups) * unit.group_parameters
        left -= (unit.neurons - kept.neurons) * unit.neuron_parameters
    return left + (sum(unit.missing_biases for unit in units) if biases else 0)
