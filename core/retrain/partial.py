"""Which blocks partial fine-tuning trains: the last ones, and those before the seams. No torch.

Reassessing Layer Pruning (ICLR 2026) trains the output matrix and the last three kept blocks. All
below the first trained block is frozen, so no gradients pass through it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from core.errors import OptionError
from core.prune.results import Pruning
from core.retrain.spec import RetrainSpec


def trained_blocks(spec: RetrainSpec, blocks: int, folder: Path) -> tuple[int, ...]:
    """Return the blocks of the checkpoint in ``folder`` that are trained, ascending.

    Raises `OptionError` if --seams is given and the checkpoint has no seam with a block before it.
    """
    last = set(range(max(0, blocks - spec.last), blocks))
    return tuple(sorted(last | (_before_seams(folder, blocks) if spec.seams else set())))


def blocks_of(spec: RetrainSpec, blocks: int, folder: Path) -> tuple[int, ...]:
    """Return the blocks that any method trains: all, unless it is partial fine-tuning."""
    if spec.method == "partial":
        return trained_blocks(spec, blocks, folder)
    return tuple(range(blocks))


def last_blocks(spec: RetrainSpec, blocks: int) -> tuple[int, ...]:
    """Return `blocks_of` of a checkpoint that is not there: no seams are known."""
    return blocks_of(replace(spec, seams=False), blocks, Path())


def _before_seams(folder: Path, blocks: int) -> set[int]:
    cut = Pruning.read(folder)
    kept = cut.original_blocks if cut else ()
    if len(kept) != blocks:
        raise OptionError(
            f"--seams: the pruning.json of {folder} does not name the blocks that were removed.",
            "Leave --seams out, or give a checkpoint that Depthcut pruned by blocks.",
        )
    pairs = enumerate(zip(kept, kept[1:], strict=False))
    found = {number for number, (one, following) in pairs if following != one + 1}
    if not found:
        raise OptionError(
            f"--seams: no block of {folder} stands before a place where blocks were removed.",
            "Leave --seams out, and train the last blocks.",
        )
    return found
