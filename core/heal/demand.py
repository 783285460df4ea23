"""What healing holds in memory, from shapes alone; no torch."""

from __future__ import annotations

from dataclasses import replace

from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.heal import seams
from core.importance.capacity import CPU_TOKENS, GPU_TOKENS, HEAD_TOKENS, Demand
from core.runs.dtypes import BYTES, Formats, computable
from core.runs.footprint import kind_of

STATES = 4
"""States of every row: both streams, and those of the quarter that is held out, with copies."""
DISK_STATES = 2.75
"""The same on the disk: both streams, and of the quarter the dense, the pruned and a trial's."""
TOKEN_BYTES = 64
"""What a calibration token takes as a number in Python, as an id, and in masks."""
RIDGES = 5
"""Solutions held at once, one for each strength of the ridge."""
LOGITS = {"cpu": 2**24, "gpu": 2**28}
"""Logits of one model held at once for the KL: see core.heal.divergence."""


def demand(
    info: CheckpointInfo,
    methods: tuple[str, ...],
    repairs: int,
    rows: int,
    tokens: int,
    device: str,
    formats: Formats,
) -> Demand:
    """Return what healing on ``rows`` of ``tokens`` holds beside the weights.

    Args:
        info: The checkpoint.
        methods: refit, linear or scale; the largest decides.
        repairs: Projections whose new weights are held until they are written.
        rows: Calibration rows, those that are held out included.
        tokens: Tokens of a row.
        device: As ``--device`` has it.
        formats: What weights are held in and computed in.
    """
    kind = kind_of(device)
    chunk = max(tokens, CPU_TOKENS if kind == "cpu" else GPU_TOKENS)
    inner = max((shape["intermediate"] for shape in info.block_shapes), default=0)
    inner = max(inner, max((s["heads"] for s in info.block_shapes), default=0) * info.head_dim)
    fitted = 0
    for method in methods:
        if method == "scale":
            continue
        size = inner if method == "refit" else info.hidden
        # x'x with a copy and its factor; x'r, solutions, the weights before and after; one chunk
        cells = 3 * size * size + (2 + RIDGES) * size * info.hidden + 2 * inner * info.hidden
        fitted = max(fitted, 8 * (cells + chunk * (inner + 4 * info.hidden)))
    fits = any(method != "scale" for method in methods)
    held = -(-rows // seams.HELD_OUT) * tokens
    width = BYTES[computable(formats.arithmetic)]
    step = min(HEAD_TOKENS, max(1, LOGITS[kind] // max(1, info.vocab)), held)
    # log p, and logits in two formats with log q; states of both models, gathered and copied
    logits = step * (4 * 4 * info.vocab + 6 * info.hidden * width)
    if formats.weights != formats.arithmetic:
        logits += info.vocab * info.hidden * width
    written = repairs * inner * info.hidden * BYTES.get(info.dtype, 4) if fits else 0
    extra = max(fitted, logits) + written + TOKEN_BYTES * rows * tokens
    return Demand("healing", STATES, splits=False, rows=rows, extra=extra, disk_states=DISK_STATES)


def regression_flops(inner: int, hidden: int, method: str, rows: int, tokens: int) -> float:
    """Return the operations of fitting one projection, all of them in float64.

    The projection's output and the sums over the fitted tokens, the solutions of all ridges, and
    their errors on the tokens that are held out. Both streams through the block are not counted.

    Args:
        inner: Width into the projection.
        hidden: Width out of it.
        method: refit or linear; scale fits nothing.
        rows: Calibration rows, those that are held out included.
        tokens: Tokens of a row.
    """
    if method == "scale":
        return 0.0
    size = inner if method == "refit" else hidden
    held = -(-rows // seams.HELD_OUT) * tokens
    fitted = rows * tokens - held
    found = 2.0 * (fitted + held) * inner * hidden + 2.0 * fitted * size * (size + hidden)
    solved = size**3 / 3 + 2.0 * size * size * hidden + 2.0 * held * size * hidden
    return found + RIDGES * solved


def of_cut(
    info: CheckpointInfo,
    method: str,
    removal: Removal,
    rows: int,
    tokens: int,
    device: str,
    formats: Formats,
) -> Demand:
    """Return what healing one cut holds; the arguments are those of `demand`."""
    repairs = len(seams.seams_of(removal))
    return demand(info, seams.methods_for(method, removal), repairs, rows, tokens, device, formats)


def of_narrower(
    info: CheckpointInfo, rows: int, tokens: int, device: str, formats: Formats
) -> Demand:
    """Return what healing narrower blocks holds: one of them at a time, next to the whole block.

    The refitted projections are kept on disk.
    """
    found = demand(info, ("refit",), 1, rows, tokens, device, formats)
    narrow = max(info.block_parameters, default=0) * BYTES[computable(formats.arithmetic)]
    return replace(found, length=tokens, extra=found.extra + narrow)
