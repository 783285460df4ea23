"""Where a cut leaves seams, and what healing needs before it can start; torch is not needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.errors import DataError, PlanError

METHODS = ("refit", "linear", "scale")
CHOICES = ("none", *METHODS, "auto")
TOKENS_PER_DIMENSION = 20
"""Least number of tokens per hidden dimension. With fewer, repairs did nothing or harm."""
HELD_OUT = 4
"""Every fourth row is held out from the fit."""


@dataclass(frozen=True)
class Seam:
    """A run of removed blocks that follow one another."""

    first: int
    """The first block that goes."""
    end: int
    """The block after the last that goes; the number of blocks if the cut is at the end."""


def seams_of(drop: Iterable[int]) -> tuple[Seam, ...]:
    """Return the seams of a cut, from the bottom up."""
    found: list[Seam] = []
    for block in sorted(set(drop)):
        if found and found[-1].end == block:
            found[-1] = Seam(found[-1].first, block + 1)
        else:
            found.append(Seam(block, block + 1))
    return tuple(found)


def check_seams(method: str, drop: Iterable[int]) -> tuple[Seam, ...]:
    """Return the seams of a cut; raises `PlanError` if ``method`` cannot heal one of them."""
    seams = seams_of(drop)
    if method != "scale" and seams and seams[0].first == 0:
        raise PlanError(
            f"--heal {method}: the cut begins at block 0. The repair changes the MLP of the block "
            "before the cut, and there is none.",
            "Keep block 0, or use --heal scale, which changes the blocks after the cut.",
        )
    return seams


def passes(method: str, drop: Iterable[int], blocks: int) -> float:
    """Return the block passes of healing one cut, in units of all rows.

    The dense stream runs up to the last seam, the healed one up to the block before it, and above
    every seam the held-out rows once; so do the dense and the pruned model. The regressions
    themselves are not counted.
    """
    gone = frozenset(drop)
    seams = seams_of(gone)
    if not seams:
        return 0.0
    kept = [block not in gone for block in range(blocks)]
    dense = seams[-1].end
    healed = sum(kept[: seams[-1].first])
    above = sum(sum(kept[seam.end :]) for seam in seams)
    reference = blocks + sum(kept[seams[0].first :])
    each = dense + healed + above / HELD_OUT
    return (len(METHODS) if method == "auto" else 1) * each + reference / HELD_OUT


def is_held_out(row: Any) -> Any:
    """Whether the row with this number is held out from the fit; elementwise for a tensor."""
    return row % HELD_OUT == HELD_OUT - 1


def check_tokens(hidden: int, rows: int, tokens: int) -> None:
    """Raise `DataError` if ``tokens`` in ``rows`` are too few for a model of width ``hidden``."""
    needed = TOKENS_PER_DIMENSION * hidden
    if tokens < needed:
        raise DataError(
            f"Healing needs at least {needed:,} tokens ({TOKENS_PER_DIMENSION} for each of "
            f"{hidden:,} hidden dimensions), but {rows:,} rows have {tokens:,}.",
            "Use more --samples, a larger --length or a longer text.",
        )
    if rows < HELD_OUT:
        raise DataError(
            f"Healing needs at least {HELD_OUT} rows, since every fourth is held out, but there "
            f"are {rows}.",
            "Use more --samples with a smaller --length.",
        )
