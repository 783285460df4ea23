"""How long a recipe took in this workspace, for what it will take on another model; no torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from core.checkpoint import locate
from core.errors import DepthcutError
from core.recipes.results import RecipeSummary
from core.recipes.spec import RecipeSpec
from core.runs import devices, pace
from core.runs.spec import to_dict
from core.runs.workspace import RunRecord

LIKE = 4.0
"""Models whose sizes differ by less than this factor take times in proportion, roughly: those of
smaller ones are mostly spent on starting processes."""
LOOKED_AT = 50
"""Runs of a recipe that are looked at, from the newest."""
HARMLESS = ("name", "checkpoint", "out", "seed", "device")
"""Options that do not change what a recipe does."""


@dataclass(frozen=True)
class Earlier:
    """A finished run of a recipe."""

    record: RunRecord
    seconds: float
    """Of all its steps together."""
    scaled: float | None
    """The same in proportion to the parameters; None if the models' sizes differ too much."""
    is_same_size: bool
    is_same_work: bool
    """Whether all options were the same."""
    is_whole: bool
    """Whether no step failed."""


def nearest(spec: RecipeSpec, parameters: int) -> Earlier | None:
    """Return the run of this recipe on this kind of device whose model is nearest in size.

    Of several, the newest. None if there is no finished run on this machine.
    """
    asked, sizes = to_dict(spec), dict[str, int]()
    found: list[tuple[float, Earlier]] = []
    runs = (r for r in pace.finished("recipe") if r.spec.get("name") == spec.name)
    for record in itertools.islice(runs, LOOKED_AT):
        used, name = str(record.spec.get("device", "auto")), str(record.spec.get("checkpoint"))
        summary = RecipeSummary.read(record.path)
        if not summary or not pace.is_on(devices.meant(used), spec.device):
            continue
        if name not in sizes:
            sizes[name] = _parameters(name)
        seconds = sum(step.seconds for step in summary.steps)
        if not (sizes[name] and seconds):
            continue
        ratio = parameters / sizes[name]
        apart = abs(math.log(ratio))
        same = _same_work(record.spec, asked)
        scaled = seconds * ratio if apart <= math.log(LIKE) else None
        one = Earlier(record, seconds, scaled, apart < pace.NEAR, same, not summary.failed)
        found.append((sizes[name], one))
    return next(iter(pace.of_like_size(found, parameters)), None)


def _same_work(used: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether two runs have the same options; a page names the text that is used by default."""
    compared = [key for key in asked if key in used and key not in HARMLESS]
    if not (used.get("data") and asked["data"]):
        compared = [key for key in compared if key != "data"]
    return all(used[key] == asked[key] for key in compared)


def _parameters(checkpoint: str) -> int:
    """Return the parameters of a checkpoint; 0 if it is not there any more."""
    try:
        return locate.open(checkpoint, need="config", need_tokenizer=False).info.parameters
    except DepthcutError:
        return 0
