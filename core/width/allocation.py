"""Number of heads and neurons that a ratio leaves in each block, and the ratio for a target.

The ratio is the one that the method's paper defines: the share of units in every pruned block
(FLAP: of the attention and MLP parameters of the pruned blocks taken together; a global ranking: of
the units of all pruned blocks taken together). METHODS, section 2. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from core.errors import PlanError
from core.width.extent import Extent
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


def manual_counts(units: Sequence[BlockUnits], ratio: float, heads: int) -> Counts:
    """Return what FLAP's structures with a given number of heads keep of ``units``, in total.

    ``heads`` groups go, and the neurons that bring what is removed to ``ratio`` of the units'
    parameters, rounded down; a neuron of every MLP is kept.
    """
    total = sum(u.groups * u.group_parameters + u.neurons * u.neuron_parameters for u in units)
    remove = ratio * total - heads * _group_parameters(units)
    groups, neurons = sum(u.groups for u in units), sum(u.neurons for u in units)
    spare = neurons - sum(u.neurons > 0 for u in units)
    gone = min(max(0, int(remove / _neuron_parameters(units))), spare)
    return Counts(groups - heads, neurons - gone)


def limited(unit: BlockUnits, extent: Extent) -> BlockUnits:
    """Return ``unit`` with no more than what may be cut."""
    groups = unit.groups if unit.block in extent.attention else 0
    return replace(unit, groups=groups, neurons=unit.neurons if unit.block in extent.mlp else 0)


def _group_parameters(units: Sequence[BlockUnits]) -> int:
    """Return those of the first group there is."""
    return next((u.group_parameters for u in units if u.groups), 0)


def _neuron_parameters(units: Sequence[BlockUnits]) -> int:
    """Return those of the first neuron there is, at least 1."""
    return next((u.neuron_parameters for u in units if u.neurons), 1)


def check_heads(units: Sequence[BlockUnits], heads: int, ratio: float | None, alike: bool) -> None:
    """Raise `PlanError` if ``heads`` groups cannot be removed, or not within ``ratio``.

    ``alike``: every block loses as many.
    """
    part = next((u for u in units if not (u.groups and u.neurons)), None)
    if alike and part:
        raise PlanError(
            "--structure ul-mm treats all blocks alike, but only the "
            f"{'attention' if part.groups else 'MLP'} of block {part.block} can be cut.",
            "Use --structure al-mm, or other blocks.",
        )
    blocks, each = len(units), _group_parameters(units)
    spare = sum(max(0, u.groups - 1) for u in units)
    if alike:
        spare = blocks * (min(u.groups for u in units) - 1)
    if heads > spare:
        raise PlanError(
            f"--remove-heads {heads} is more than the {spare} heads that {blocks} blocks can lose, "
            "as each keeps one.",
            f"Use {spare} or fewer; with grouped-query attention a key/value head counts as one.",
        )
    if alike and heads % blocks:
        raise PlanError(
            f"--remove-heads {heads} cannot be divided evenly over {blocks} blocks.",
            f"Use a multiple of {blocks}, or --structure al-mm, which divides them by score.",
        )
    if ratio is None:
        return
    total = sum(u.groups * u.group_parameters + u.neurons * u.neuron_parameters for u in units)
    share = heads * each / total
    if share > ratio:
        raise PlanError(
            f"--remove-heads {heads} alone removes {share:.4f} of the parameters of attention and "
            f"MLP, more than --ratio {ratio:g}.",
            "Remove fewer heads, or raise the ratio.",
        )
    neurons = sum(max(0, u.neurons - 1) for u in units)
    most = share + neurons * _neuron_parameters(units) / total
    if ratio > most:
        raise PlanError(
            f"--ratio {ratio:g} is out of reach with --remove-heads {heads}: without all neurons "
            f"but one in each block it is {most:.4f}.",
            "Remove more heads, or lower the ratio.",
        )


def widths(unit: BlockUnits, part: str, round_to: int | None) -> tuple[int, ...]:
    """Return the numbers of units that a part of a block may keep, ascending.

    Those whose width is a multiple of ``round_to``, and all units. The attention's width is that of
    its output projection's input, the MLP's its number of neurons.
    """
    count, width = (unit.groups, unit.group_width) if part == "attention" else (unit.neurons, 1)
    step = (round_to or 1) // math.gcd(round_to or 1, width)
    found = range(step, count + 1, step)
    return (*found, *([count] if count % step else []))


def rounded(unit: BlockUnits, part: str, kept: int, round_to: int | None) -> int:
    """Return the number of units closest to ``kept`` that a part may keep; of two, the larger."""
    if not round_to:
        return max(1, kept)
    allowed = widths(unit, part, round_to)
    return min(allowed, key=lambda n: (abs(n - kept), -n))


def fitted(unit: BlockUnits, counts: Counts, extent: Extent, round_to: int | None) -> Counts:
    """Return ``counts`` rounded, and all units of a part that may not be cut."""
    groups, neurons = unit.all.counts
    if unit.block in extent.attention:
        groups = rounded(unit, "attention", counts.groups, round_to)
    if unit.block in extent.mlp:
        neurons = rounded(unit, "mlp", counts.neurons, round_to)
    return Counts(groups, neurons)


def check_rounding(units: Sequence[BlockUnits], extent: Extent, round_to: int) -> None:
    """Raise `PlanError` if a part that may be cut has no width that is a multiple."""
    for part, blocks in (("attention", extent.attention), ("mlp", extent.mlp)):
        for block in blocks:
            unit = units[block]
            allowed = widths(unit, part, round_to)
            if len(allowed) > 1 or (part == "attention" and unit.groups == 1):
                continue
            if part == "attention":
                what = f"{unit.groups} heads of {unit.group_width} channels in the attention"
            else:
                what = f"{unit.neurons:,} neurons in the MLP"
            other = "mlp" if part == "attention" else "attention"
            raise PlanError(
                f"--round-to {round_to} leaves nothing to cut from the {what} of block {block}.",
                f"Use a smaller multiple, or leave this part whole with --parts {other}.",
            )


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
