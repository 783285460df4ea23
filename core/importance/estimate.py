"""Estimated operations, memory and time of importance runs, from headers alone; no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from core.checkpoint.headers import CheckpointInfo
from core.runs import pace
from core.runs.devices import MIB
from core.runs.dtypes import BYTES, computable

COMMANDS = ("importance", "search", "evaluate")
"""Whose rates tell that of scoring, the nearest first."""


@dataclass(frozen=True)
class Work:
    """Estimated floating-point operations and memory of a run."""

    flops: float
    memory_mib: float


def block_flops(info: CheckpointInfo, block: int, rows: int, tokens: int) -> float:
    """Return the operations of one pass of a block over ``rows`` rows of ``tokens`` tokens.

    Two per weight and token, plus the two attention products (causal: half of the square).
    """
    shape = info.block_shapes[block]
    attention = 2.0 * rows * tokens * tokens * shape["heads"] * info.head_dim
    return 2.0 * info.block_parameters[block] * rows * tokens + attention


def head_flops(info: CheckpointInfo, rows: int, tokens: int) -> float:
    """Return the operations of the output matrix on all positions that predict a token."""
    return 2.0 * info.vocab * info.hidden * rows * (tokens - 1)


def sweep_flops(info: CheckpointInfo, rows: int, tokens: int) -> float:
    """Return the operations of the leave-one-out sweep: N(N+1)/2 block passes, N+1 heads."""
    passes = sum(
        (block + 1) * block_flops(info, block, rows, tokens) for block in range(info.blocks)
    )
    return passes + (info.blocks + 1) * head_flops(info, rows, tokens)


def taylor_flops(info: CheckpointInfo, rows: int, tokens: int) -> float:
    """Return the operations of Taylor: every block forward twice and backward (2x forward)."""
    once = sum(block_flops(info, block, rows, tokens) for block in range(info.blocks))
    return 4 * once + 2 * head_flops(info, rows, tokens)


def greedy_rounds(info: CheckpointInfo, rounds: int | None = None) -> int:
    """Return the number of blocks that greedy removal removes; ``rounds`` None: half of them."""
    return min(info.blocks // 2 if rounds is None else rounds, max(0, info.blocks - 2))


def reads(info: CheckpointInfo, metrics: Collection[str], rounds: int | None = None) -> int:
    """Return how often an importance run passes over the weights."""
    wanted = set(metrics)
    often = int(bool({"ppl", "kl", "block-influence", "angular", "relative-update"} & wanted))
    often += 2 * ("taylor" in wanted) + ("magnitude" in wanted) + ("sublayers" in wanted)
    return often + greedy_rounds(info, rounds) * ("sleb" in wanted)


def greedy_flops(info: CheckpointInfo, rows: int, tokens: int, rounds: int | None) -> float:
    """Return the operations of greedy removal: one sweep per round, over fewer and fewer blocks.

    An upper bound, which assumes that the last blocks are removed, where sets share the least.
    """
    blocks = info.blocks
    total = 0.0
    for left in range(blocks, blocks - greedy_rounds(info, rounds), -1):
        total += sum((b + 1) * block_flops(info, b, rows, tokens) for b in range(left))
        total += left * head_flops(info, rows, tokens)
    return total


def estimate(
    info: CheckpointInfo,
    metrics: tuple[str, ...],
    rows: int,
    tokens: int,
    dtype: str,
    rounds: int | None = None,
) -> Work:
    """Return the work of an importance run of ``metrics``."""
    width = BYTES[computable(dtype)]
    state = rows * tokens * info.hidden * width
    largest = max(info.block_parameters, default=0) * width
    flops, extra = 0.0, 0.0
    if {"ppl", "kl"} & set(metrics):
        flops += sweep_flops(info, rows, tokens)
        extra = (info.blocks + 1) * state + largest
    elif {"block-influence", "angular", "relative-update"} & set(metrics):
        flops += sum(block_flops(info, b, rows, tokens) for b in range(info.blocks))
        extra = 2 * state + largest
    if "taylor" in metrics:
        flops += taylor_flops(info, rows, tokens)
        extra = max(extra, (info.blocks + 2) * state + 3 * largest)
    if "sublayers" in metrics:
        flops += 2 * sweep_flops(info, rows, tokens)
        extra = max(extra, 2 * info.blocks * state + largest)
    if "sleb" in metrics:
        flops += greedy_flops(info, rows, tokens, rounds)
        extra = max(extra, info.blocks * state + largest)
    weights = info.memory_bytes.get(dtype, info.memory_bytes["float32"])
    return Work(flops, (weights + extra) / MIB)


def seconds(flops: float, device: str, parameters: int) -> float | None:
    """Return the time at the rate of a run of this workspace on a model of that size, or None.

    On a CPU on which nothing has run yet, at an assumed rate (`origin`).
    """
    rate, _ = pace.expected(COMMANDS, device, parameters)
    return flops / rate if rate else None


def origin(device: str, parameters: int) -> str | None:
    """Return where the rate of `seconds` is from, in words."""
    return pace.expected(COMMANDS, device, parameters)[1]
