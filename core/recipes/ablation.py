"""Recipe ``ablation``: LoRA against full fine-tuning of one variant, on the same tokens.

Measures recovery, loss on other text, the KL of next-token distributions to the dense model, and on
the demo its questions: what each method restores, and what it forgets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.recipes import retraining, texts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.results import RetrainRow
from core.recipes.spec import RecipeSpec
from core.retrain.results import Summary

METHODS = ("lora", "full")
OTHER = "demo instructions"
"""The demo's second evaluation text; training uses its stories."""
QUESTIONS = 20
"""Questions per skill if the demo world's questions are used."""


def steps(spec: RecipeSpec) -> list[Step]:
    """Prune if necessary, then retrain the variant twice on the same rows in the same order."""
    return [*retraining.pruned_steps(spec), *(_training(method) for method in METHODS)]


def sources(spec: RecipeSpec) -> tuple[str, tuple[str, ...]]:
    """Return the text to train on and the other texts: ``--data DATA[,OTHER]``."""
    data, *other = (part.strip() for part in texts.data_of(spec).split(","))
    return data, tuple(filter(None, other))


def _training(method: str) -> Step:
    def values(chain: Chain) -> dict[str, Any]:
        data, other = sources(chain.spec)
        demo: dict[str, Any] = {}
        if data == "demo":
            demo = {"questions": QUESTIONS, "template": "plain"}
            other = other or (texts.split(chain, texts.INSTRUCTIONS, texts.INSTRUCTIONS)[1],)
        return retraining.options(
            chain, method, data=data, also=other, layout="grouped", retention=True, **demo
        )

    return Step(method, "retrain", values, group="trainings")


def table(chain: Chain) -> list[RetrainRow]:
    """Return one row per variant (dense, pruned, each method), source and measure."""
    rows: list[RetrainRow] = []
    columns = {"dense": "dense", "before": "pruned"}
    for method in METHODS:
        found = chain.read(method, Summary)
        tokens = found.heldout.tokens
        rows.append(RetrainRow(method, "held out", "recovered", found.recovered, items=tokens))
        names = columns | {"after": method}
        columns = {}  # dense and pruned are the same for both methods
        for row in retraining.evaluation_rows(chain, method):
            ours = Path(row.source).parent == chain.folder / "data"
            source = OTHER if ours else row.source
            for column, name in names.items():
                if (value := getattr(row, column)) is not None:
                    rows.append(RetrainRow(name, source, row.measure, value, items=row.items))
    return rows


def verdict(chain: Chain) -> Verdict:
    """Report which method recovered more, and what each kept of the dense model."""
    rows = table(chain)
    RetrainRow.write(chain, rows)
    lora, full = (chain.read(method, Summary) for method in METHODS)
    lines = [
        f"LoRA trains {lora.trainable_parameters or 0:,} parameters ({lora.tokens_per_s or 0:.0f} "
        f"tokens/s), full fine-tuning {full.trainable_parameters or 0:,} "
        f"({full.tokens_per_s or 0:.0f} tokens/s), both on {lora.tokens or 0:,} tokens."
    ]
    for source in dict.fromkeys(row.evaluated_on for row in rows if row.measure == "kl"):
        found = {r.variant: r.value for r in rows
                 if r.evaluated_on == source and r.measure == "kl"}  # fmt: skip
        parts = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        lines.append(f"KL to the dense model on {source}, nats per token: {parts}.")
    asked = [row for row in rows if row.measure == "accuracy"]
    if asked:
        means = {
            name: [r.value or 0.0 for r in asked if r.variant == name]
            for name in dict.fromkeys(r.variant for r in asked)
        }
        parts = ", ".join(f"{n} {sum(v) / len(v):.1%}" for n, v in means.items())
        lines.append(
            f"Mean accuracy over the demo's skills ({asked[0].items} questions each): {parts}."
        )
    lines.append(retraining.measured(chain, "lora"))
    return Verdict(
        f"Recovered: LoRA {retraining.percent(lora.recovered)}, full fine-tuning "
        f"{retraining.percent(full.recovered)} of a {lora.gap_nat or 0:.3f}-nat gap.",
        tuple(lines),
        {method: one.recovered for method, one in zip(METHODS, (lora, full), strict=True)},
    )


RECIPE = Recipe(
    "ablation",
    "LoRA against full fine-tuning",
    "Retrains one variant both ways on the same tokens; compares recovery, other text and retained "
    "knowledge.",
    steps,
    verdict,
)
