"""What fills a sequence, and which sequences each optimiser step takes. No torch."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from core.retrain.rows import Row

Pack = tuple[Row, ...]
"""What fills one sequence: a single row, or the rows of a pack."""


def sequences(rows: Sequence[Row], layout: str, cutoff: int, seed: int) -> list[Pack]:
    """Return what fills each sequence: one row (grouped), or several up to ``cutoff`` (packed)."""
    if layout == "grouped":
        return [(row,) for row in rows]
    order = list(rows)
    random.Random(seed).shuffle(order)
    packs: list[list[Row]] = []
    room: list[int] = []
    open_: list[int] = []
    for row in order:
        # Best fit among the last 64 open packs: nearly full packs, rows still in random order.
        fits = [p for p in open_ if room[p] >= len(row.ids)]
        if fits:
            best = min(fits, key=room.__getitem__)
            packs[best].append(row)
            room[best] -= len(row.ids)
        else:
            packs.append([row])
            room.append(cutoff - len(row.ids))
            open_.append(len(packs) - 1)
        open_ = [p for p in open_ if room[p] > 1][-64:]
    return [tuple(pack) for pack in packs]


def length(sequence: Pack) -> int:
    """Return the tokens of a sequence."""
    return sum(len(row.ids) for row in sequence)


class StepPlan:
    """Which sequences each optimiser step takes; depends on the seed and the step alone.

    Every step has exactly ``batch`` sequences (epochs run into each other), sorted by length and
    split into ``accumulation`` micro-batches, so that padding stays small and a step's gradient
    does not depend on the micro-batch.
    """

    def __init__(self, lengths: Sequence[int], batch: int, accumulation: int, seed: int) -> None:
        """Plan for sequences of the given ``lengths`` in tokens."""
        self._lengths = lengths
        self._batch = batch
        self._seed = seed
        self.accumulation = accumulation
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)
        self.step = functools.lru_cache(maxsize=2)(self._step)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._lengths)))
        random.Random(f"retrain {self._seed} {epoch}").shuffle(order)
        return order

    def indices(self, step: int) -> list[int]:
        """Return the sequences of a step (counted from 0), in drawn order."""
        count = len(self._lengths)
        places = range(step * self._batch, (step + 1) * self._batch)
        return [self._epoch(place // count)[place % count] for place in places]

    def _step(self, step: int) -> list[list[int]]:
        chosen = sorted(self.indices(step), key=self._lengths.__getitem__)
        parts = self.accumulation
        edges = [len(chosen) * part // parts for part in range(parts + 1)]
        return [chosen[a:b] for a, b in zip(edges, edges[1:], strict=False)]
