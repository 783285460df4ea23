"""``recipe``: a named chain of runs with one verdict."""

from __future__ import annotations

from typing import Any

from core import recipes
from core.checkpoint import locate
from core.recipes import decision
from core.recipes.chain import Chain
from core.recipes.results import RecipeSummary, StepTime
from core.recipes.spec import RecipeSpec
from core.runs.run import Run

__all__ = ("RecipeSpec", "check", "run")


def check(spec: RecipeSpec) -> None:
    """Raise an error if the checkpoint is unusable, before any step starts."""
    locate.open(spec.checkpoint, need="config", need_tokenizer=False)
    if check := recipes.get(spec.name).check:
        check(spec)


def run(spec: RecipeSpec, run: Run) -> dict[str, Any]:
    """Carry out the unfinished steps, then write and return the verdict."""
    recipe = recipes.get(spec.name)
    chain = Chain(spec, run.dir, run.progress, recipe.expected)
    steps = recipe.steps(spec)
    chain.run(steps)
    found = recipe.verdict(chain)
    study = decision.of_study(spec.checkpoint, run.dir)
    then = study.sentence if study and study.sentence not in found.sentence else ""
    result = RecipeSummary(
        recipe=spec.name,
        title=recipe.title,
        checkpoint=spec.checkpoint,
        verdict=found.sentence,
        findings=found.findings,
        study=then,
        take=study.take.label if study and study.take else "",
        figures=dict(found.figures),
        failed=chain.failed,
        steps=tuple(StepTime(s.name, s.command, chain.seconds(s.name)) for s in steps),
    )
    result.write(run)
    for line in (result.verdict, *result.findings, result.study):
        if line:
            run.progress.log(line)
    return result.to_dict()
