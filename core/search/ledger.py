"""What sets of blocks cost: each is measured once, and every pass is counted.

Methods ask the ledger for costs; it knows nothing of models, so that the same methods serve a
search and its dry run. What has been measured goes onto a tape, group by group. After a kill the
methods run again from the beginning and take the numbers from the tape until it ends: a resumed
search repeats every decision, and ends as it would have ended uninterrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import NotFiniteError, OptionError
from core.importance import passes as counting
from core.runs import tape

Drop = frozenset[int]
NONE: Drop = frozenset()


@dataclass(frozen=True)
class Cost:
    """What a set costs on the calibration rows: means over all predictions, in nats."""

    nll: float
    kl: float

    def by(self, objective: str) -> float:
        """Return ``kl`` or ``nll``; NaN counts as infinite, so that it is never chosen."""
        value = self.kl if objective == "kl" else self.nll
        return math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Group:
    """What one pass over the weights measured."""

    sets: tuple[Drop, ...]
    costs: tuple[Cost, ...]
    passes: int
    seconds: float


Measure = Callable[[Sequence[Drop]], Group]
"""Measures distinct sets in one pass; the first pass of a search has the empty set among them."""


@dataclass(frozen=True)
class Healed:
    """What a set costs after its seams were healed, on the rows that were held out from the fit."""

    cost: Cost
    before: Cost
    """The same, on the same rows, without healing."""
    passes: int
    seconds: float


Heal = Callable[[Drop], Healed]
"""Heals one set and measures it."""
BEHIND = 1e9
"""Added to the cost of sets that were not healed, so that they rank behind all that were."""


class TimeUp(Exception):
    """The time limit was reached; what has been reported until then counts."""


class Tape:
    """Groups that were measured, one JSON line each, for a run that resumes."""

    def __init__(self, path: Path, settings: dict[str, Any], most: int, *, resume: bool) -> None:
        """Begin a tape, or read the one at ``path``.

        Raises `OptionError` if that was recorded with other settings: its numbers are not ours.
        """
        self.path = path
        self.groups: dict[tuple[Drop, ...], Group] = {}
        self.healed: dict[Drop, Healed] = {}
        head = {"settings": json.loads(json.dumps(settings)), "most": most}
        lines = tape.read(path, _is_head, _is_group) if resume else []
        if lines:
            before = lines[0]["settings"]
            now = head["settings"]
            others = [n for n in {**now, **before} if before.get(n) != now.get(n)]
            if others:
                raise OptionError(
                    f"--resume: the run in {path.parent} measured with another "
                    f"{' and '.join(others)}.",
                    "Resume with the same options, or leave --resume out to begin again.",
                )
            head = lines[0]
        self.most: int = head["most"]
        """Sets in one pass, the same as before a kill, though free memory may differ."""
        for line in lines[1:]:
            if "healed" in line:
                found = (Cost(*line["cost"]), Cost(*line["before"]))
                healed = Healed(*found, line["passes"], line["seconds"])
                self.healed[frozenset(line["healed"])] = healed
                continue
            sets = tuple(frozenset(drop) for drop in line["sets"])
            costs = tuple(Cost(*pair) for pair in line["costs"])
            self.groups[sets] = Group(sets, costs, line["passes"], line["seconds"])
        tape.begin(path, [head, *lines[1:]])  # without a line that a kill has cut short

    def add(self, group: Group) -> None:
        """Record a group."""
        tape.append(
            self.path,
            {
                "sets": [sorted(drop) for drop in group.sets],
                "costs": [[cost.nll, cost.kl] for cost in group.costs],
                "passes": group.passes,
                "seconds": group.seconds,
            },
        )

    def add_healed(self, drop: Drop, healed: Healed) -> None:
        """Record a set that was healed."""
        tape.append(
            self.path,
            {
                "healed": sorted(drop),
                "cost": [healed.cost.nll, healed.cost.kl],
                "before": [healed.before.nll, healed.before.kl],
                "passes": healed.passes,
                "seconds": healed.seconds,
            },
        )


class Copied(Tape):
    """What another process of this run has on its tape; nothing is recorded here."""

    def __init__(self, groups: dict[tuple[Drop, ...], Group], most: int) -> None:
        """Take the groups that were measured before, and the sets in one pass."""
        self.groups, self.most, self.healed = groups, most, {}

    def add(self, group: Group) -> None:
        """Leave it to the first process."""


def _is_head(line: Any) -> bool:
    most = line.get("most") if isinstance(line, dict) else None
    return type(most) is int and most > 1 and isinstance(line.get("settings"), dict)


def _is_group(line: Any) -> bool:
    try:
        if "healed" in line:
            both = [line["cost"], line["before"]]
            return bool([*map(int, line["healed"])]) and _are_costs(both) and _has_numbers(line)
        sets, costs = [frozenset(map(int, drop)) for drop in line["sets"]], line["costs"]
        return _are_costs(costs) and _has_numbers(line) and len(sets) == len(costs)
    except (KeyError, TypeError, ValueError):
        return False


def _are_costs(costs: Any) -> bool:
    return all(len(c) == 2 and all(isinstance(v, float | int) for v in c) for c in costs)


def _has_numbers(line: Any) -> bool:
    return isinstance(line["passes"], int) and isinstance(line["seconds"], float | int)


@dataclass
class Ledger:
    """Costs of sets by objective, and what they took to measure."""

    measure: Measure
    objective: str
    blocks: int
    most: int
    """Hidden states that memory holds, one of them the dense model's. At least 2."""
    limit_s: float | None = None
    tape: Tape | None = None
    costs: dict[Drop, Cost] = field(default_factory=dict)
    passes: int = 0
    groups: int = 0
    """Groups of sets that were measured, each in one pass over the weights."""
    seconds: float = 0.0
    heal: Heal | None = None
    """Heals a set; None if sets are compared as they are."""
    heal_best: int = 1
    """Of the sets that are compared, this many with the least plain cost are healed."""
    healed: dict[Drop, Healed] = field(default_factory=dict)

    @property
    def plain_passes(self) -> int:
        """Block passes if every measured set, and the dense model, were run by itself."""
        return counting.alone(self.blocks, self.costs)

    def values(self, sets: Sequence[Drop]) -> list[float]:
        """Return what is minimised, for sets that a method compares with each other.

        That is the objective; if sets are healed, the objective after healing for those that were,
        and for the others their plain cost plus `BEHIND`. As healing takes far longer than
        measuring, only the best few by plain cost are healed.
        """
        plain = self.plain(sets)
        if self.heal is None:
            return plain
        cheap = sorted({s: v for s, v in zip(sets, plain, strict=True) if s}.items(), key=_by_cost)
        for drop, _ in cheap[: self.heal_best]:
            if drop not in self.healed:
                self._heal(drop)
        return [self._rank(s, v) for s, v in zip(sets, plain, strict=True)]

    def _rank(self, drop: Drop, plain: float) -> float:
        if self.heal is None or not drop:
            return plain
        healed = self.healed.get(drop)
        return healed.cost.by(self.objective) if healed else BEHIND + plain

    def cost_of(self, drop: Drop) -> Cost:
        """Return what a set that was measured costs, after healing if it was healed."""
        healed = self.healed.get(drop)
        return healed.cost if healed else self.costs[drop]

    def plain(self, sets: Sequence[Drop]) -> list[float]:
        """Return the objective of every set as it is; those not known yet are measured.

        Raises `TimeUp` at the limit, before it measures more.
        """
        fresh = [s for s in dict.fromkeys(sets) if s and s not in self.costs]
        for some in counting.grouped(fresh, max(1, self.most - 1)):
            if self.limit_s is not None and self.seconds >= self.limit_s:
                raise TimeUp
            self._take(tuple(some) if NONE in self.costs else (NONE, *some))
        return [self.costs[s].by(self.objective) if s else self.dense for s in sets]

    @property
    def dense(self) -> float:
        """The objective of the whole model."""
        return self.costs[NONE].by(self.objective)

    def _take(self, sets: tuple[Drop, ...]) -> None:
        group = self.tape.groups.get(sets) if self.tape else None
        if group is None:
            group = self.measure(sets)
            if self.tape:
                self.tape.add(group)
        self.costs.update(zip(group.sets, group.costs, strict=True))
        self.passes += group.passes
        self.groups += 1
        self.seconds += group.seconds
        if not math.isfinite(self.costs[NONE].nll):
            raise NotFiniteError(
                f"The model's loss on the calibration text is {self.costs[NONE].nll}.",
                "Try --dtype float32.",
            )

    def _heal(self, drop: Drop) -> None:
        if self.limit_s is not None and self.seconds >= self.limit_s:
            raise TimeUp
        assert self.heal is not None
        healed = self.tape.healed.get(drop) if self.tape else None
        if healed is None:
            healed = self.heal(drop)
            if self.tape:
                self.tape.add_healed(drop, healed)
        self.healed[drop] = healed
        self.passes += healed.passes
        self.seconds += healed.seconds

    def cheapest(self, count: int, allowed: Iterable[int]) -> Drop | None:
        """Return the cheapest measured set of ``count`` of the ``allowed`` blocks."""
        every = frozenset(allowed)
        sets = [s for s in self.costs if len(s) == count and s <= every]
        key = lambda s: (self._rank(s, self.costs[s].by(self.objective)), sorted(s))  # noqa: E731
        return min(sets, key=key, default=None)


def _by_cost(pair: tuple[Drop, float]) -> tuple[float, list[int]]:
    return pair[1], sorted(pair[0])
