"""How many block passes sets of skipped blocks cost when they share prefixes; no torch.

A block pass is one block applied to the hidden states of all rows. Sets that agree on the first
blocks share those passes, so a pass over many sets costs far less than running each set alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def shared(units: Iterable[Any], sets: Iterable[frozenset[Any]]) -> tuple[int, int]:
    """Return (passes, distinct sets) of one pass over ``units`` with shared prefixes."""
    order = list(units)
    place = {unit: at for at, unit in enumerate(order)}
    passes = distinct = 0
    groups: list[list[frozenset[Any]]] = [list(dict.fromkeys(sets))]
    for at, unit in enumerate(order):
        split: list[list[frozenset[Any]]] = []
        for group in groups:
            if len(group) == 1:  # it shares nothing from here on
                skipped = sum(place.get(u, -1) >= at for u in group[0])
                passes, distinct = passes + len(order) - at - skipped, distinct + 1
                continue
            stay = [s for s in group if unit not in s]
            out = [s for s in group if unit in s]
            passes += bool(stay)
            split += [part for part in (stay, out) if part]
        groups = split
    return passes, distinct + len(groups)


def alone(blocks: int, sets: Iterable[frozenset[int]]) -> int:
    """Return the passes if every set were run by itself, from the first block to the last."""
    return sum(blocks - len(s) for s in sets)


def grouped(sets: Sequence[frozenset[T]], most: int) -> list[list[frozenset[T]]]:
    """Return distinct ``sets`` in groups of at most ``most``; neighbours share long prefixes."""
    order = sorted(dict.fromkeys(sets), key=lambda one: sorted(one), reverse=True)  # type: ignore
    return [order[at : at + most] for at in range(0, len(order), most)]
