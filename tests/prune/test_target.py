"""The nearest numbers of blocks to a wanted share, against looking at all of them."""

from __future__ import annotations

import random

import pytest

from core.prune.target import around


@pytest.mark.parametrize("seed", range(20))
def test_the_counts_on_both_sides_are_the_nearest_there_are(seed):
    rng = random.Random(seed)
    ratios = [0.0]
    while len(ratios) < 9:
        ratios.append(ratios[-1] + rng.uniform(0.01, 0.1))
    target = rng.uniform(0.0, ratios[-1] + 0.05)
    found = around(ratios, target)
    assert 1 <= len(found) <= 2
    for side in ([r for r in ratios[1:] if r <= target], [r for r in ratios[1:] if r >= target]):
        if side:
            assert ratios.index(min(side, key=lambda r: abs(r - target))) in found
    assert found == sorted(found)
    assert 0 not in found


def test_an_exact_share_and_shares_beyond_both_ends():
    ratios = [0.0, 0.1, 0.2, 0.3]
    assert around(ratios, 0.2) == [2]
    assert around(ratios, 0.25) == [2, 3]
    assert around(ratios, 0.9) == [3]
    assert around(ratios, 0.01) == [1]
    assert around([0.0], 0.2) == []
