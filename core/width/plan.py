"""Plan a width run from shapes alone; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.checkpoint.headers import CheckpointInfo
from core.errors import OptionError, PlanError
from core.prune.plan import default_protection
from core.width import allocation
from core.width import extent as extents
from core.width import ways as variants
from core.width.extent import Extent
from core.width.methods import Method
from core.width.units import BlockUnits, Counts, parameters_left, units_of
from core.width.ways import Ways

DEFAULT = Ways()


@dataclass(frozen=True)
class WidthPlan:
    """What a run will do, before any unit has been scored."""

    method: Method
    info: CheckpointInfo
    units: tuple[BlockUnits, ...]
    """Units of every block of the checkpoint."""
    extent: Extent
    """Blocks to prune, separately for attention and MLP."""
    ratio: float
    """The method's own ratio; an estimate if the method is adaptive and a target was given."""
    target: int | None
    """Parameter count requested with --params or --match."""
    counts: Mapping[int, Counts] | None
    """Units kept in every pruned block; None if that depends on the scores."""
    parameters: int
    """Total parameters left; an estimate if ``counts`` is None."""
    ways: Ways = Ways()
    """The variant of the method."""

    @property
    def kind(self) -> str:
        """Whether the number of parameters is exact or estimated."""
        return "estimated" if self.counts is None else "exact"

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of which any part may be cut."""
        return self.extent.blocks

    @property
    def keeps_all(self) -> bool:
        """Whether it is known before scoring that nothing goes."""
        return self.counts is not None and all(
            kept == self.units[b].all.counts for b, kept in self.counts.items()
        )

    def left(self, counts: Mapping[int, Counts]) -> int:
        """Return the exact number of parameters with ``counts`` kept, added biases included."""
        return _left(self.info, self.units, counts, self.method)


def make(
    info: CheckpointInfo,
    method: Method,
    *,
    ratio: float | None = None,
    params: int | None = None,
    match: tuple[str, int] | None = None,
    layers: str | None = None,
    attention_layers: str | None = None,
    mlp_layers: str | None = None,
    parts: str = "both",
    ways: Ways = DEFAULT,
) -> WidthPlan:
    """Plan a cut from exactly one of ``ratio``, ``params`` and ``match`` (a name, its parameters).

    ``layers``, ``attention_layers``, ``mlp_layers`` and ``parts`` are as for `core.width.extent`.
    Without them, LLM-Pruner and the controls protect the first and last blocks as depth pruning
    does; FLAP and Wanda-sp prune all blocks. Parts that blocks lack are left out.

    Raises:
        OptionError: The ratio is not in [0, 1), the layers are outside the model, or an option does
            not go with the method.
        PlanError: None or several of the amounts are given, or what is asked for is out of reach.
    """
    units = units_of(info)
    extent = extents.read(
        _default_blocks(method, info.blocks),
        info.blocks,
        parts=parts,
        layers=layers,
        attention=attention_layers,
        mlp=mlp_layers,
        lacking={
            "attention": [unit.block for unit in units if not unit.groups],
            "mlp": [unit.block for unit in units if not unit.neurons],
        },
    )
    variants.check(ways, method, parts)
    amounts = (("ratio", ratio), ("params", params), ("match", match))
    given = [f"--{name}" for name, value in amounts if value is not None]
    if len(given) != 1:
        raise PlanError(
            "Exactly one of --ratio, --params and --match must be given.",
            f"Got {' and '.join(given) or 'none'}.",
        )
    if ratio is not None and not 0 <= ratio < 1:
        raise OptionError(
            f"--ratio must be at least 0 and below 1, got {ratio}.",
            "Use 0.2 to remove a fifth; 1 would leave nothing.",
        )
    if ways.round_to:
        allocation.check_rounding(units, extent, ways.round_to)
    chosen = [allocation.limited(units[b], extent) for b in extent.blocks]
    if ways.heads is not None:
        allocation.check_heads(chosen, ways.heads, ratio, alike=ways.structure == "ul-mm")
    target = params if params is not None else match[1] if match else None
    if target is not None:
        flag = f"--match {match[0]} ({target:,} parameters)" if match else f"--params {target:,}"
        _check_target(target, flag, info, units, extent, method, ways)
    if ways.counting(method) == "adaptive":
        return _adaptive(info, method, units, extent, ratio, target, ways)

    def counts_of(r: float) -> dict[int, Counts]:
        return {b: _counts(units[b], r, chosen, extent, method, ways) for b in extent.blocks}

    def left(r: float) -> int:
        return _left(info, units, counts_of(r), method)

    found = ratio if ratio is not None else allocation.nearest(target or 0, left).ratio
    counts = counts_of(found)
    return WidthPlan(
        method, info, units, extent, found, target, counts, _left(info, units, counts, method), ways
    )


def _counts(
    unit: BlockUnits,
    ratio: float,
    units: Sequence[BlockUnits],
    extent: Extent,
    method: Method,
    ways: Ways,
) -> Counts:
    """Return what one of the pruned ``units`` keeps, if that does not depend on scores."""
    if ratio == 0:
        return unit.all.counts
    counting = ways.counting(method)
    if counting == "manual":
        kept = allocation.manual_counts([unit], ratio, (ways.heads or 0) // len(units))
    else:
        kept = allocation.COUNTING[counting](unit, ratio)
    return allocation.fitted(unit, kept, extent, ways.round_to)


def _left(
    info: CheckpointInfo,
    units: tuple[BlockUnits, ...],
    counts: Mapping[int, Counts],
    method: Method,
) -> int:
    changed = any(kept != units[b].all.counts for b, kept in counts.items())
    return parameters_left(info, units, counts, biases=method.biases and changed)


def _default_blocks(method: Method, blocks: int) -> tuple[int, ...]:
    first, last = default_protection(blocks) if method.protects else (0, 0)
    return tuple(range(first, blocks - last))


def fewest(unit: BlockUnits, extent: Extent, ways: Ways) -> Counts:
    """Return the least that a block can keep."""
    return allocation.fitted(unit, Counts(1, 1), extent, ways.round_to)


def _check_target(
    target: int,
    flag: str,
    info: CheckpointInfo,
    units: tuple[BlockUnits, ...],
    extent: Extent,
    method: Method,
    ways: Ways,
) -> None:
    if target >= info.parameters:
        raise PlanError(
            f"{flag} is not smaller than the model's {info.parameters:,} parameters.",
            "Give a smaller number.",
        )
    least_counts = {b: fewest(units[b], extent, ways) for b in extent.blocks}
    least = parameters_left(info, units, least_counts, biases=method.biases)
    where = f"one head and one neuron in each of {len(extent.blocks)} blocks still leave"
    if ways.heads is not None:
        chosen = [allocation.limited(units[b], extent) for b in extent.blocks]
        groups = sum(u.groups for u in chosen) - ways.heads
        least += (groups - len(extent.attention)) * units[extent.attention[0]].group_parameters
        where = f"{groups} heads and one neuron in each of {len(extent.blocks)} blocks still leave"
    elif extent.attention != extent.mlp or ways.round_to:
        where = f"the narrowest widths in {len(extent.blocks)} blocks still leave"
    if target < least:
        raise PlanError(
            f"{flag} is out of reach: {where} {least:,} parameters.",
            "Give a larger number, or prune more of the blocks.",
        )


def prunable_parameters(units: Sequence[BlockUnits], extent: Extent) -> int:
    """Return the parameters of all groups and neurons that may be cut."""
    groups = sum(units[b].groups * units[b].group_parameters for b in extent.attention)
    return groups + sum(units[b].neurons * units[b].neuron_parameters for b in extent.mlp)


def _adaptive(
    info: CheckpointInfo,
    method: Method,
    units: tuple[BlockUnits, ...],
    extent: Extent,
    ratio: float | None,
    target: int | None,
    ways: Ways,
) -> WidthPlan:
    """Plan a cut whose share per block depends on the scores: the total is an estimate."""
    biases = sum(unit.missing_biases for unit in units) if method.biases else 0
    removed = None if target is None else info.parameters + biases - target
    if ways.ranking == "global":
        ratio, removed = _by_units(units, extent, ratio, removed)
    else:
        share = prunable_parameters(units, extent)
        if ratio is None:
            ratio = (removed or 0) / share
        removed = round(ratio * share)
    if ratio == 0:
        counts = {b: units[b].all.counts for b in extent.blocks}
        return WidthPlan(method, info, units, extent, 0.0, target, counts, info.parameters, ways)
    left = info.parameters - removed + biases
    return WidthPlan(method, info, units, extent, ratio, target, None, left, ways)


def _by_units(
    units: Sequence[BlockUnits], extent: Extent, ratio: float | None, removed: int | None
) -> tuple[float, int]:
    """Return ratio and removed parameters of a ranking in which heads and neurons count alike.

    A head has more weights than a neuron, and so, mostly, a higher score: the estimate takes
    neurons before heads. One of the two is given.
    """
    groups = sum(units[b].groups for b in extent.attention)
    neurons = sum(units[b].neurons for b in extent.mlp)
    group = units[extent.attention[0]].group_parameters if extent.attention else 0
    neuron = units[extent.mlp[0]].neuron_parameters if extent.mlp else 0
    total = groups + neurons
    if ratio is None:
        wanted = removed or 0
        gone = min(neurons, wanted / neuron) if neuron else 0.0
        rest = wanted - gone * neuron
        ratio = (gone + (rest / group if group else 0.0)) / total
    count = total - int(total * (1 - ratio))
    gone = min(neurons, count)
    return ratio, round(gone * neuron + min(groups, count - gone) * group)
