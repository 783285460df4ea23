"""Recipe ``restore``: prune lightly, retrain with LoRA, and say how much came back."""

from __future__ import annotations

from typing import Any

from core.prune.results import Pruning
from core.recipes import parts, retraining
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.spec import RecipeSpec

NAME, RETRAINED = "light", "lora"
RATIO = 0.33
"""Of all parameters: enough that the demo misses something."""


def steps(spec: RecipeSpec) -> list[Step]:
    """Score, drop a third by perplexity, and train adapters on plain text."""
    return [
        parts.scored(spec, calibration=spec.data or "demo"),
        *parts.cut(spec, NAME, "ppl", ratio=spec.ratio or RATIO),
        Step(RETRAINED, "retrain", training),
    ]


def training(chain: Chain) -> dict[str, Any]:
    """Return the options of the LoRA run."""
    return retraining.restoring(chain, NAME)


def verdict(chain: Chain) -> Verdict:
    """Say how much of the loss gap LoRA closed, and at what price."""
    record, found = chain.read(NAME, Pruning), chain.json(RETRAINED)
    share = found["recovered"]
    came = (
        f"LoRA brought back {share:.0%} of the lost quality"
        if share is not None
        else "the gap is under 0.05 nat, so no recovered share is stated"
    )
    losses = [found[f"heldout_loss_{name}"] for name in ("dense", "before", "after")]
    return Verdict(
        f"Without blocks {', '.join(map(str, record.dropped))} ({record.ratio:.1%} of all "
        f"parameters): {came}, in {found['steps']} steps.",
        (
            "Held-out loss in nat per token: {:.4f} dense, {:.4f} pruned, {:.4f} retrained.".format(
                *losses
            ),
            f"{found['trainable_parameters']:,} parameters trained; the merged checkpoint loads in "
            "stock transformers.",
            retraining.measured(chain, RETRAINED),
        ),
        {"recovered": share, "dropped": list(record.dropped), "ratio": record.ratio},
    )


RECIPE = Recipe(
    "restore",
    "Restore with LoRA",
    "Drops a third of the blocks, retrains with LoRA, and says how much came back.",
    steps,
    verdict,
)
