"""Recipe ``sweep``: retrain one variant with every combination of some options.

The options are given as ``--grid lr=1e-3,3e-3 --grid loss=ce,kl``; any option of retrain can be
named. Each combination is a step, so a sweep that was stopped resumes; at a cluster they are one
job array. ``sweep.csv`` has a row for each combination that did not fail; ``--within`` limits the
time that a training may take to be called the best. No torch here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from core import words
from core.errors import OptionError
from core.recipes import retraining
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.spec import RecipeSpec
from core.retrain.results import Summary
from core.retrain.spec import RetrainSpec, settings_of
from core.runs.spec import build, flag_of, hints_of, kind_of, parse_value

TABLE = "sweep.csv"
MEASURES = ("recovered", "recovered_kl", "heldout_loss", "seconds", "tokens", "peak_memory_mib")
"""Columns after those of the options."""
USUAL = ("lr=1e-3,3e-3", "loss=ce,kl")
MOST = 64
"""Combinations of a sweep."""
FIXED = ("checkpoint", "out", "resume", "dry_run", "merge", "lr_range_test", "dense")


def grid_of(spec: RecipeSpec) -> dict[str, list[Any]]:
    """Return the values of each option, as retrain's own types.

    Raises `OptionError` for an option that retrain does not have, or a value that it refuses.
    """
    single = {name for name, kind in hints_of(RetrainSpec).items() if not kind_of(kind)[1]}
    known = {f.name: f for f in dataclasses.fields(RetrainSpec) if f.name in single - {*FIXED}}
    found: dict[str, list[Any]] = {}
    for given in spec.grid or USUAL:
        name, sign, values = given.partition("=")
        field = known.get(name.strip().replace("-", "_"))
        parts = [part.strip() for part in values.split(",") if part.strip()]
        if field is None or not sign or not parts:
            raise OptionError(
                f"--grid: '{given}' is not an option of retrain with its values.",
                "Write for example --grid lr=1e-3,3e-3.",
            )
        found[field.name] = list(
            dict.fromkeys(parse_value(RetrainSpec, field.name, p) for p in parts)
        )
    return found


def combinations(spec: RecipeSpec) -> list[dict[str, Any]]:
    """Return the options of each training."""
    grid = grid_of(spec)
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def check(spec: RecipeSpec) -> None:
    """Raise `OptionError` for a grid that cannot be trained."""
    found = combinations(spec)
    if len(found) > MOST:
        raise OptionError(
            f"--grid has {len(found)} combinations; the maximum is {MOST}.", "Give fewer values."
        )
    for values in found:
        made = build(RetrainSpec, {"checkpoint": "x", "data": "x", "out": "x", **values})
        settings_of(made, 1)


def _name(values: Mapping[str, Any]) -> str:
    """Return the step's name, which is also its folder."""
    return "-".join(f"{flag_of(name)[2:]}-{_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in shown)[:40]


def steps(spec: RecipeSpec) -> list[Step]:
    """Prune if necessary, then retrain once for each combination."""
    return [*retraining.pruned_steps(spec), *(_training(one) for one in combinations(spec))]


def _training(given: dict[str, Any]) -> Step:
    def values(chain: Chain) -> dict[str, Any]:
        method = str(given.get("method", "lora"))
        usual = retraining.options(chain, method)
        usual.pop("lr")  # the default of the method and the size
        if given.get("epochs") is not None:
            usual.pop("steps")
        return {**usual, "eval_every": None, **given}

    return Step(_name(given), "retrain", values, optional=True, group="trainings")


def verdict(chain: Chain) -> Verdict:
    """Write the table, and report the best combination."""
    grid, rows, held = grid_of(chain.spec), [], {}
    for values in combinations(chain.spec):
        if _name(values) in chain.failed:
            continue
        found = chain.read(_name(values), Summary)
        held[_name(values)] = found
        measured = (
            found.recovered, found.recovered_kl, found.heldout_loss_after, found.training_s,
            found.tokens, found.peak_memory_mib,
        )  # fmt: skip
        rows.append((*values.values(), *measured))
    if not rows:
        raise retraining.none_left(chain)
    chain.write_csv(TABLE, (*grid, *MEASURES), rows)
    limit = chain.spec.within
    known = {
        name: share
        for name, one in held.items()
        if (share := one.recovered_kl if one.recovered_kl is not None else one.recovered)
        is not None
        and (limit is None or (one.training_s or 0.0) <= limit)
    }
    within = "" if limit is None else f" within {limit:g} s of training"
    within += f" ({len(chain.failed)} failed)" if chain.failed else ""
    if not known:
        return Verdict(f"None of {len(rows)} trainings reports a recovery{within}.")
    best = max(known, key=known.__getitem__)
    by = "KL" if held[best].recovered_kl is not None else "loss"
    return Verdict(
        f"Best of {len(rows)} trainings{within}: {best}, which recovered "
        f"{words.percent(known[best])} by {by}.",
        (retraining.measured(chain, best),),
        known,
    )


RECIPE = Recipe(
    "sweep",
    "A grid of settings",
    "Retrains one variant with every combination of some options: one table, and the best within a "
    "time budget.",
    steps,
    verdict,
    check,
)
