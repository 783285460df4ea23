"""Greedy removal as such: which block goes next, given what sets cost; no torch.

Song et al., SLEB. The metric sleb and the method greedy of search are both this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def removals(
    free: Sequence[int],
    rounds: int,
    cost: Callable[[int, list[frozenset[int]]], Sequence[float]],
) -> Iterator[tuple[int, float]]:
    """Yield the block that each of ``rounds`` rounds removes, and the cost after it.

    ``cost`` is asked once a round, as (round, sets), for the sets that one more of the blocks
    ``free`` makes of those removed so far. Ties go to the lower block.
    """
    left, gone = sorted(free), list[int]()
    for number in range(min(rounds, len(left))):
        values = cost(number, [frozenset([*gone, block]) for block in left])
        best = min(range(len(left)), key=values.__getitem__)
        gone.append(left.pop(best))
        yield gone[-1], values[best]
