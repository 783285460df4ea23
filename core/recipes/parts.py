"""Steps that several recipes share."""

from __future__ import annotations

from typing import Any

from core.benchmark import results as benchmark
from core.checkpoint import locate
from core.errors import RunError
from core.evaluate.results import TextRow
from core.prune.score_results import BlockRow, Importance
from core.recipes import texts
from core.recipes.chain import Chain, Step
from core.recipes.spec import RecipeSpec

SCORES = "scores"


def scored(spec: RecipeSpec, **options: Any) -> Step:
    """Return the step that scores every block, by all criteria unless ``options`` limit them.

    It calibrates on text that no `evaluated` step uses.
    """

    def values(chain: Chain) -> dict[str, Any]:
        usual = {"checkpoint": spec.checkpoint, "calibration": texts.apart(chain)[0]}
        return {**usual, **options}

    return Step(SCORES, "importance", values)


def cut(
    spec: RecipeSpec,
    name: str,
    criterion: str,
    *,
    plan: str = "",
    scores: str = SCORES,
    optional: bool = False,
    **amount: Any,
) -> list[Step]:
    """Return the steps that plan (``plan-NAME``) and write a pruned checkpoint (``NAME``).

    ``amount`` is count, ratio or params; ``plan`` and ``scores`` replace the names of those steps.
    """
    plan = plan or f"plan-{name}"
    return [
        Step(
            plan,
            "plan",
            lambda chain: {
                "scores": chain.dir(scores),
                "criterion": criterion,
                "checkpoint": spec.checkpoint,
                **amount,
            },
            optional,
        ),
        Step(
            name,
            "prune",
            lambda chain: {"checkpoint": spec.checkpoint, "plan": chain.file(plan, f"{plan}.json")},
            optional,
            needs=plan,
        ),
    ]


def folder_of(chain: Chain, name: str) -> str:
    """Return the checkpoint of ``name``: a step, or ``dense``."""
    return str(chain.spec.checkpoint if name == "dense" else chain.dir(name))


def evaluated(spec: RecipeSpec, name: str, *, optional: bool = False, **more: Any) -> Step:
    """Return the step ``evaluate-NAME``: perplexity of the dense model or of the step ``NAME``."""

    def options(chain: Chain) -> dict[str, Any]:
        return {
            "checkpoint": folder_of(chain, name),
            "perplexity": (texts.apart(chain)[1],),
            "window": (min(128, context(spec)),),
            **more,
        }

    return Step(f"evaluate-{name}", "evaluate", options, optional, needs=name)


def context(spec: RecipeSpec) -> int:
    """Return the context length of the recipe's checkpoint, in tokens."""
    return locate.open(spec.checkpoint, need="config").info.context or 128


def perplexity(chain: Chain, name: str) -> float:
    """Return the perplexity measured by the step ``evaluate-NAME``."""
    return measured_text(chain, name).ppl


def measured_text(chain: Chain, name: str) -> TextRow:
    """Return the first row of perplexity.csv of the step ``evaluate-NAME``."""
    rows = chain.table(f"evaluate-{name}", TextRow)
    if not rows:
        raise RunError(f"Step evaluate-{name} measured no perplexity.", "Run the recipe again.")
    return rows[0]


def latencies(chain: Chain, step: str) -> dict[str, dict[str, list[float]]]:
    """Return a benchmark's latencies in seconds at batch size 1: variant -> visit -> runs."""
    found: dict[str, dict[str, list[float]]] = {
        variant.name: {} for variant in chain.read(step, benchmark.Summary).variants
    }
    for row in chain.table(step, benchmark.TimedRun):
        if row.batch_size == 1:
            found[row.variant].setdefault(str(row.visit), []).append(row.latency_s)
    return found


def scores_of(chain: Chain, column: str, step: str = SCORES) -> list[float]:
    """Return one criterion's score of every block; raises `RunError` if one is missing."""
    found = [getattr(row, column) for row in chain.table(step, BlockRow)]
    if None in found:
        raise RunError(f"Step {step} has not scored every block by {column}.", "Run it again.")
    return found


def measured_on(found: Importance) -> str:
    """Return the sentence on what an importance run was measured on."""
    return (
        f"Measured on {found.device} in {found.dtype}, {found.samples} rows of "
        f"{found.length} tokens of {found.calibration}, seed {found.seed}."
    )
