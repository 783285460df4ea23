"""Which sets of blocks, and of parts of blocks, can be left out of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.errors import PlanError
from core.words import block_ranges

PARTS = {"attention": "attention", "mlp": "MLP"}
"""The two parts of a block, in order of computation -> how each is written in a sentence."""


@dataclass(frozen=True)
class Removal:
    """What a cut takes: whole blocks, and the attention or the MLP of others."""

    drop: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    """Blocks that lose their attention, and with it their key/value cache."""
    mlp: tuple[int, ...] = ()
    """Blocks that lose their MLP."""
    width: tuple[tuple[int, int], ...] = ()
    """(block, neurons) of blocks whose MLP keeps a number of its neurons."""
    order: str = ""
    """Folder or id of the budget run that ranked the neurons; needed with ``width``."""

    @property
    def neurons(self) -> dict[int, int]:
        """Block -> neurons that its MLP keeps, of the blocks in ``width``."""
        return dict(self.width)

    @property
    def partial(self) -> bool:
        """Whether something goes from blocks that stay: a part, or neurons."""
        return bool(self.attention or self.mlp or self.width)

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        """(block, attention or mlp) of every part that goes from a block that stays."""
        return (*((b, "attention") for b in self.attention), *((b, "mlp") for b in self.mlp))

    @property
    def touched(self) -> tuple[int, ...]:
        """Every block that goes or loses something, in ascending order."""
        narrow = (block for block, _ in self.width)
        return tuple(sorted({*self.drop, *self.attention, *self.mlp, *narrow}))

    @property
    def units(self) -> int:
        """Number of parts of blocks that go; a whole block has two."""
        return 2 * len(self.drop) + len(self.attention) + len(self.mlp)

    @property
    def ordered(self) -> Removal:
        """The same in ascending order, so that equal sets are equal values."""
        drop, attention, mlp = (tuple(sorted(one)) for one in (self.drop, self.attention, self.mlp))
        return Removal(drop, attention, mlp, tuple(sorted(self.width)), self.order)

    def below(self, blocks: int) -> Removal:
        """Return what of it belongs to the first ``blocks`` blocks."""
        drop, attention, mlp = (
            tuple(b for b in one if b < blocks) for one in (self.drop, self.attention, self.mlp)
        )
        width = tuple((b, neurons) for b, neurons in self.width if b < blocks)
        return Removal(drop, attention, mlp, width, self.order)

    def __bool__(self) -> bool:
        """Whether anything goes."""
        return bool(self.drop or self.attention or self.mlp or self.width)

    @property
    def text(self) -> str:
        """What goes, in words: ``blocks 3, 5 to 6, attention of 8 and MLP of 2``."""
        found = []
        if self.drop:
            found.append(f"block{'s' * (len(self.drop) > 1)} {block_ranges(self.drop)}")
        if self.attention:
            found.append(f"attention of {block_ranges(self.attention)}")
        if self.mlp:
            found.append(f"MLP of {block_ranges(self.mlp)}")
        for count in sorted(set(self.neurons.values()), reverse=True):
            blocks = [block for block, neurons in self.width if neurons == count]
            found.append(f"all but {count:,} MLP neurons of {block_ranges(blocks)}")
        *first, last = found or ["nothing"]
        return f"{', '.join(first)} and {last}" if first else last

    def misses(self, block: int, part: str) -> bool:
        """Whether ``part`` of ``block`` goes, alone or with the whole block."""
        return block in self.drop or block in getattr(self, part)


def check_drop(drop: Sequence[int], blocks: int, *, may_be_empty: bool = False) -> tuple[int, ...]:
    """Return ``drop`` if these blocks can be left out of ``blocks``.

    Raises `PlanError` for a block that does not exist or is named twice, if none would be left,
    and for an empty ``drop`` unless ``may_be_empty``.
    """
    _check_numbers(drop, blocks)
    if not drop and not may_be_empty:
        raise PlanError("No blocks are selected.", "Name at least one block to drop.")
    if len(drop) >= blocks:
        raise PlanError(
            f"All {blocks} blocks are selected.", "Leave at least one block in the model."
        )
    return tuple(drop)


def check_removal(
    removal: Removal, shapes: Sequence[Mapping[str, int]], *, may_be_empty: bool = False
) -> Removal:
    """Return ``removal`` if it can be left out of blocks of these ``shapes``.

    ``shapes`` are the block_shapes of a checkpoint: heads and intermediate, 0 for a missing part. A
    block that loses all that it has is dropped whole, behind those of ``removal.drop``.

    Raises `PlanError` as `check_drop` does, and for a part of a block that is dropped whole or does
    not have it.
    """
    blocks = len(shapes)
    narrow = tuple(block for block, _ in removal.width)
    for numbers in (removal.drop, removal.attention, removal.mlp, narrow):
        _check_numbers(numbers, blocks)
    _check_width(removal, shapes)
    has = {"attention": "heads", "mlp": "intermediate"}
    for block, part in removal.parts:
        name = PARTS[part]
        if block in removal.drop:
            raise PlanError(
                f"Block {block} is dropped whole, so its {name} cannot be removed as well.",
                f"List it under drop or under {part}, not under both.",
            )
        if not shapes[block][has[part]]:
            raise PlanError(f"Block {block} has no {name}.", "Leave it out of the plan.")

    def left(block: int) -> bool:
        parts = [part for part in PARTS if shapes[block][has[part]]]
        return any(not removal.misses(block, part) for part in parts)

    empty = tuple(dict.fromkeys(b for b, _ in removal.parts if not left(b)))
    if not removal and not may_be_empty:
        raise PlanError(
            "No blocks are selected.", "Name at least one block, or a part of one, to remove."
        )
    return Removal(
        check_drop((*removal.drop, *empty), blocks, may_be_empty=True),
        tuple(b for b in removal.attention if b not in empty),
        tuple(b for b in removal.mlp if b not in empty),
        removal.width,
        removal.order,
    )


def _check_width(removal: Removal, shapes: Sequence[Mapping[str, int]]) -> None:
    for block, neurons in removal.width:
        if block in removal.drop or block in removal.mlp:
            what = "is dropped whole" if block in removal.drop else "loses its MLP"
            raise PlanError(
                f"Block {block} {what}, so its MLP cannot keep {neurons:,} neurons.",
                "List the block once.",
            )
        now = shapes[block]["intermediate"]
        if not 0 < neurons < now:
            raise PlanError(
                f"The MLP of block {block} cannot be cut to {neurons:,} neurons: it has {now:,}.",
                f"Give 1 to {now - 1:,}." if now > 1 else "Leave the block out.",
            )


def _check_numbers(numbers: Sequence[int], blocks: int) -> None:
    for block in numbers:
        if not 0 <= block < blocks:
            raise PlanError(
                f"Block {block} does not exist: the checkpoint has {blocks} blocks.",
                f"Blocks are numbered from 0 to {blocks - 1}.",
            )
    twice = [block for block, times in sorted(Counter(numbers).items()) if times > 1]
    if twice:
        raise PlanError(f"Block {twice[0]} is listed twice.", "List each block once.")
