"""What a budget run holds in memory, from shapes alone; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from core.benchmark.analytic import kv_bytes
from core.budget.versions import kinds
from core.checkpoint.headers import CheckpointInfo
from core.importance.capacity import Capacity, Demand
from core.prune.version_results import MLP_SHARES
from core.runs import footprint
from core.runs.dtypes import BYTES, Formats

LEAST_BLOCKS = 4
"""Blocks that are timed together at least; models with fewer lend copies."""
STATES = 4
"""The fewest states to measure versions with: the dense one twice, and those of two versions."""


def demands(
    info: CheckpointInfo,
    versions: Sequence[str],
    blocks: Formats,
    timed: str,
    batch: int,
    context: int,
) -> list[Demand]:
    """Return what measuring KL holds, and what timing does with `LEAST_BLOCKS` blocks.

    Args:
        info: The checkpoint.
        versions: What a block can become.
        blocks: Formats of measuring KL.
        timed: Format that a benchmark holds the model in.
        batch: Sequences that are timed together.
        context: Tokens of every prompt.
    """
    narrow = sum(_mlp(info) * MLP_SHARES[v] for v in versions if v in MLP_SHARES)
    kl = Demand("versions", STATES, splits=False, extra=round(narrow * BYTES[blocks.arithmetic]))
    beside = _generating(info, timed, batch, context)
    wider = info.parameters * max(0, BYTES[timed] - BYTES[blocks.weights])
    stacks = [_stacks(info, versions, timed, LEAST_BLOCKS, loaded) for loaded in (True, False)]
    timing = Demand(
        "timing",
        0,
        splits=False,
        prepared=False,
        rows=0,
        extra=wider + stacks[0] + beside,
        streamed_extra=_outside(info, timed) + stacks[1] + beside,
        streams=False,
    )
    return [kl, timing]


def layers(
    info: CheckpointInfo,
    versions: Sequence[str],
    room: Capacity,
    timed: str,
    device: str,
    batch: int,
    context: int,
) -> int:
    """Return how many blocks are timed together: as many as fit, at least `LEAST_BLOCKS`."""
    if room.limit_bytes is None:
        return max(info.blocks, LEAST_BLOCKS)
    loaded = not room.streams
    weights = info.parameters * BYTES[timed] if loaded else _outside(info, timed)
    used = (
        footprint.PROCESS_BYTES[footprint.kind_of(device)]
        + weights
        + _generating(info, timed, batch, context)
    )
    counts = range(info.blocks, LEAST_BLOCKS, -1)
    fits = (
        n for n in counts if used + _stacks(info, versions, timed, n, loaded) <= room.limit_bytes
    )
    return next(fits, LEAST_BLOCKS)


def _mlp(info: CheckpointInfo) -> int:
    """Return the weights of the largest MLP."""
    return max((3 * s["intermediate"] * info.hidden for s in info.block_shapes), default=0)


def _outside(info: CheckpointInfo, dtype: str) -> int:
    return (info.parameters - sum(info.block_parameters)) * BYTES[dtype]


def _stacks(
    info: CheckpointInfo, versions: Sequence[str], dtype: str, count: int, loaded: bool
) -> int:
    """Return the bytes of the blocks that are timed, beyond those of a model that is ``loaded``.

    A narrower MLP shares its gate and up projection with the whole one, and copies the other.
    """
    narrow = sum(MLP_SHARES[v] for v in versions if v in MLP_SHARES)
    each = 0.0
    for group in kinds(info).values():
        first = group[0]
        own = count - len(group) if loaded else count
        each += max(0, own) * info.block_parameters[first]
        each += count * narrow * info.block_shapes[first]["intermediate"] * info.hidden
    return round(each * BYTES[dtype])


def _generating(info: CheckpointInfo, dtype: str, batch: int, context: int) -> int:
    """Return the bytes of keys and values, and of a block's activations."""
    inner = max((s["intermediate"] for s in info.block_shapes), default=0)
    activations = batch * context * (3 * inner + 8 * info.hidden) * BYTES[dtype]
    return round(kv_bytes(info, batch, context, dtype)) + activations
