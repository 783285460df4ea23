"""Where a cut leaves seams, and what healing needs before it can start; torch is not needed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.checkpoint.drop import PARTS, Removal
from core.errors import DataError, PlanError
from core.prune.set_results import removal_of

METHODS = ("refit", "linear", "scale")
CHOICES = ("none", *METHODS, "auto")
TOKENS_PER_DIMENSION = 20
"""Least number of tokens per hidden dimension. With fewer, repairs did nothing or harm."""
HELD_OUT = 4
"""Every fourth row is held out from the fit."""


@dataclass(frozen=True)
class Seam:
    """A run of removed blocks, or parts of blocks, that follow one another, or a narrower MLP.

    Parts are numbered in order of computation: 2 b is the attention of block b, 2 b + 1 its MLP.
    The part before ``low`` is what a repair changes. Parts that the model did not have before are
    in the run too.
    """

    low: int
    """The first part that goes; after a narrower part, ``high`` if nothing goes there."""
    high: int
    """The part after the last that goes."""
    narrow: bool = False
    """Whether the part before the seam keeps some of its channels."""
    gone: tuple[int, ...] = ()
    """The parts in the run that go, ascending."""

    @property
    def first(self) -> int:
        """The first block that goes, loses a part or becomes narrower."""
        return self.gone[0] // 2 if self.gone else (self.low - 1) // 2

    @property
    def end(self) -> int:
        """The block after the last that goes or loses a part."""
        return self.gone[-1] // 2 + 1 if self.gone else (self.low + 1) // 2

    @property
    def removed(self) -> str:
        """What goes, in words."""
        gone = removal_of((part // 2, tuple(PARTS)[part % 2]) for part in self.gone).text
        if not self.narrow:
            return gone
        block, part = divmod(self.low - 1, 2)
        narrow = f"MLP neurons of {block}" if part else f"heads of {block}"
        return f"{gone} and {narrow}" if self.gone else narrow


def parts_of(removal: Removal) -> frozenset[int]:
    """Return the numbers of all parts that go."""
    whole = {part for block in removal.drop for part in (2 * block, 2 * block + 1)}
    some = {2 * block for block in removal.attention} | {2 * block + 1 for block in removal.mlp}
    return frozenset(whole | some)


def missing_parts(shapes: Sequence[Mapping[str, int]]) -> frozenset[int]:
    """Return the numbers of the parts that blocks of these ``shapes`` lack.

    ``shapes`` are the block_shapes of a checkpoint: heads and intermediate, 0 for a missing part.
    """
    sizes = [size for shape in shapes for size in (shape["heads"], shape["intermediate"])]
    return frozenset(part for part, size in enumerate(sizes) if not size)


def seams_of(drop: Removal | Iterable[int], missing: Collection[int] = ()) -> tuple[Seam, ...]:
    """Return the seams of a cut, from the bottom up; ``missing`` is what was not there before."""
    removal = drop if isinstance(drop, Removal) else Removal(tuple(drop))
    narrow = {2 * block + 1 for block, _ in removal.width}
    return seams_between(parts_of(removal), narrow, missing)


def seams_between(
    gone: Iterable[int], narrow: Collection[int], missing: Collection[int] = ()
) -> tuple[Seam, ...]:
    """Return the seams of parts that go and of ``narrow`` ones, from the bottom up.

    A narrower part right before what goes is one seam with it. Parts that were ``missing`` before
    belong to a seam beside them, since the part before it cannot be one of them.
    """
    gone, found = frozenset(gone) - frozenset(missing), list[Seam]()
    places = {(part, part + 1) for part in (*gone, *missing)} | {(p + 1, p + 1) for p in narrow}
    for low, high in sorted(places):
        parts = tuple(part for part in range(low, high) if part in gone)
        if found and found[-1].high == low:
            found[-1] = replace(found[-1], high=high, gone=(*found[-1].gone, *parts))
        else:
            found.append(Seam(low, high, low - 1 in narrow, parts))
    return tuple(seam for seam in found if seam.gone or seam.narrow)


def methods_for(method: str, removal: Removal) -> tuple[str, ...]:
    """Return the methods to try; raises `PlanError` if the cut is of parts and ``method`` not.

    Only refit knows what to do with a part of a block, or with a narrower MLP; auto then tries it
    alone.
    """
    if not removal.partial:
        return METHODS if method == "auto" else (method,)
    if method not in ("refit", "auto"):
        if removal.parts:
            block, part = removal.parts[0]
            what = f"of block {block} only the {PARTS[part]} is removed"
        else:
            block, neurons = removal.width[0]
            what = f"the MLP of block {block} keeps {neurons:,} neurons"
        raise PlanError(
            f"--heal {method} repairs the seams of whole blocks; {what}.",
            "Use --heal refit, or remove whole blocks only.",
        )
    return ("refit",)


def check_seams(
    method: str, drop: Removal | Iterable[int], missing: Collection[int] = ()
) -> tuple[Seam, ...]:
    """Return the seams of a cut; raises `PlanError` if ``method`` cannot heal one of them.

    ``missing`` are the parts that the model lacks before the cut, as of `missing_parts`.
    """
    removal = drop if isinstance(drop, Removal) else Removal(tuple(drop))
    methods_for(method, removal)
    seams = seams_of(removal, missing)
    if method != "scale" and seams and seams[0].low == 0:
        raise PlanError(
            f"--heal {method}: the cut begins at block 0. The repair changes what comes before the "
            "cut, and there is none.",
            "Keep all of block 0, or leave out --heal."
            if removal.partial
            else "Keep block 0, or use --heal scale, which changes the blocks after the cut.",
        )
    return seams


def passes(method: str, drop: Removal | Iterable[int], blocks: int, *, kept: bool = False) -> float:
    """Return the block passes of healing one cut, in units of all rows; a part is half a block.

    The dense stream runs up to the last seam, the healed one up to the block before it, and above
    every seam the held-out rows once; so do the dense and the pruned model. If the dense streams
    are ``kept``, only what is above the first seam runs. The regressions are not counted.
    """
    removal = drop if isinstance(drop, Removal) else Removal(tuple(drop))
    gone, seams = parts_of(removal), seams_of(removal)
    if not seams:
        return 0.0
    left = [part not in gone for part in range(2 * blocks)]
    low = seams[0].low
    dense = 0 if kept else seams[-1].high
    healed = sum(left[low if kept else 0 : seams[-1].low])
    above = sum(sum(left[seam.high :]) for seam in seams)
    reference = sum(left[low:]) + (0 if kept else 2 * blocks)
    each = dense + healed + above / HELD_OUT
    return (len(methods_for(method, removal)) * each + reference / HELD_OUT) / 2


def reads(found: Sequence[Seam], blocks: int) -> float:
    """Return how often refitting reads all blocks, if they are read one by one.

    The dense and the cut model pass once on the held-out rows, both streams once up to the last
    seam; for each seam, the block that is refitted is read again, after its target and after the
    blocks above it, which decide whether the refit is kept.
    """
    if not found:
        return 0.0
    gone = {part for seam in found for part in range(seam.low, seam.high)}
    total = blocks + math.ceil(found[-1].high / 2)
    for seam in found:
        total += 1 + len({p // 2 for p in range(seam.high, 2 * blocks) if p not in gone})
        total += seam.high > seam.low and (seam.high - 1) // 2 != (seam.low - 1) // 2
        total += seam.high % 2 and seam is not found[-1]  # the rest of its last block
    return total / blocks


def is_held_out(row: Any) -> Any:
    """Whether the row with this number is held out from the fit; elementwise for a tensor."""
    return row % HELD_OUT == HELD_OUT - 1


def check_tokens(hidden: int, rows: int, tokens: int, prefix: str = "") -> None:
    """Raise `DataError` if ``tokens`` in ``rows`` are too few for a model of width ``hidden``.

    ``prefix`` is what the options for rows and their length begin with.
    """
    needed = TOKENS_PER_DIMENSION * hidden
    if tokens < needed:
        raise DataError(
            f"Healing needs at least {needed:,} tokens ({TOKENS_PER_DIMENSION} for each of "
            f"{hidden:,} hidden dimensions), but {rows:,} rows have {tokens:,}.",
            f"Use more --{prefix}samples, a larger --{prefix}length or a longer text.",
        )
    if rows < HELD_OUT:
        raise DataError(
            f"Healing needs at least {HELD_OUT} rows, since every fourth is held out, but there "
            f"are {rows}.",
            f"Use more --{prefix}samples with a smaller --{prefix}length.",
        )
