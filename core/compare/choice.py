"""Which candidate to take: budgets, the best one within them, and the Pareto frontier."""

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
    """Upper limits; None is no limit. A row with an unknown value does not keep to a limit."""

    memory_gib: float | None = None
    per_token_ms: float | None = None
    ppl_over_dense: float | None = None

    def __post_init__(self) -> None:
        """Raise `OptionError` for a limit that nothing can keep to."""
        for name, value in self.limits.items():
            if value is not None and not value > 0:
                raise OptionError(f"The budget {name} of {value} is not above 0.", "Raise it.")

    @property
    def limits(self) -> dict[str, float | None]:
        """The limits by the columns they are about."""
        mib = None if self.memory_gib is None else 1024 * self.memory_gib
        return {
            "memory_mib": mib,
            "per_token_ms": self.per_token_ms,
            "ppl_over_dense": self.ppl_over_dense,
        }

    @property
    def is_set(self) -> bool:
        """Whether there is any limit."""
        return any(v is not None for v in self.limits.values())


def broken(row: Row, budget: Budget) -> list[str]:
    """Return the columns in which a row does not keep to the budget, unknown ones included."""
    return [
        name
        for name, most in budget.limits.items()
        if most is not None and not (_known(row.get(name)) and row[name] <= most * (1 + TIE))
    ]


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def within(rows: Sequence[Row], budget: Budget) -> list[Row]:
    """Return the rows that keep to every limit and did not run out of memory."""
    return [r for r in rows if not broken(r, budget) and r.get("kind_of_cost") != "out of memory"]


def best(rows: Sequence[Row], budget: Budget) -> Row | None:
    """Return what to take: within the budget the lowest perplexity.

    Of equal perplexities the faster goes first, then the smaller. None where nothing keeps to it.
    Where no row has a perplexity the fastest is taken.
    """
    fitting = within(rows, budget)
    order = ("ppl", "per_token_ms", "memory_mib", "parameters")
    return min(
        fitting,
        key=lambda r: tuple(r[n] if _known(r.get(n)) else math.inf for n in order),
        default=None,
    )


def frontier(rows: Sequence[Row], x: str, y: str = "ppl") -> list[Row]:
    """Return the rows that no other beats in both ``x`` and ``y`` (lower is better), by ``x``.

    A row is beaten by one that is as low in both and lower in one; of equal ones the first stays.
    Rows where either is unknown or infinite are left out.
    """
    known = [r for r in rows if _known(r.get(x)) and _known(r.get(y))]
    kept: list[Row] = []
    lowest = math.inf
    for row in sorted(known, key=lambda r: (r[x], r[y])):
        if row[y] < lowest:
            kept.append(row)
            lowest = row[y]
    return kept
