"""Choosing a candidate: budgets, the best one within them, and the Pareto frontier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import OptionError

Row = Mapping[str, Any]
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


def broken(row: Row, budget: Budget) -> list[str]:
    """Return the columns in which a row exceeds the budget, unknown values included."""
    return [
        name
        for name, most in budget.limits.items()
        if most is not None and not (_known(row.get(name)) and row[name] <= most * (1 + TIE))
    ]


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def within(rows: Sequence[Row], budget: Budget) -> list[Row]:
    """Return the rows within every limit that did not run out of memory."""
    return [r for r in rows if not broken(r, budget) and r.get("kind_of_cost") != "out of memory"]


def best(rows: Sequence[Row], budget: Budget) -> Row | None:
    """Return the best row: the lowest perplexity within the budget.

    Ties go to the faster, then to the smaller. None if nothing is within the budget. If no row has
    a perplexity, the fastest is returned.
    """
    fitting = within(rows, budget)
    order = ("ppl", "per_token_ms", "memory_mib", "parameters")
    return min(
        fitting,
        key=lambda r: tuple(r[n] if _known(r.get(n)) else math.inf for n in order),
        default=None,
    )


def frontier(rows: Sequence[Row], x: str, y: str = "ppl") -> list[Row]:
    """Return the Pareto frontier of ``x`` and ``y`` (lower is better), ordered by ``x``.

    A row is dominated by one that is as low in both and lower in one; of equal rows the first
    stays. Rows with an unknown or infinite value are left out.
    """
    known = [r for r in rows if _known(r.get(x)) and _known(r.get(y))]
    kept: list[Row] = []
    lowest = math.inf
    for row in sorted(known, key=lambda r: (r[x], r[y])):
        if row[y] < lowest:
            kept.append(row)
            lowest = row[y]
    return kept
