"""From a wanted share of the parameters to numbers of blocks, on both sides of it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def around(ratios: Sequence[float], target: float) -> list[int]:
    """Return the counts whose share of removed parameters is nearest to ``target``.

    ``ratios``: the share removed with the first 0, 1, 2, ... blocks, ascending. The first of the
    two removes less than the target and the second more; only one if it meets the target exactly,
    or if the target is beyond what can be removed. Count 0 removes nothing and is left out.
    """
    counts = range(1, len(ratios))
    below = [count for count in counts if ratios[count] <= target]
    above = [count for count in counts if ratios[count] >= target]
    found = {*below[-1:], *above[:1]}
    exact = [count for count in found if abs(ratios[count] - target) < 1e-9]
    return exact[:1] or sorted(found)


def counts_for(block_parameters: Sequence[int], total: int, ratio: float) -> tuple[int, int]:
    """Return the numbers of average blocks whose share is just below and just above ``ratio``.

    ``block_parameters`` of all blocks; ``total`` of the whole model. Both are at least 1, and leave
    at least one block.
    """
    wanted = ratio * total * len(block_parameters) / max(1, sum(block_parameters))
    most = max(1, len(block_parameters) - 1)
    low, high = (min(most, max(1, f(wanted))) for f in (math.floor, math.ceil))
    return low, high
