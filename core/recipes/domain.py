"""Recipe ``domain``: retrain on A, evaluate on A and B; and vice versa.

``--data A,B`` names the two sources; the default is the demo world's stories and instructions.
"""

from __future__ import annotations

from typing import Any

from core.recipes import retraining, texts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.results import RetrainRow
from core.recipes.spec import RecipeSpec

DEMO = (texts.STORIES, texts.INSTRUCTIONS)
NAMES = ("a", "b")


def sources(spec: RecipeSpec) -> tuple[str, str]:
    """Return the two sources; raises `OptionError` unless there are two."""
    return texts.two_sources(spec, "source", "A.jsonl,B.jsonl") or DEMO


def steps(spec: RecipeSpec) -> list[Step]:
    """Prune if necessary, then retrain on each source."""
    sources(spec)
    return [*retraining.pruned_steps(spec), _training(0), _training(1)]


def _training(place: int) -> Step:
    def values(chain: Chain) -> dict[str, Any]:
        both = sources(chain.spec)
        files = [texts.split(chain, source, name) for source, name in zip(both, NAMES, strict=True)]
        train, held = files[place]
        return retraining.options(
            chain,
            "lora",
            data=train,
            holdout_data=held,
            also=(files[1 - place][1],),
            template="plain" if both == DEMO else "auto",
        )

    return Step(f"on-{NAMES[place]}", "retrain", values, group="trainings")


def table(chain: Chain) -> list[RetrainRow]:
    """Return loss and recovery of each retraining on each source."""
    both = sources(chain.spec)
    rows: list[RetrainRow] = []
    for place, name in enumerate(NAMES):
        for row in retraining.evaluation_rows(chain, f"on-{name}"):
            if row.measure != "loss":
                continue
            source = both[place] if row.source == "held out" else both[1 - place]
            trained = f"trained on {both[place]}"
            share = retraining.recovered(row.dense, row.before, row.after)
            items = row.items
            rows.append(RetrainRow(trained, source, "loss", row.after, items=items))
            rows.append(RetrainRow(trained, source, "recovered", share, items=items))
            if place == 0:
                for label, value in (("dense", row.dense), ("pruned", row.before)):
                    rows.append(RetrainRow(label, source, "loss", value, items=items))
    return rows


def verdict(chain: Chain) -> Verdict:
    """Report how much of the gap on B training on A recovered, and the reverse."""
    rows = table(chain)
    RetrainRow.write(chain, rows)
    found = {
        (row.variant, row.evaluated_on): row.value for row in rows if row.measure == "recovered"
    }
    lines = [
        f"{trained.capitalize()}, evaluated on {source}: {retraining.percent(share)} recovered."
        for (trained, source), share in found.items()
    ]
    first, second = sources(chain.spec)
    own = found[f"trained on {first}", first]
    other = found[f"trained on {first}", second]
    return Verdict(
        f"Retraining on {first} recovered {retraining.percent(own)} on its own rows and "
        f"{retraining.percent(other)} on {second}.",
        (*lines, retraining.measured(chain, "on-a"), retraining.measured(chain, "on-b")),
        {f"{trained} | {source}": share for (trained, source), share in found.items()},
    )


RECIPE = Recipe(
    "domain",
    "Trained on one dataset, evaluated on two",
    "Retrains one variant on A and on B and evaluates both on A and B: does recovery transfer?",
    steps,
    verdict,
)
