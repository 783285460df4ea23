"""The methods of search: each asks a ledger what sets cost and reports the best set per count.

One-shot removes the blocks that are cheapest alone. Greedy: Song et al., SLEB. Beam keeps several
sets of every size. Pairs predict a set by its single and pair terms and measure the best
predictions exactly. Evolution: Sieberling et al., EvoPress, arXiv 2410.14649. If sets are healed,
single blocks and pairs count as they are, and whole sets by what they cost after healing. No torch.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from core.importance.removals import removals
from core.search.ledger import Drop, Ledger

WIDTH = 4
"""Sets of every size that beam search keeps, besides greedy's."""
PREDICTED_WIDTH = 256
"""The same of predicted sets, which cost no passes."""
CANDIDATES = 24
"""Predicted sets of every count that are measured exactly."""
OFFSPRING = 32
"""Sets of one generation, as in EvoPress."""
SWAPS = 3
"""Most blocks that an offspring exchanges."""
PATIENCE = 4
"""Generations without an improvement after which evolution ends."""

Report = Callable[[Sequence[int]], None]
"""Takes a set that was measured, in removal order if there is one; a later one of the same size
replaces it."""


@dataclass(frozen=True)
class Task:
    """What is searched: which blocks may go, and how many of them."""

    free: tuple[int, ...]
    counts: tuple[int, ...]
    """Rising, each from 1 to the number of free blocks."""
    seed: int = 1234
    predicted: int = PREDICTED_WIDTH
    """Predicted sets of every size that the method pairs keeps; at least `CANDIDATES`."""

    @property
    def most(self) -> int:
        """The largest count."""
        return self.counts[-1]


def one_shot(task: Task, ledger: Ledger, report: Report) -> None:
    """Remove the blocks that cost least when removed alone; ties go to the lower block."""
    order = _alone(task, ledger)
    ledger.plain([frozenset(order[:count]) for count in task.counts])
    for count in task.counts:
        ledger.values([frozenset(order[:count])])
        report(order[:count])


def greedy(task: Task, ledger: Ledger, report: Report) -> None:
    """Remove, round by round, the block whose removal costs least after those before it."""
    gone: list[int] = []
    for block, _ in removals(task.free, task.most, lambda _, sets: ledger.values(sets)):
        gone.append(block)
        if len(gone) in task.counts:
            report(gone)


def beam(task: Task, ledger: Ledger, report: Report) -> None:
    """Extend the `WIDTH` cheapest sets of every size, and greedy's.

    Never worse than greedy, unless sets are healed: then not all are, and greedy's may not be.
    """
    sets: list[Drop] = [frozenset()]
    greedy_set: Drop = frozenset()
    for size in range(1, task.most + 1):
        grown = _grown(sets, task.free)
        values = dict(zip(grown, ledger.values(grown), strict=True))
        ranked = _ranked(values)
        greedy_set = min(
            (greedy_set | {block} for block in task.free if block not in greedy_set),
            key=lambda s: (values[s], sorted(s - greedy_set)),
        )
        sets = list(dict.fromkeys([*ranked[:WIDTH], greedy_set]))
        if size in task.counts:
            report(sorted(ranked[0]))


@dataclass(frozen=True)
class Predictor:
    """The cost of a set over the dense model's, by single and pair terms.

    E(S) = sum of d_i + sum over pairs of (d_ij - d_i - d_j), with d the increases over dense.
    """

    single: Mapping[int, float]
    interaction: Mapping[tuple[int, int], float]
    """By (lower, higher) block."""

    def of(self, drop: Iterable[int]) -> float:
        """Return E of a set; exact for one block and for two."""
        blocks = sorted(drop)
        pairs = itertools.combinations(blocks, 2)
        return sum(self.single[b] for b in blocks) + sum(self.interaction[p] for p in pairs)

    def rows(self) -> dict[int, dict[int, float]]:
        """Return, for every block, its interactions with all blocks (0 with itself)."""
        rows: dict[int, dict[int, float]] = {block: {block: 0.0} for block in self.single}
        for (a, b), value in self.interaction.items():
            rows[a][b] = rows[b][a] = value
        return rows


def predictor(free: Sequence[int], ledger: Ledger) -> Predictor:
    """Measure all single blocks and all pairs of ``free`` exactly."""
    pairs = [(a, b) for a in free for b in free if a < b]
    alone = [frozenset({block}) for block in free]
    values = ledger.plain([*alone, *map(frozenset, pairs)])
    dense = ledger.dense
    single = {b: v - dense for b, v in zip(free, values, strict=False)}
    both = {p: v - dense for p, v in zip(pairs, values[len(free) :], strict=True)}
    return Predictor(single, {(a, b): v - single[a] - single[b] for (a, b), v in both.items()})


def pairs(task: Task, ledger: Ledger, report: Report) -> None:
    """Measure all pairs, search the predicted costs, and measure the best predictions exactly."""
    terms = predictor(task.free, ledger)
    rows = terms.rows()
    level: dict[Drop, tuple[float, dict[int, float]]] = {frozenset(): (0.0, dict(terms.single))}
    candidates: dict[int, list[Drop]] = {}
    for size in range(1, task.most + 1):
        grown: dict[Drop, float] = {}
        parents: dict[Drop, tuple[Drop, int]] = {}
        for drop, (value, added) in level.items():
            for block in task.free:
                if block not in drop and (larger := drop | {block}) not in grown:
                    grown[larger], parents[larger] = value + added[block], (drop, block)
        ranked = _ranked(grown, task.predicted)
        following = {}
        for drop in ranked:
            parent, block = parents[drop]
            row = rows[block]
            following[drop] = (grown[drop], {b: v + row[b] for b, v in level[parent][1].items()})
        level = following
        if size in task.counts:
            candidates[size] = ranked[:CANDIDATES]
    ledger.plain([s for some in candidates.values() for s in some])
    for some in candidates.values():
        report(sorted(_ranked(dict(zip(some, ledger.values(some), strict=True)))[0]))


def evolve(task: Task, ledger: Ledger, report: Report) -> None:
    """Improve the best set known of every count by exchanging blocks; never worse than its start.

    A generation has `OFFSPRING` sets that exchange one to `SWAPS` dropped blocks for kept ones and
    were not measured before; the cheapest replaces its parent if it is better. Ends after
    `PATIENCE` generations without an improvement, or if there is no new set.
    """
    for count in task.counts:
        parent = ledger.cheapest(count, task.free) or frozenset(_alone(task, ledger)[:count])
        best, idle = ledger.values([parent])[0], 0
        report(sorted(parent))
        draw = random.Random(f"{task.seed} {count}")
        while idle < PATIENCE and (young := _offspring(task, ledger, parent, draw)):
            values = ledger.values(young)
            at = min(range(len(young)), key=values.__getitem__)
            idle += 1
            if values[at] < best:
                parent, best, idle = young[at], values[at], 0
                report(sorted(parent))


METHODS: dict[str, Callable[[Task, Ledger, Report], None]] = {
    "one-shot": one_shot,
    "greedy": greedy,
    "beam": beam,
    "pairs": pairs,
    "evolve": evolve,
}
"""In the order in which they run: evolution starts from what the others found."""


def _grown(sets: Iterable[Drop], free: Sequence[int]) -> list[Drop]:
    return list(dict.fromkeys(s | {block} for s in sets for block in free if block not in s))


def _ranked(values: Mapping[Drop, float], most: int | None = None) -> list[Drop]:
    """Return sets by rising value, at most ``most``; ties go to the set with the lower blocks."""
    return heapq.nsmallest(
        len(values) if most is None else most, values, key=lambda s: (values[s], sorted(s))
    )


def _alone(task: Task, ledger: Ledger) -> list[int]:
    """Return the free blocks by what each costs alone; ties go to the lower block."""
    values = ledger.plain([frozenset({block}) for block in task.free])
    return [block for _, block in sorted(zip(values, task.free, strict=True))]


def _offspring(task: Task, ledger: Ledger, parent: Drop, draw: random.Random) -> list[Drop]:
    """Return sets that were not measured before; fewer if they are hard to find."""
    kept = [block for block in task.free if block not in parent]
    swaps = min(SWAPS, len(parent), len(kept))
    found: dict[Drop, None] = {}
    for _ in range(20 * OFFSPRING if swaps else 0):
        number = draw.randint(1, swaps)
        gone = frozenset(draw.sample(sorted(parent), number))
        young = parent - gone | frozenset(draw.sample(kept, number))
        if young not in ledger.costs:
            found[young] = None
        if len(found) == OFFSPRING:
            break
    return list(found)
