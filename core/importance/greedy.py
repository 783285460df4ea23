"""Greedy removal: each round removes the block whose removal increases perplexity least.

Song et al., SLEB. A round is one sweep over the remaining blocks; states below the first block
removed so far are those of the dense model and are shared within the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.importance.branches import Batch, losses_without
from core.importance.removals import removals
from core.model.blocks import BlockView
from core.runs.progress import SILENT, Progress


@dataclass(frozen=True)
class Round:
    """One removal: the block, and the perplexity without it and all blocks removed before."""

    block: int
    ppl: float


class _Part(Progress):
    """Reports the progress of one round as a part of all rounds."""

    def __init__(self, whole: Progress, round_: int, rounds: int) -> None:
        self._whole, self._round, self._rounds = whole, round_, rounds

    def step(
        self, done: int, total: int, message: str = "", *, left_s: float | None = None
    ) -> None:
        place = 100 * self._round + (100 * done // total if total else 0)
        text = f"Round {self._round + 1} of {self._rounds}: {message}"
        self._whole.step(place, 100 * self._rounds, text)

    def check_cancel(self) -> None:
        self._whole.check_cancel()


def greedy(
    view: BlockView,
    batch: Batch,
    progress: Progress = SILENT,
    *,
    rounds: int | None = None,
    kept: Sequence[int] | None = None,
) -> list[Round]:
    """Return the removals of ``rounds`` rounds, in order.

    Args:
        view: The model.
        batch: Calibration rows.
        progress: Updated after every block of every round.
        rounds: Number of blocks to remove; by default half of them.
        kept: Blocks that are never removed; by default the first and the last (as in SLEB).

    Memory: one state per remaining block. Ties go to the lower block.
    """
    kept = (0, len(view) - 1) if kept is None else kept
    free = [block for block in range(len(view)) if block not in kept]
    wanted = len(view) // 2 if rounds is None else rounds
    rounds = min(wanted, len(free), len(view) - 1)

    def perplexity(number: int, sets: list[frozenset[int]]) -> list[float]:
        losses = losses_without(view, batch, sets, _Part(progress, number, rounds))
        assert losses is not None
        return losses.perplexity

    return [Round(block, value) for block, value in removals(free, rounds, perplexity)]
