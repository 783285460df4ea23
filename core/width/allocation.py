"""How many heads and neurons a ratio leaves in each block, and which ratio meets a target.

The ratio is the method's own, as its paper has it: the share of units in every pruned block (FLAP:
of the parameters of attention and MLP in all pruned blocks together). METHODS, section 2.
No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.width.units import BlockUnits, Counts

MOST = 1 - 1e-9
"""The largest ratio tried when a parameter count is searched."""
_HALVINGS = 60
_DIGITS = 12


def channel_counts(unit: BlockUnits, ratio: float) -> Counts:
    """Return what LLM-Pruner keeps of a block: counted in channels, rounded as its code does.

    Of C channels C - int(C * (1 - ratio)) go; of the attention's (key/value) channels so many
    whole heads as fit into that. At least one group and one neuron stay.
    """
    channels = unit.groups * unit.head_dim
    groups = (channels - int(channels * (1 - ratio))) // unit.head_dim
    neurons = unit.neurons - int(unit.neurons * (1 - ratio))
    return _at_least_one(unit, groups, neurons)


def unit_counts(unit: BlockUnits, ratio: float) -> Counts:
    """Return what Wanda-sp keeps of a block: int(ratio * n) of n groups and of n neurons go."""
    return _at_least_one(unit, int(ratio * unit.groups), int(ratio * unit.neurons))


def _at_least_one(unit: BlockUnits, groups_gone: int, neurons_gone: int) -> Counts:
    return Counts(max(1, unit.groups - groups_gone), max(1, unit.neurons - neurons_gone))


COUNTING = {"channels": channel_counts, "units": unit_counts}


@dataclass(frozen=True)
class Reached:
    """The ratio found for a wanted number of parameters."""

    ratio: float
    parameters: int


def nearest(target: int, parameters_of: Callable[[float], int]) -> Reached:
    """Return the ratio whose parameter count is nearest to ``target``.

    ``parameters_of`` must not grow with the ratio. The two counts around the target are found by
    halving; on a tie the larger is taken. The ratio is written with as few digits as will do.
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
    """Return the ratio with the fewest digits that leaves as many parameters as ``ratio``."""
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
