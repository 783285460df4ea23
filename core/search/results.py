"""Result files of a search run: sets.csv, pairs.csv and summary.json.

A page reads `SetRow.read(folder)`, `PairRow.read(folder)` and `Search.read(folder)`;
`by_count(rows, method)` returns the set of every count, and `interactions(rows, blocks)` the
matrix for a heatmap. While the run goes on, its metrics hold the live curve: lines with
``method``, ``count``, ``passes`` and ``best``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from core.prune.set_results import BEST, Search, SetRow, by_count
from core.runs.results import CsvRow

__all__ = ["BEST", "PairRow", "Search", "SetRow", "by_count", "interactions"]


@dataclass(frozen=True)
class PairRow(CsvRow):
    """One row of pairs.csv: the model without two blocks."""

    FILE: ClassVar[str] = "pairs.csv"

    block_a: int
    """The lower one."""
    block_b: int
    nll: float | None = None
    kl: float | None = None
    interaction: float | None = None
    """What the pair costs beyond the sum of both alone, by the objective, in nats."""


def interactions(rows: Iterable[PairRow], blocks: int) -> list[list[float | None]]:
    """Return the symmetric matrix [blocks][blocks] of interactions; None if not measured."""
    found: list[list[float | None]] = [[None] * blocks for _ in range(blocks)]
    for row in rows:
        a, b = row.block_a, row.block_b
        if 0 <= a < blocks and 0 <= b < blocks:
            found[a][b] = found[b][a] = row.interaction
    return found
