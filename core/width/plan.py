"""Plan a width run from shapes alone; no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from core.checkpoint.headers import CheckpointInfo
from core.errors import OptionError, PlanError
from core.prune.plan import default_protection
from core.width import allocation
from core.width.methods import Method
from core.width.units import BlockUnits, Counts, parameters_left, units_of

_LAYERS = re.compile(r"([0-9]{0,9}):([0-9]{0,9})")


@dataclass(frozen=True)
class WidthPlan:
    """What a run will do, before any unit has been scored."""

    method: Method
    info: CheckpointInfo
    units: tuple[BlockUnits, ...]
    """Units of every block of the checkpoint."""
    blocks: tuple[int, ...]
    """Blocks to prune."""
    ratio: float
    """The method's own ratio; an estimate if the method is adaptive and a target was given."""
    target: int | None
    """Parameter count requested with --params or --match."""
    counts: Mapping[int, Counts] | None
    """Units kept in every pruned block; None if that depends on the scores."""
    parameters: int
    """Total parameters left; an estimate if ``counts`` is None."""

    @property
    def kind(self) -> str:
        """Whether the number of parameters is exact or estimated."""
        return "estimated" if self.counts is None else "exact"


def make(
    info: CheckpointInfo,
    method: Method,
    *,
    ratio: float | None = None,
    params: int | None = None,
    match: tuple[str, int] | None = None,
    layers: str | None = None,
) -> WidthPlan:
    """Plan a cut from exactly one of ``ratio``, ``params`` and ``match`` (a name, its parameters).

    ``layers`` is ``first:end`` as in Python: 4:30 is blocks 4 to 29. Without it, LLM-Pruner and
    the controls protect the first and last blocks as depth pruning does; FLAP and Wanda-sp prune
    all blocks.

    Raises:
        OptionError: The ratio is not in [0, 1), or the layers are outside the model.
        PlanError: None or several of the amounts are given, or the parameter count is out of reach.
    """
    units = units_of(info)
    blocks = layer_range(layers, info.blocks) if layers else _default_blocks(method, info.blocks)
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
    target = params if params is not None else match[1] if match else None
    if target is not None:
        flag = f"--match {match[0]} ({target:,} parameters)" if match else f"--params {target:,}"
        _check_target(target, flag, info, units, blocks, method)
    if method.counting == "adaptive":
        return _adaptive(info, method, units, blocks, ratio, target)
    count = allocation.COUNTING[method.counting]

    def left(r: float) -> int:
        return parameters_left(info, units, {b: count(units[b], r) for b in blocks})

    chosen = ratio if ratio is not None else allocation.nearest(target or 0, left).ratio
    counts = {b: count(units[b], chosen) for b in blocks}
    return WidthPlan(method, info, units, blocks, chosen, target, counts, left(chosen))


def layer_range(text: str, blocks: int) -> tuple[int, ...]:
    """Return the blocks of ``first:end``; raises `OptionError` if they are outside the model."""
    found = _LAYERS.fullmatch(text.strip())
    if not found:
        raise OptionError(f"--layers: '{text}' is not a range.", "Use 4:30 for blocks 4 to 29.")
    first = int(found[1] or 0)
    end = int(found[2]) if found[2] else blocks
    if end > blocks or first >= blocks:
        raise OptionError(
            f"--layers {text} goes beyond the model, which has blocks 0 to {blocks - 1}.",
            f"The maximum is 0:{blocks}; the end is not included.",
        )
    if first >= end:
        raise OptionError(f"--layers {text} is empty.", "Use 4:30 for blocks 4 to 29.")
    return tuple(range(first, end))


def _default_blocks(method: Method, blocks: int) -> tuple[int, ...]:
    first, last = default_protection(blocks) if method.protects else (0, 0)
    return tuple(range(first, blocks - last))


def _check_target(
    target: int,
    flag: str,
    info: CheckpointInfo,
    units: tuple[BlockUnits, ...],
    blocks: tuple[int, ...],
    method: Method,
) -> None:
    if target >= info.parameters:
        raise PlanError(
            f"{flag} is not smaller than the model's {info.parameters:,} parameters.",
            "Give a smaller number.",
        )
    fewest = {b: Counts(1, 1) for b in blocks}
    least = parameters_left(info, units, fewest, biases=method.biases)
    if target < least:
        raise PlanError(
            f"{flag} is out of reach: one head and one neuron in each of {len(blocks)} blocks "
            f"still leave {least:,} parameters.",
            "Give a larger number, or prune more blocks with --layers.",
        )


def prunable_parameters(units: tuple[BlockUnits, ...], blocks: tuple[int, ...]) -> int:
    """Return the parameters of all groups and neurons of ``blocks``."""
    return sum(
        units[b].groups * units[b].group_parameters + units[b].neurons * units[b].neuron_parameters
        for b in blocks
    )


def _adaptive(
    info: CheckpointInfo,
    method: Method,
    units: tuple[BlockUnits, ...],
    blocks: tuple[int, ...],
    ratio: float | None,
    target: int | None,
) -> WidthPlan:
    """Plan a method whose share per block depends on the scores: the total is an estimate."""
    share = prunable_parameters(units, blocks)
    biases = sum(unit.missing_biases for unit in units) if method.biases else 0
    if ratio is None:
        ratio = (info.parameters + biases - (target or 0)) / share
    if ratio == 0:
        counts = {b: units[b].all.counts for b in blocks}
        return WidthPlan(method, info, units, blocks, 0.0, target, counts, info.parameters)
    left = round(info.parameters - ratio * share) + biases
    return WidthPlan(method, info, units, blocks, ratio, target, None, left)
