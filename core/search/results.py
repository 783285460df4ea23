"""Result files of a search run: sets.csv, pairs.csv, heldout_rows.csv and summary.json.

A page reads `SetRow.read(folder)`, `PairRow.read(folder)`, `HeldoutRow.read(folder)` and
`Search.read(folder)`; `by_count(rows, method)` returns the set of every count. While the run goes
on, its metrics hold the live curve: `found_so_far(folder)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from core.prune.set_results import BEST, Search, SetRow, by_count, units_in
from core.runs.results import CsvRow, from_dict
from core.runs.workspace import BOOKKEEPING, json_lines

__all__ = [
    "BEST",
    "Found",
    "HeldoutRow",
    "PairRow",
    "Search",
    "SetRow",
    "by_count",
    "found_so_far",
    "interactions",
    "units_in",
]


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
    part_a: str = ""
    """attention or mlp if parts of blocks were searched; both can be of one block."""
    part_b: str = ""


@dataclass(frozen=True)
class HeldoutRow(CsvRow):
    """One row of heldout_rows.csv: what one set costs on one row of text that chose nothing."""

    FILE: ClassVar[str] = "heldout_rows.csv"

    heal: str
    """How the set was healed, as in sets.csv."""
    drop: str
    """Blocks or parts in ascending order, as in sets.csv; empty for the dense model."""
    row: int
    tokens: int
    """Predictions in the row."""
    nll: float
    """Mean over the row's predictions, in nats."""
    kl: float


@dataclass(frozen=True)
class Found:
    """One line of a search's metrics: a set that was better than those before it."""

    method: str
    count: int
    passes: int
    """Block passes of the whole search by then."""
    best: float
    """The objective on the calibration rows, in nats."""


def found_so_far(folder: Path) -> list[Found]:
    """Return what a search has found so far, in order; empty before the first set.

    A search that was resumed repeats what it had found before the interruption: only the last
    attempt is returned.
    """
    found: list[Found] = []
    for values in json_lines(folder / BOOKKEEPING / "metrics.jsonl"):
        one = from_dict(Found, values)
        if one is None:
            continue
        if found and one.passes < found[-1].passes:
            found.clear()
        found.append(one)
    return found


def interactions(rows: Iterable[PairRow], blocks: int) -> list[list[float | None]]:
    """Return the symmetric matrix [blocks][blocks] of interactions; None if not measured."""
    found: list[list[float | None]] = [[None] * blocks for _ in range(blocks)]
    for row in rows:
        a, b = row.block_a, row.block_b
        if 0 <= a < blocks and 0 <= b < blocks:
            found[a][b] = found[b][a] = row.interaction
    return found
