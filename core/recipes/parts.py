"""Steps that several recipes are made of."""

from __future__ import annotations

from typing import Any

from core import checkpoint
from core.recipes.chain import Chain, Step

SCORES = "scores"


def scored(spec: Any) -> Step:
    """Return the step that scores every block by all criteria."""
    options = {"checkpoint": spec.checkpoint, "calibration": text_of(spec)}
    return Step(SCORES, "importance", options)


def text_of(spec: Any) -> str:
    """Return the text that a recipe calibrates and judges on."""
    return str(spec.data or "demo")


def cut(spec: Any, name: str, criterion: str, **amount: Any) -> list[Step]:
    """Return the steps that plan (``plan-NAME``) and write a pruned checkpoint (``NAME``).

    ``amount`` is one of count, ratio and params.
    """
    plan = f"plan-{name}"
    return [
        Step(
            plan,
            "plan",
            lambda chain: {
                "scores": chain.dir(SCORES),
                "criterion": criterion,
                "checkpoint": spec.checkpoint,
                **amount,
            },
        ),
        Step(
            name,
            "prune",
            lambda chain: {"checkpoint": spec.checkpoint, "plan": chain.file(plan, f"{plan}.json")},
        ),
    ]


def judged(spec: Any, name: str, checkpoint_of: str = "", **more: Any) -> Step:
    """Return the step ``judge-NAME``: perplexity of the dense model, or of the step ``NAME``."""

    def options(chain: Chain) -> dict[str, Any]:
        folder = chain.dir(checkpoint_of or name) if name != "dense" else spec.checkpoint
        window = min(128, context(spec))
        return {
            "checkpoint": folder,
            "perplexity": (text_of(spec),),
            "window": (window,),
            **more,
        }

    return Step(f"judge-{name}", "evaluate", options)


def context(spec: Any) -> int:
    """Return the tokens of context of the recipe's checkpoint."""
    found = checkpoint.inspect(checkpoint.resolve(spec.checkpoint, allow_config_only=True))
    return found.context or 128


def perplexity(chain: Chain, name: str) -> float:
    """Return what the step ``judge-NAME`` measured."""
    return float(chain.rows(f"judge-{name}", "perplexity.csv")[0]["ppl"])


def measured_on(found: dict[str, Any]) -> str:
    """Return the sentence that says what an importance run was measured on."""
    return (
        f"Measured on {found['device']} in {found['dtype']}, {found['samples']} rows of "
        f"{found['length']} tokens of {found['calibration']}, seed {found['seed']}."
    )
