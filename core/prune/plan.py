"""Choose the blocks to drop, given a criterion, protected blocks and the amount to remove.

A plan only records a choice and cuts nothing: the blocks in removal order and what will be left.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from core import words
from core.checkpoint.drop import PARTS, Removal
from core.criteria import BUDGET, CONTROLS, SEARCHED, SUBLAYERS
from core.errors import DataError, PlanError
from core.prune.budgets import Library, Limits, Solution
from core.prune.scores import BlockScores, canonical
from core.prune.set_results import removal_of


def unprotected(blocks: int, protected: Container[int]) -> tuple[int, ...]:
    """Return the blocks of ``range(blocks)`` that may be dropped."""
    return tuple(block for block in range(blocks) if block not in protected)


@dataclass(frozen=True)
class Plan:
    """A choice of blocks; parameters and ratio are None if no checkpoint was given."""

    drop: tuple[int, ...]
    """Blocks to remove, in removal order (an angular range: ascending)."""
    keep: tuple[int, ...]
    criterion: str
    protected: tuple[int, ...]
    """Blocks that were excluded from removal."""
    params: int | None
    """Parameters left."""
    ratio: float | None
    """Share of all parameters that is removed."""
    params_before: int | None
    blocks: int
    available: int
    """Maximum number of blocks that can be dropped under this protection."""
    requested: dict[str, float | int]
    """What was requested: count, ratio or params."""
    protect_first: int
    protect_last: int
    scores: str | None
    checkpoint: str | None
    seed: int | None
    """Seed of the random control; None for all other criteria."""
    attention: tuple[int, ...] = ()
    """Kept blocks that lose their attention."""
    mlp: tuple[int, ...] = ()
    """Kept blocks that lose their MLP."""
    mlp_width: dict[int, int] = field(default_factory=dict)
    """Block -> neurons that its MLP keeps."""
    neurons: str = ""
    """The budget run that ranked them."""

    @property
    def removal(self) -> Removal:
        """All that goes."""
        width = tuple(self.mlp_width.items())
        return Removal(self.drop, self.attention, self.mlp, width, self.neurons)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def default_protection(blocks: int) -> tuple[int, int]:
    """Return how many first and last blocks are protected by default.

    The first 4 and last 2 (Kim et al., arXiv 2402.02834) with 12 or more blocks, 1 and 1 with
    fewer, none with 2 or fewer.
    """
    if blocks >= 12:
        return 4, 2
    return (1, 1) if blocks > 2 else (0, 0)


class Sizes(Protocol):
    """The part of `core.checkpoint.headers.CheckpointInfo` that is needed here."""

    @property
    def path(self) -> str:
        """What the blocks belong to."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def parameters(self) -> int:
        """Parameters of the model."""

    @property
    def block_parameters(self) -> tuple[int, ...]:
        """Parameters of each block."""

    def part_parameters(self, block: int, part: str) -> int:
        """Return the parameters of a block's attention or mlp."""

    def narrowing(self, block: int, neurons: int) -> int:
        """Return the parameters that go if a block's MLP keeps only ``neurons``."""


def parameters_after(info: Sizes, removal: Removal | Sequence[int]) -> int:
    """Return the exact number of parameters left without some blocks, and parts of others."""
    found = removal if isinstance(removal, Removal) else Removal(tuple(removal))
    left = info.parameters - sum(info.block_parameters[block] for block in set(found.drop))
    left -= sum(info.part_parameters(block, part) for block, part in found.parts)
    return left - sum(info.narrowing(block, neurons) for block, neurons in found.width)


def choose(
    scores: BlockScores | None,
    criterion: str,
    *,
    count: int | None = None,
    ratio: float | None = None,
    params: int | None = None,
    info: Sizes | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    seed: int = 1234,
) -> Plan:
    """Choose blocks by ``criterion`` and exactly one of ``count``, ``ratio`` and ``params``.

    ``ratio`` (share of all parameters to remove) and ``params`` (target parameter count) use the
    closest achievable number of blocks, at least one, and need ``info``. ``scores`` may be None
    for the controls ``last`` and ``random`` if ``info`` is given.

    Raises `PlanError` if protection leaves too few blocks for the request, `DataError` if the
    scores are unsuitable.
    """
    name = canonical(criterion)
    blocks = _blocks(scores, info)
    if name == "sleb" and blocks > 2:  # the search keeps these two; all others are candidates
        protect_first = 1 if protect_first is None else protect_first
        protect_last = 1 if protect_last is None else protect_last
    if name in SEARCHED and scores and scores.protected:
        protect_first = scores.protected[0] if protect_first is None else protect_first
        protect_last = scores.protected[1] if protect_last is None else protect_last
    first, last = protection(blocks, protect_first, protect_last)
    if name == SUBLAYERS:
        return _choose_parts(scores, blocks, first, last, _requested(count, ratio, params), info)
    protected = (*range(first), *range(blocks - last, blocks))
    available = min(blocks - first - last, blocks - 1)
    if name == "sleb" and scores and scores.greedy:
        available = min(available, len(scores.greedy))
    if scores is None and name not in CONTROLS:
        raise DataError(f"The criterion {name} needs scores.", "Give an importance run or a CSV.")
    counts: Sequence[int] = range(1, available + 1)
    pick: Callable[[int], Removal | tuple[int, ...]]
    if name in SEARCHED:
        assert scores is not None
        sets = _found_sets(scores, name, set(protected))
        counts, pick = tuple(sets), sets.__getitem__
        if len(counts) == 1 and count is ratio is params is None:
            count = counts[0]
    else:
        pick = _picker(scores, name, blocks, first, last, seed)
    requested = _requested(count, ratio, params)
    searched = available < min(blocks - first - last, blocks - 1)
    number = _number(
        requested,
        pick,
        counts,
        info,
        first,
        last,
        searched=name if name in SEARCHED else searched,
        what="part" if name in SEARCHED and scores and scores.part_sets else "block",
    )
    chosen = pick(number)
    return _plan(
        chosen if isinstance(chosen, Removal) else Removal(chosen),
        name,
        blocks,
        (first, last),
        available,
        requested,
        scores,
        info,
        seed=seed if name == "random" else None,
    )


def _plan(
    removal: Removal,
    name: str,
    blocks: int,
    protect: tuple[int, int],
    available: int,
    requested: dict[str, float | int],
    scores: BlockScores | None,
    info: Sizes | None,
    seed: int | None = None,
) -> Plan:
    """Return the plan of what was chosen, with what is left of the checkpoint."""
    first, last = protect
    left = parameters_after(info, removal) if info else None
    return Plan(
        drop=removal.drop,
        attention=removal.attention,
        mlp=removal.mlp,
        mlp_width=removal.neurons,
        neurons=removal.order,
        keep=tuple(block for block in range(blocks) if block not in removal.drop),
        criterion=name,
        protected=(*range(first), *range(blocks - last, blocks)),
        params=left,
        ratio=1 - left / info.parameters if info and left is not None else None,
        params_before=info.parameters if info else None,
        blocks=blocks,
        available=available,
        requested=requested,
        protect_first=first,
        protect_last=last,
        scores=scores.source if scores else None,
        checkpoint=info.path if info else None,
        seed=seed,
    )


def solved(
    solution: Solution,
    library: Library,
    limits: Limits,
    protect: tuple[int, int],
    info: Sizes | None = None,
) -> Plan:
    """Return the plan of what every block becomes within budgets."""
    left, before = solution.figures.params, library.dense().params
    found = _plan(
        solution.removal,
        BUDGET,
        library.blocks,
        protect,
        max(0, min(library.blocks - sum(protect), library.blocks - 1)),
        dict(limits.given),
        None,
        info,
    )
    return dataclasses.replace(
        found,
        params=left,
        params_before=before,
        ratio=1 - left / before,
        scores=library.source,
        checkpoint=info.path if info else library.summary.checkpoint or None,
    )


def _choose_parts(
    scores: BlockScores | None,
    blocks: int,
    first: int,
    last: int,
    requested: dict[str, float | int],
    info: Sizes | None,
) -> Plan:
    """Choose parts of blocks; a block that loses both parts is dropped whole."""
    if scores is None:
        raise DataError(f"The criterion {SUBLAYERS} needs scores.", "Give an importance run.")
    every = [(block, part) for block in range(blocks) for part in PARTS]
    missing = [unit for unit in every if info and not info.part_parameters(*unit)]
    free = [unit for unit in scores.part_order(missing) if first <= unit[0] < blocks - last]
    available = min(len(free), len(every) - len(missing) - 1)

    def pick(number: int) -> Removal:
        taken = free[:number]
        blocks_taken = {block for block, _ in taken}  # of a part that was the last, all goes
        return removal_of([*taken, *(unit for unit in missing if unit[0] in blocks_taken)])

    counts = range(1, available + 1)
    number = _number(requested, pick, counts, info, first, last, what="part")
    return _plan(pick(number), SUBLAYERS, blocks, (first, last), available, requested, scores, info)


def _blocks(scores: BlockScores | None, info: Sizes | None) -> int:
    if scores and info and scores.blocks != info.blocks:
        raise PlanError(
            f"{scores.source} has scores for {scores.blocks} blocks, but the checkpoint has "
            f"{info.blocks}.",
            "Give the scores of this checkpoint.",
        )
    if info:
        return info.blocks
    if scores:
        return scores.blocks
    raise PlanError("A plan needs scores or a checkpoint.", "Give at least one of the two.")


def protection(blocks: int, first: int | None, last: int | None) -> tuple[int, int]:
    """Return how many first and last blocks are kept: as given, else by default.

    Raises `PlanError` if there are fewer blocks.
    """
    defaults = default_protection(blocks)
    first = defaults[0] if first is None else first
    last = defaults[1] if last is None else last
    if first < 0 or last < 0 or first + last > blocks:
        raise PlanError(
            f"Cannot protect the first {first} and last {last} of {blocks} blocks.",
            f"Each must be at least 0, and together they must not exceed {blocks}.",
        )
    return first, last


def _requested(
    count: int | None, ratio: float | None, params: int | None
) -> dict[str, float | int]:
    given = {
        name: value
        for name, value in (("count", count), ("ratio", ratio), ("params", params))
        if value is not None
    }
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise PlanError(
            "Exactly one of --count, --ratio and --params must be given.", f"Got {found}."
        )
    if count is not None and count < 1:
        raise PlanError(f"--count must be at least 1, got {count}.")
    if ratio is not None and not 0 < ratio < 1:
        raise PlanError(
            f"--ratio must be between 0 and 1, got {ratio}.", "Use 0.2 to remove a fifth."
        )
    if params is not None and params < 1:
        raise PlanError(
            f"--params must be at least 1, got {params}.", "Give the target parameter count."
        )
    return given


Picker = Callable[[int], tuple[int, ...]]


def _picker(
    scores: BlockScores | None, name: str, blocks: int, first: int, last: int, seed: int
) -> Picker:
    """Return a function from a number of blocks to the blocks, in removal order."""
    if name == "angular":
        assert scores is not None
        return lambda length: angular_range(scores, length, first, last)
    order: Sequence[int]
    if name == "sleb":
        assert scores is not None
        return lambda number: greedy_order(scores, number, first, last)
    if name == "last":
        order = range(blocks - 1, -1, -1)
    elif name == "random":
        # Shuffle before protecting, so that the order does not depend on what is protected.
        order = random.Random(seed).sample(range(blocks), blocks)
    else:
        assert scores is not None
        order = scores.order(name)
    free = tuple(block for block in order if first <= block < blocks - last)
    return lambda number: free[:number]


def _found_sets(scores: BlockScores, name: str, protected: Container[int]) -> dict[int, Removal]:
    """Return the sets that search found by count; raises `DataError` if all are protected."""
    found = scores.found(name)
    allowed = {
        count: gone
        for count, gone in found.items()
        if not any(block in protected for block in gone.touched)
    }
    if not allowed:
        raise DataError(
            f"Every set that {name} found in {scores.source} has blocks that are protected here.",
            "Lower --protect-first and --protect-last, or search again with these.",
        )
    return allowed


def greedy_order(scores: BlockScores, number: int, first: int, last: int) -> tuple[int, ...]:
    """Return the first ``number`` blocks that greedy search removed.

    Raises `DataError` if there was no search, if it stopped earlier, or if it removed a block that
    is protected now: skipping that block would give an order that was never measured.
    """
    if not scores.greedy:
        raise DataError(
            f"{scores.source} has no greedy order.",
            "Score the checkpoint with the metric sleb, or choose another criterion.",
        )
    if number > len(scores.greedy):
        raise DataError(
            f"Greedy search in {scores.source} removed only {len(scores.greedy)} blocks, "
            f"but {number} were requested.",
            "Request fewer blocks, or re-run importance with more --rounds.",
        )
    chosen = scores.greedy[:number]
    for block in chosen:
        if block < first or block >= scores.blocks - last:
            raise DataError(
                f"Greedy search removed block {block}, which is protected here.",
                "Lower --protect-first and --protect-last, or choose another criterion.",
            )
    return chosen


def angular_range(scores: BlockScores, length: int, first: int, last: int) -> tuple[int, ...]:
    """Return the ``length`` consecutive blocks whose input and output differ least in angle.

    Ranges that overlap the first ``first`` or last ``last`` blocks are excluded; ties go to the
    lowest start (Gromov et al., arXiv 2403.17887). Raises `DataError` if distances are missing or
    NaN.
    """
    starts = range(first, scores.blocks - last - length + 1)
    distances = {s: scores.angular.get((s, length)) for s in starts}
    for start, value in distances.items():
        if value is None or math.isnan(value):
            raise DataError(
                f"{scores.source} has no angular distance for {length} blocks from block {start}"
                + (" on (it is NaN)." if value is not None else " on."),
                "Score the checkpoint with the metric angular, or choose another criterion.",
            )
    start = min(starts, key=lambda s: (distances[s], s))
    return tuple(range(start, start + length))


def _number(
    requested: dict[str, float | int],
    pick: Callable[[int], Removal | Sequence[int]],
    counts: Sequence[int],
    info: Sizes | None,
    first: int,
    last: int,
    *,
    searched: bool | str = False,
    what: str = "block",
) -> int:
    """Return the number of blocks closest to the request; raises `PlanError` if none can meet it.

    ``counts`` are the possible numbers in rising order; ``searched`` says that search limits them,
    or names its method; ``what`` is counted, a block or a part of one. A target up to half of one
    beyond the reachable range still counts as reachable.
    """
    (kind, value), *_ = requested.items()
    available = counts[-1] if counts else 0
    limit = f"The maximum is {available} with the first {first} and last {last} protected"
    way = (
        "lower --protect-first and --protect-last, or request less."
        if first or last
        else "at least one block must remain."
    )
    if isinstance(searched, str):
        limit = f"It has sets of {words.block_ranges(counts)} {what}s"
        way = "request one of these, or search again with other --counts."
    elif searched:  # the search ended after its rounds; protection has nothing to do with it
        limit = f"Greedy search removed only {available} blocks"
        way = "request fewer blocks, or re-run importance with more --rounds."
    if kind == "count":
        if isinstance(searched, str) and value not in counts:
            raise PlanError(
                f"The search has no set of {value} {what}s found by {searched}.",
                f"{limit}: {way}",
            )
        if value > available:
            raise PlanError(
                f"--count {value} exceeds the number of removable {what}s.", f"{limit}: {way}"
            )
        return int(value)
    if info is None:
        raise PlanError(
            f"--{kind} needs the checkpoint's parameter counts.",
            "Add --checkpoint, or use --count.",
        )
    target = value if kind == "params" else info.parameters * (1 - value)
    left = {0: info.parameters}
    left |= {k: parameters_after(info, pick(k)) for k in counts}
    if kind == "params" and target >= info.parameters:
        raise PlanError(
            f"--params {value:,} is not smaller than the model's {info.parameters:,} parameters.",
            "Give a smaller number.",
        )
    least = left[available]
    half = (left[[0, *counts][-2] if counts else 0] - least) / 2
    if available < 1 or target < least - half:
        removed = 1 - least / info.parameters
        raise PlanError(
            f"--{kind} {value} asks for more than can be removed.",
            f"{limit} (ratio {removed:.3f}, {least:,} parameters left): {way}",
        )
    return min(counts, key=lambda k: (abs(left[k] - target), k))
