"""Rows that choose nothing: the held-out text of a search."""

from __future__ import annotations

from collections.abc import Sequence

from core.data.calibration import Chat, Encoder, Sample, sample
from core.errors import DataError

OWN_HELDOUT = ("demo", "english")
"""Sources with a held-out part of their own, disjoint from what calibrates."""


def heldout(
    source: str,
    tokenizer: Encoder,
    drawn: Sample,
    length: int,
    seed: int,
    chat: Chat | None = None,
) -> tuple[list[list[int]], str]:
    """Return up to as many rows as were ``drawn``, none of them among those, and what they are.

    Bundled texts have a held-out part; of other sources the rows that follow in the same shuffled
    order are taken. Both are empty if the source has no more rows.
    """
    wanted = len(drawn.rows)
    if source in OWN_HELDOUT:
        found = sample(source, tokenizer, wanted, length, seed, or_fewer=True, use="heldout")
        return found.rows, f"the held-out part of {source}"
    try:
        both = sample(
            source,
            tokenizer,
            2 * wanted,
            length,
            seed,
            or_fewer=True,
            join="on" if drawn.facts.joined else "off",
            chat=chat,
        ).rows
    except DataError:
        return [], ""
    rows = _others(both, drawn.rows)
    return rows, "other rows of the same source" if rows else ""


def _others(both: Sequence[list[int]], drawn: Sequence[list[int]]) -> list[list[int]]:
    """Return the rows after ``drawn``; none if ``both`` does not begin with them."""
    if list(both[: len(drawn)]) != list(drawn):
        return []
    return [row for row in both[len(drawn) :] if row not in drawn]
