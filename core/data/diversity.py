"""How long, how varied and how repetitive texts are.

distinct-n is the share of different n-grams among all n-grams of all texts (Li et al. 2016,
arXiv 1510.03055); it falls with their number and length, so it compares texts for the same prompts.
Repetition is the share of a text's 4-grams that it has had before (Welleck et al. 2019,
arXiv 1908.04319), averaged over texts.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

REPEATED = 4
"""Length of the n-grams that count as repeated."""


@dataclass(frozen=True)
class Diversity:
    """Length, distinct-n and repetition of some texts; None for what they are too short for."""

    texts: int = 0
    words: float | None = None
    """Mean length, in words."""
    distinct_1: float | None = None
    distinct_2: float | None = None
    distinct_3: float | None = None
    repetition: float | None = None
    """Mean share of the 4-grams of a text that are repeated."""


def grams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return the n-grams of a sequence."""
    return [tuple(items[at : at + n]) for at in range(len(items) - n + 1)]


def repetition(items: Sequence[Hashable]) -> float | None:
    """Return the share of a sequence's 4-grams that it has had before; None if it has none."""
    found = grams(items, REPEATED)
    return 1 - len(set(found)) / len(found) if found else None


def diversity_of(texts: Iterable[str]) -> Diversity:
    """Return length, distinct-n and repetition of texts; words are what spaces separate."""
    rows = [text.split() for text in texts]
    if not rows:
        return Diversity()

    def distinct(n: int) -> float | None:
        found = [gram for row in rows for gram in grams(row, n)]
        return len(set(found)) / len(found) if found else None

    repeated = [share for row in rows if (share := repetition(row)) is not None]
    return Diversity(
        len(rows),
        statistics.fmean(map(len, rows)),
        *(distinct(1), distinct(2), distinct(3)),
        statistics.fmean(repeated) if repeated else None,
    )


def loops(items: Sequence[Hashable], longest: int = 16, least: int = 48) -> bool:
    """Whether the last ``least`` items repeat one another with a period of up to ``longest``."""
    if len(items) < least:
        return False
    tail = items[-least:]
    return any(tail[period:] == tail[:-period] for period in range(1, longest + 1))
