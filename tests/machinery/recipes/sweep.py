"""Stands for the sweep in tests: ``--grid "NAME|OPTION=VALUE"`` is a ``resumable`` step."""

from __future__ import annotations

from slow_commands import ResumableSpec

from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.spec import RecipeSpec
from core.runs.spec import parse_value


def steps(spec: RecipeSpec) -> list[Step]:
    return [
        Step("first", "wait", {"steps": 1}),
        *(_element(text) for text in spec.grid),
        Step("last", "wait", {"steps": 1}),
    ]


def _element(text: str) -> Step:
    name, *pairs = text.split("|")
    given = dict(pair.split("=", 1) for pair in pairs)
    values = {key: parse_value(ResumableSpec, key, value) for key, value in given.items()}
    return Step(name, "resumable", values, optional=True, group="fan")


def verdict(chain: Chain) -> Verdict:
    names = [step.name for step in steps(chain.spec) if step.group]
    back = [name for name in names if name not in chain.failed]
    chain.write_csv("fan.csv", ("name",), [(name,) for name in back])
    return Verdict(f"{len(back)} of {len(names)} came back.")


RECIPE = Recipe("sweep", "Fan", "Independent steps.", steps, verdict)
