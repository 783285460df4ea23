"""Which sets of blocks can be left out of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from core.errors import PlanError


def check_drop(drop: Sequence[int], blocks: int, *, may_be_empty: bool = False) -> tuple[int, ...]:
    """Return ``drop`` if these blocks can be left out of ``blocks``.

    Raises `PlanError` for a block that does not exist or is named twice, if none would be left,
    and for an empty ``drop`` unless ``may_be_empty``.
    """
    for block in drop:
        if not 0 <= block < blocks:
            raise PlanError(
                f"Block {block} does not exist: the checkpoint has {blocks} blocks.",
                f"Blocks are numbered from 0 to {blocks - 1}.",
            )
    twice = [block for block, times in sorted(Counter(drop).items()) if times > 1]
    if twice:
        raise PlanError(f"Block {twice[0]} is listed twice.", "List each block once.")
    if not drop and not may_be_empty:
        raise PlanError("No blocks are selected.", "Name at least one block to drop.")
    if len(drop) >= blocks:
        raise PlanError(
            f"All {blocks} blocks are selected.", "Leave at least one block in the model."
        )
    return tuple(drop)
