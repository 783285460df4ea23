"""Recipe ``stability``: three seeds and two learning rates; recovery as mean and spread."""

from __future__ import annotations

import math
import statistics
from typing import Any

from core.recipes import retraining
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.results import RetrainRow
from core.recipes.spec import RecipeSpec
from core.retrain.results import Summary
from core.runs import workspace

SEEDS = 3
FACTORS = (1.0, 1 / 3)
"""Learning rates, as multiples of the method's default."""
FIRST_SEED = 1234


def _runs(spec: RecipeSpec) -> list[tuple[str, float, int]]:
    """Return name, factor and seed of every run."""
    first = FIRST_SEED if spec.seed is None else spec.seed
    return [
        (f"rate{place + 1}-seed{seed}", factor, seed)
        for place, factor in enumerate(FACTORS)
        for seed in range(first, first + SEEDS)
    ]


def steps(spec: RecipeSpec) -> list[Step]:
    """Prune if necessary, then retrain once for every seed and learning rate."""
    return [*retraining.pruned_steps(spec), *(_training(*run) for run in _runs(spec))]


def _training(name: str, factor: float, seed: int) -> Step:
    def values(chain: Chain) -> dict[str, Any]:
        found = retraining.options(chain, "lora", seed=seed)
        return {**found, "lr": found["lr"] * factor, "eval_every": found["steps"]}

    return Step(name, "retrain", values, optional=True, group="trainings")


def table(chain: Chain) -> list[RetrainRow]:
    """Return one row per run, and per rate the mean with the sample standard deviation."""
    rows: list[RetrainRow] = []
    for factor in FACTORS:
        found: list[float] = []
        label, items = "", 0
        for name, other, seed in _runs(chain.spec):
            if other != factor or name in chain.failed:
                continue
            summary = chain.read(name, Summary)
            items = summary.heldout.tokens or 0
            label = f"learning rate {_rate(chain, name):.3g}"
            share = summary.recovered
            measure = "loss" if share is None else "recovered"
            value = summary.heldout_loss_after if share is None else share
            found.append(math.nan if value is None else value)
            rows.append(RetrainRow(label, f"seed {seed}", measure, value, items=items))
        if not found:
            continue
        mean = statistics.mean(found)
        spread = statistics.stdev(found) if len(found) > 1 else None
        rows.append(RetrainRow(label, "mean", rows[-1].measure, mean, spread, items))
    return rows


def _rate(chain: Chain, name: str) -> float:
    record = workspace.read_json(chain.dir(name) / ".run" / "spec.json") or {}
    return float(record["spec"]["lr"])


def verdict(chain: Chain) -> Verdict:
    """Report the mean and spread of the recovery at each learning rate."""
    rows = table(chain)
    if not rows:
        raise retraining.none_left(chain)
    RetrainRow.write(chain, rows)
    means = [row for row in rows if row.evaluated_on == "mean"]
    name = next(name for name, *_ in _runs(chain.spec) if name not in chain.failed)
    failed = f" ({len(chain.failed)} of {len(_runs(chain.spec))} failed)" if chain.failed else ""
    return Verdict(
        f"Recovered over {SEEDS} seeds{failed}, mean and sample standard deviation: "
        f"{'; '.join(map(_shown, means))}.",
        (retraining.measured(chain, name),),
        {row.variant: {"mean": row.value, "spread": row.spread} for row in means},
    )


def _shown(row: RetrainRow) -> str:
    form = ".1%" if row.measure == "recovered" else ".4f"
    spread = "" if row.spread is None else f" ± {row.spread:{form}}"
    what = "" if row.measure == "recovered" else "loss "
    return f"{row.variant}: {what}{row.value:{form}}{spread}"


RECIPE = Recipe(
    "stability",
    "Three seeds, two learning rates",
    "Retrains one variant six times: how much does recovery depend on seed and learning rate?",
    steps,
    verdict,
)
