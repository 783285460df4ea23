"""What a search removes one at a time: whole blocks, or the attention and the MLP of blocks.

The methods know numbers only. With sublayers, unit 2 b is the attention of block b and 2 b + 1 its
MLP: rising numbers in order of computation. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.checkpoint.drop import PARTS, Removal
from core.checkpoint.headers import CheckpointInfo
from core.heal import seams
from core.prune.set_results import removal_of, written

BLOCK, SUBLAYER = "block", "sublayer"
KINDS = (BLOCK, SUBLAYER)


@dataclass(frozen=True)
class Units:
    """The units of a model of ``blocks`` blocks."""

    kind: str
    blocks: int
    missing: frozenset[int] = frozenset()
    """Sublayers that the model lacks: none of them can be removed."""

    @classmethod
    def of_model(cls, kind: str, info: CheckpointInfo) -> Units:
        """Return the units of a checkpoint."""
        lacking = seams.missing_parts(info.block_shapes) if kind == SUBLAYER else ()
        return cls(kind, info.blocks, frozenset(lacking))

    @property
    def each(self) -> int:
        """Units per block."""
        return len(PARTS) if self.kind == SUBLAYER else 1

    @property
    def total(self) -> int:
        """Units of the model, missing ones included."""
        return self.each * self.blocks

    @property
    def noun(self) -> str:
        """What one unit is called."""
        return "part" if self.kind == SUBLAYER else "block"

    def free(self, first: int, last: int) -> tuple[int, ...]:
        """Return the units of all but the ``first`` and ``last`` blocks."""
        every = range(self.each * first, self.each * (self.blocks - last))
        return tuple(unit for unit in every if unit not in self.missing)

    def of(self, unit: int) -> Any:
        """Return a unit as `losses_without` takes it: a block, or (block, attention or mlp)."""
        if self.kind == BLOCK:
            return unit
        return unit // self.each, tuple(PARTS)[unit % self.each]

    def sets(self, drops: Iterable[frozenset[int]]) -> list[frozenset[Any]]:
        """Return sets of units as `losses_without` takes them."""
        return [frozenset(map(self.of, drop)) for drop in drops]

    def healing(self, method: str, drop: Iterable[int], *, kept: bool = True) -> int:
        """Return the passes of healing a cut on all rows; the dense streams are ``kept`` or not."""
        found = seams.passes(method, self.removal(drop), self.blocks, kept=kept)
        return math.ceil(self.each * found)

    def written(self, drop: Iterable[int]) -> str:
        """Return units as the cell ``drop`` of sets.csv names them."""
        return written(map(self.of, drop))

    def removal(self, drop: Iterable[int]) -> Removal:
        """Return what these units are; both parts of a block are the block."""
        return removal_of(map(self.of, drop))
