"""``demo``: run the short recipes on the bundled checkpoint and report their verdicts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from core import recipes
from core.recipes.chain import Chain, Step
from core.recipes.results import DemoSummary, ShortVerdict
from core.recipes.spec import RecipeSpec
from core.runs.run import Run
from core.runs.spec import DeviceOptions, option

SHORT = ("importance", "drop-one", "restore")


@dataclass(frozen=True, kw_only=True)
class DemoSpec(DeviceOptions):
    """Score, drop, measure and restore on the bundled checkpoint, in about two minutes."""

    out: str = option(help="Folder of the demonstration; every step gets a subfolder.")


def steps(spec: RecipeSpec) -> list[Step]:
    """Return the steps of all short recipes without duplicates: they share the scores."""
    found: dict[str, Step] = {}
    for name in SHORT:
        for step in recipes.get(name).steps(spec):
            found.setdefault(step.name, step)
    return list(found.values())


def run(spec: DemoSpec, run: Run) -> dict[str, Any]:
    """Carry out the unfinished steps; write and return the verdicts."""
    began = time.perf_counter()
    inner = RecipeSpec(
        name=SHORT[0], checkpoint="demo", out=spec.out, device=spec.device, dtype=spec.dtype
    )
    chain = Chain(inner, run.dir, run.progress)
    chain.run(steps(inner))
    verdicts = []
    for name in SHORT:
        recipe = recipes.get(name)
        found = recipe.verdict(chain)
        run.progress.log(f"{recipe.title}: {found.sentence}")
        for line in found.findings:
            run.progress.log(f"  {line}")
        verdicts.append(
            ShortVerdict(name, recipe.title, found.sentence, found.findings, dict(found.figures))
        )
    result = DemoSummary(
        checkpoint="demo",
        verdicts=tuple(verdicts),
        seconds=round(time.perf_counter() - began, 1),
    )
    result.write(run)
    return result.to_dict()
