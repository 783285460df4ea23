"""Choosing a candidate: budgets, the best one within them, and the Pareto frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.compare.outcomes import Outcome
from core.errors import OptionError

TIE = 1e-9


@dataclass(frozen=True)
class Budget:
    """Upper limits; None means unlimited. A row with an unknown value is not within a limit."""

    memory_gib: float | None = None
    per_token_ms: float | None = None
    ppl_over_dense: float | None = None

    def __post_init__(self) -> None:
        """Raise `OptionError` for a limit that nothing can satisfy."""
        for name, value in self.limits.items():
            if value is not None and not value > 0:
                raise OptionError(f"The budget {name} must be above 0, got {value}.", "Raise it.")

    @property
    def limits(self) -> dict[str, float | None]:
        """The limits by column."""
        mib = None if self.memory_gib is None else 1024 * self.memory_gib
        return {
            "memory_mib": mib,
            "per_token_ms": self.per_token_ms,
            "ppl_over_dense": self.ppl_over_dense,
        }

    @property
    def is_set(self) -> bool:
        """Whether any limit is set."""
        return any(v is not None for v in self.limits.values())


def broken(row: Outcome, budget: Budget) -> list[str]:
    """Return the columns in which a row exceeds the budget, unknown values included."""
    return [
        name
        for name, most in budget.limits.items()
        if most is not None and not _figure(row, name) <= most * (1 + TIE)
    ]


def _figure(row: Outcome, name: str) -> float:
    """Return a row's number; infinite if it is unknown."""
    found = row.figure(name)
    return found if found is not None and math.isfinite(found) else math.inf


def within(rows: Sequence[Outcome], budget: Budget) -> list[Outcome]:
    """Return the rows within every limit that fitted the device."""
    return [r for r in rows if not broken(r, budget) and r.kind_of_cost != "did not fit"]


COSTS = ("latency_s", "first_token_ms", "per_token_ms", "memory_mib")
"""Columns that are measured or estimated; a ranking has values of one kind only."""


def one_kind(rows: Sequence[Outcome]) -> list[Outcome]:
    """Return the rows with a measured cost, if there are any, otherwise the estimated ones."""
    kinds = {
        kind: [r for r in rows if r.kind_of_cost == kind] for kind in ("measured", "estimated")
    }
    return kinds["measured"] or kinds["estimated"]


def best(rows: Sequence[Outcome], budget: Budget) -> Outcome | None:
    """Return the best row: the lowest perplexity within the budget.

    Ties go to the faster, then to the smaller. None if nothing is within the budget. If no row has
    a perplexity, the fastest is returned. Under a limit on cost, an estimate wins only if no
    measured row is within it.
    """
    fitting = within(rows, budget)
    limited = any(budget.limits[name] is not None for name in COSTS if name in budget.limits)
    if limited or not any(r.ppl for r in fitting):
        fitting = one_kind(fitting) or fitting
    order = ("ppl", "per_token_ms", "memory_mib", "parameters")
    return min(
        fitting,
        key=lambda r: tuple(_figure(r, n) for n in order),
        default=None,
    )


def frontier(rows: Sequence[Outcome], x: str, y: str = "ppl") -> list[Outcome]:
    """Return the Pareto frontier of ``x`` and ``y`` (lower is better), ordered by ``x``.

    A row is dominated by one that is as low in both and lower in one; of equal rows the first
    stays. Rows with an unknown or infinite value are left out; of a cost, estimates as well if
    anything was measured.
    """
    rows = one_kind(rows) if x in COSTS else rows
    points = [(_figure(r, x), _figure(r, y), r) for r in rows]
    known = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    kept: list[Outcome] = []
    lowest = math.inf
    for _, height, row in sorted(known, key=lambda p: p[:2]):
        if height < lowest:
            kept.append(row)
            lowest = height
    return kept
