"""Which rows form a sequence, and which sequences form an optimiser step. No torch."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence

from core.retrain.rows import Row

Pack = tuple[Row, ...]
"""The rows of one sequence: a single row, or several packed together."""


def sequences(rows: Sequence[Row], layout: str, cutoff: int, seed: int) -> list[Pack]:
    """Return the rows of each sequence: one (grouped), or several up to ``cutoff`` (packed)."""
    if layout == "grouped":
        return [(row,) for row in rows]
    order = list(rows)
    random.Random(seed).shuffle(order)
    packs: list[list[Row]] = []
    room: list[int] = []
    open_: list[int] = []
    for row in order:
        # Best fit among the last 64 open packs: nearly full packs, and rows still in random order.
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
    """Return the number of tokens in a sequence."""
    return sum(len(row.ids) for row in sequence)


def takes_few(steps: int, batch: int, sequences: int) -> bool:
    """Whether a training takes less than half of its sequences."""
    return 2 * steps * batch < sequences


class StepPlan:
    """Which sequences each optimiser step takes; depends only on the seed and the step.

    Every step has exactly ``batch`` sequences; a step may span two epochs. The sequences are sorted
    by length and split into ``accumulation`` micro-batches of similar size in tokens, so that
    there is little padding. The gradient of a step does not depend on the micro-batch size.
    """

    def __init__(self, lengths: Sequence[int], batch: int, accumulation: int, seed: int) -> None:
        """Plan the steps for sequences of the given ``lengths`` in tokens."""
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
        """Return the sequences of a step (counted from 0), in random order."""
        count = len(self._lengths)
        places = range(step * self._batch, (step + 1) * self._batch)
        return [self._epoch(place // count)[place % count] for place in places]

    def _step(self, step: int) -> list[list[int]]:
        chosen = sorted(self.indices(step), key=self._lengths.__getitem__)
        sizes = split([self._lengths[i] for i in chosen], self.accumulation)
        ends = list(itertools.accumulate(sizes))
        return [chosen[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def split(lengths: Sequence[int], parts: int) -> list[int]:
    """Return how many of the ascending ``lengths`` go into each of ``parts`` micro-batches.

    The largest padded micro-batch (rows times the longest of them) is as small as possible, so a
    micro-batch takes more short rows than long ones. It is never larger than with an equal number
    of rows in each part.
    """
    low, high = max(lengths), max(lengths) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        fits = len(_filled(lengths, middle)) <= parts
        low, high = (low, middle) if fits else (middle + 1, high)
    sizes = _filled(lengths, low)
    while len(sizes) < parts:  # fewer parts than needed: halve the largest
        place = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[place : place + 1] = [sizes[place] // 2, sizes[place] - sizes[place] // 2]
    return sizes


def _filled(lengths: Sequence[int], most: int) -> list[int]:
    """Return the sizes of parts filled up to ``most`` padded tokens, beginning with the longest."""
    sizes, left = [], len(lengths)
    while left:
        sizes.append(min(left, most // lengths[left - 1]))
        left -= sizes[-1]
    return sizes[::-1]
