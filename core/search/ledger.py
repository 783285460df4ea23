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

from core import outside
from core.errors import NotFiniteError, OptionError
from core.importance import passes as counting
from core.runs import workspace

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


class TimeUp(Exception):
    """The time limit was reached; what has been reported until then counts."""


class Tape:
    """Groups that were measured, one JSON line each, for a search that resumes."""

    def __init__(self, path: Path, settings: dict[str, Any], most: int, *, resume: bool) -> None:
        """Begin a tape, or read the one at ``path``.

        Raises `OptionError` if that was recorded with other settings: its numbers are not ours.
        """
        self.path = path
        self.groups: dict[tuple[Drop, ...], Group] = {}
        head = {"settings": json.loads(json.dumps(settings)), "most": most}
        lines = _lines(path) if resume else []
        if lines:
            before = lines[0]["settings"]
            others = [name for name in settings if before.get(name) != head["settings"][name]]
            if others:
                raise OptionError(
                    f"--resume: the search in {path.parent} measured with another "
                    f"{' and '.join(others)}.",
                    "Resume with the same options, or leave --resume out to begin again.",
                )
            head = lines[0]
        self.most: int = head["most"]
        """Sets in one pass, the same as before a kill, though free memory may differ."""
        for line in lines[1:]:
            sets = tuple(frozenset(drop) for drop in line["sets"])
            costs = tuple(Cost(*pair) for pair in line["costs"])
            self.groups[sets] = Group(sets, costs, line["passes"], line["seconds"])
        beside = path.with_name(f".{path.name}.new")
        try:
            beside.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines[1:]]))
            beside.replace(path)  # without a line that a kill has cut short
        except OSError as error:
            raise workspace.cannot_write(path, error) from error

    def add(self, group: Group) -> None:
        """Record a group."""
        line = {
            "sets": [sorted(drop) for drop in group.sets],
            "costs": [[cost.nll, cost.kl] for cost in group.costs],
            "passes": group.passes,
            "seconds": group.seconds,
        }
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        except OSError as error:
            raise workspace.cannot_write(self.path, error) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a tape, up to the first that is damaged."""
    found: list[dict[str, Any]] = []
    if not outside.is_file(path):
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not (_is_group(value) if found else _is_head(value)):
            break
        found.append(value)
    return found


def _is_head(line: Any) -> bool:
    most = line.get("most") if isinstance(line, dict) else None
    return type(most) is int and most > 1 and isinstance(line.get("settings"), dict)


def _is_group(line: Any) -> bool:
    try:
        sets, costs = [frozenset(map(int, drop)) for drop in line["sets"]], line["costs"]
        pairs = all(len(c) == 2 and all(isinstance(v, float | int) for v in c) for c in costs)
        numbers = isinstance(line["passes"], int) and isinstance(line["seconds"], float | int)
        return pairs and numbers and len(sets) == len(costs)
    except (KeyError, TypeError, ValueError):
        return False


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
    seconds: float = 0.0

    @property
    def plain_passes(self) -> int:
        """Block passes if every measured set, and the dense model, were run by itself."""
        return counting.alone(self.blocks, self.costs)

    def values(self, sets: Sequence[Drop]) -> list[float]:
        """Return the objective of every set; those not known yet are measured.

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
        self.seconds += group.seconds
        if not math.isfinite(self.costs[NONE].nll):
            raise NotFiniteError(
                f"The model's loss on the calibration text is {self.costs[NONE].nll}.",
                "Try --dtype float32.",
            )

    def cheapest(self, count: int, allowed: Iterable[int]) -> Drop | None:
        """Return the cheapest measured set of ``count`` of the ``allowed`` blocks."""
        every = frozenset(allowed)
        sets = [s for s in self.costs if len(s) == count and s <= every]
        key = lambda s: (self.costs[s].by(self.objective), sorted(s))  # noqa: E731
        return min(sets, key=key, default=None)
