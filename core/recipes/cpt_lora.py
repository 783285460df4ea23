"""Recipe ``cpt-lora``: continued pretraining, then LoRA; compared with LoRA for as many steps.

The strongest retraining of Shortened LLaMA (arXiv 2402.02834, version 2) at severe pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from core.recipes import retraining
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.results import RetrainRow
from core.recipes.spec import RecipeSpec
from core.retrain.results import Summary

LABELS = {"lora": "LoRA alone", "continued": "continued", "continued-lora": "continued, then LoRA"}


def steps(spec: RecipeSpec) -> list[Step]:
    """Prune if necessary; then half continued pretraining and half LoRA, and LoRA alone."""
    return [
        *retraining.pruned_steps(spec),
        _training("continued", lambda chain: _options(chain, "continued", half=True)),
        _training("lora", lambda chain: _options(chain, "lora", half=False)),
        Step(
            "continued-lora",
            "retrain",
            lambda chain: _options(
                chain, "lora", half=True, checkpoint=chain.dir("continued"), merge=True
            ),
        ),
    ]


def _training(name: str, values: Callable[[Chain], Mapping[str, Any]]) -> Step:
    return Step(name, "retrain", values, group="trainings")


def _options(chain: Chain, method: str, *, half: bool, **more: Any) -> dict[str, Any]:
    found = retraining.options(chain, method, **more)
    if half:
        found["steps"] = max(1, found["steps"] // 2)
    return found


def table(chain: Chain) -> list[RetrainRow]:
    """Return loss and recovery of every method, relative to the same pruned and dense models."""
    start = chain.read("continued", Summary)
    dense, before = start.heldout_loss_dense, start.heldout_loss_before

    def row(name: str, measure: str, value: float | None) -> RetrainRow:
        return RetrainRow(name, "held out", measure, value, items=start.heldout.tokens)

    rows = [row("dense", "loss", dense), row("pruned", "loss", before)]
    for step, label in LABELS.items():
        after = chain.read(step, Summary).heldout_loss_after
        share = retraining.recovered(dense, before, after)
        rows += [row(label, "loss", after), row(label, "recovered", share)]
    return rows


def verdict(chain: Chain) -> Verdict:
    """Report what each method recovered."""
    rows = table(chain)
    RetrainRow.write(chain, rows)
    found = {r.variant: r.value for r in rows if r.measure == "recovered"}
    tokens = {label: chain.read(step, Summary).tokens or 0 for step, label in LABELS.items()}
    both = tokens["continued"] + tokens["continued, then LoRA"]
    shown = "; ".join(f"{name}: {retraining.percent(share)}" for name, share in found.items())
    return Verdict(
        f"Recovered: {shown}.",
        (
            f"Tokens: LoRA alone {tokens['LoRA alone']:,}, the two phases together {both:,}.",
            retraining.measured(chain, "lora"),
        ),
        found,
    )


RECIPE = Recipe(
    "cpt-lora",
    "Continued pretraining, then LoRA",
    "Trains all weights and then adapters, compared with adapters alone for as many steps.",
    steps,
    verdict,
)
