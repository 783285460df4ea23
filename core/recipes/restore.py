"""Recipe ``restore``: prune, retrain with LoRA, and report how much quality was recovered."""

from __future__ import annotations

from typing import Any

from core import words
from core.prune.results import Pruning
from core.recipes import parts, retraining, texts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.spec import RecipeSpec
from core.retrain.results import Summary
from core.retrain.shares import sentence, shares
from core.retrain.spec import suggested_loss
from core.words import block_ranges

NAME, RETRAINED = "light", "lora"
RATIO = 0.33
"""Share of all parameters: large enough for the demo to lose quality."""


def steps(spec: RecipeSpec) -> list[Step]:
    """Score, drop a third by perplexity, and train adapters on plain text."""
    return [
        parts.scored(spec, calibration=texts.data_of(spec)),
        *parts.cut(spec, NAME, "ppl", ratio=spec.ratio or RATIO),
        Step(RETRAINED, "retrain", training),
    ]


def training(chain: Chain) -> dict[str, Any]:
    """Return the options of the LoRA run, which learns the dense model's distributions."""
    return retraining.restoring(chain, NAME, loss=suggested_loss("lora", has_teacher=True))


def verdict(chain: Chain) -> Verdict:
    """Report how much of the loss gap and of the KL LoRA closed, and at what cost."""
    record, found = chain.read(NAME, Pruning), chain.read(RETRAINED, Summary)
    share = found.recovered
    recovery = (
        f"LoRA recovered {words.percent(share)} of the loss gap"
        if share is not None
        else "recovery is not reported, because the gap is below 0.05 nats"
    )
    if found.recovered_kl is not None:
        recovery += f", and closed {words.percent(found.recovered_kl)} of the KL to the dense model"
    adapted = [one for one in shares(found) if one.is_adaptation]
    dense, before, after = (
        found.heldout_loss_dense, found.heldout_loss_before, found.heldout_loss_after
    )  # fmt: skip
    return Verdict(
        f"Without blocks {block_ranges(record.dropped)} ({record.ratio:.1%} of all "
        f"parameters), after {found.steps} steps: {recovery}.",
        (
            f"Held-out loss in nats per token: {dense:.4f} dense, {before:.4f} pruned, "
            f"{after:.4f} retrained.",
            *([sentence(adapted)] if adapted else []),
            f"{found.trainable_parameters or 0:,} parameters trained; the merged checkpoint loads "
            "with stock transformers.",
            retraining.measured(chain, RETRAINED),
        ),
        {
            "recovered": share,
            "recovered_kl": found.recovered_kl,
            "dropped": list(record.dropped),
            "ratio": record.ratio,
        },
    )


RECIPE = Recipe(
    "restore",
    "Restore with LoRA",
    "Removes a third of the parameters, retrains with LoRA, and reports how much was recovered.",
    steps,
    verdict,
)
