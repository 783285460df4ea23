"""Number of heads and neurons that a ratio leaves in each block, and the ratio for a target.

The ratio is the one that the method's paper defines: the share of units in every pruned block
(FLAP: of the attention and MLP parameters of the pruned blocks taken together). METHODS, section 2.
No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.width.units import BlockUnits, Counts

MOST = 1 - 1e-9
"""The largest ratio tried in the search for a parameter count."""
_HALVINGS = 60
"""Bisections of a ratio between 0 and 1: more than the 53 bits of a float64 can tell apart."""
_DIGITS = 12
"""The most decimals of a ratio that is shown; the fewest that give the same counts are taken."""


def channel_counts(unit: BlockUnits, ratio: float) -> Counts:
    """Return what LLM-Pruner keeps of a block: counted in channels, rounded as in its code.

    Of C channels, C - int(C * (1 - ratio)) are removed; of the attention's (key/value) channels,
    as many whole heads as fit into that number. At least one group and one neuron are kept.
    """
    channels = unit.groups * unit.head_dim
    groups = (channels - int(channels * (1 - ratio))) // unit.head_dim
    neurons = unit.neurons - int(unit.neurons * (1 - ratio))
    return _at_least_one(unit, groups, neurons)


def unit_counts(unit: BlockUnits, ratio: float) -> Counts:
    """Return what Wanda-sp keeps of a block: it removes int(ratio * n) of n groups or neurons."""
    return _at_least_one(unit, int(ratio * unit.groups), int(ratio * unit.neurons))


def _at_least_one(unit: BlockUnits, groups_removed: int, neurons_removed: int) -> Counts:
    return Counts(max(1, unit.groups - groups_removed), max(1, unit.neurons - neurons_removed))


COUNTING = {"channels": channel_counts, "units": unit_counts}


@dataclass(frozen=True)
class Reached:
    """The ratio found for a target number of parameters."""

    ratio: float
    parameters: int


def nearest(target: int, parameters_of: Callable[[float], int]) -> Reached:
    """Return the ratio whose parameter count is closest to ``target``.

    ``parameters_of`` must not increase with the ratio. Bisection finds the two counts around the
    target; a tie goes to the larger. The ratio is rounded to the fewest digits that preserve it.
    """
    low, high = 0.0, MOST
    if parameters_of(high) > target:
        return Reached(_short(high, parameters_of), parameters_of(high))
    if parameters_of(low) <= target:
        return Reached(low, parameters_of(low))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if parameters_of(middle) > target:
            low = middle
        else:
            high = middle
    above, below = parameters_of(low), parameters_of(high)
    ratio = low if above - target <= target - below else high
    return Reached(_short(ratio, parameters_of), parameters_of(ratio))


def _short(ratio: float, parameters_of: Callable[[float], int]) -> float:
    """Return the ratio with the fewest digits that gives the parameter count of ``ratio``."""
    wanted = parameters_of(ratio)
    for digits in range(1, _DIGITS):
        short = round(ratio, digits)
        for candidate in (
            short,
            round(short + 10**-digits, digits),
            round(short - 10**-digits, digits),
        ):
            if 0 <= candidate <= MOST and parameters_of(candidate) == wanted:
                return candidate
    return ratio
