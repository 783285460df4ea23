"""How much of the loss from pruning was recovered, from held-out losses on identical rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from core.prune.results import perplexity

SMALLEST_GAP = 0.05
"""Below this gap in nats the recovered share is mostly noise, so it is not reported."""

SMALLEST_KL = 0.02
"""Below this divergence of the pruned model in nats, the share of it that is closed is noise."""

BEYOND = 1.05
"""Above this recovered share, training added knowledge that the dense model did not have."""


ADAPTATION = 0.15
"""A gain is called adaptation if so much more of the loss than of the divergence came back."""


def is_adaptation(by_loss: float, by_kl: float) -> bool:
    """Whether there is a gain in loss, and the divergence shows far less of it."""
    return by_loss > 0 and by_loss - by_kl >= ADAPTATION


@dataclass(frozen=True)
class Held:
    """A model on the held-out rows, in nats per token."""

    loss: float
    kl: float | None = None
    """KL(dense || model) over the dense model's likeliest tokens and all others as one; None
    without a dense model."""


@dataclass(frozen=True)
class Recovery:
    """The pruned and the retrained model on held-out rows, against the dense one's loss.

    Two measures of what came back: the loss also falls because the model adapts to the training
    text; the divergence from the dense model does not.
    """

    dense: float | None
    """The dense model's loss in nats per token; None without one to compare with."""
    first: Held
    last: Held

    @property
    def before(self) -> float:
        """Loss of the pruned model."""
        return self.first.loss

    @property
    def after(self) -> float:
        """Loss of the retrained model."""
        return self.last.loss

    @property
    def gap(self) -> float | None:
        """Increase of the loss through pruning, in nats."""
        return None if self.dense is None else self.before - self.dense

    @property
    def recovered(self) -> float | None:
        """Recovered share of the gap: 1 equals the dense model, below 0 is worse than before.

        None without a dense model, or if the gap is smaller than `SMALLEST_GAP`.
        """
        if self.gap is None or not self.gap >= SMALLEST_GAP or not math.isfinite(self.after):
            return None
        return (self.before - self.after) / self.gap

    @property
    def recovered_kl(self) -> float | None:
        """Share of the divergence from the dense model that was closed: 1 equals the dense model.

        None if it is not known, or was smaller than `SMALLEST_KL`.
        """
        if self.first.kl is None or self.last.kl is None or not self.first.kl >= SMALLEST_KL:
            return None
        return 1 - self.last.kl / self.first.kl if math.isfinite(self.last.kl) else None

    def summary(self) -> dict[str, Any]:
        """Return losses, perplexities, gap and share for summary.json."""
        named = {"dense": self.dense, "before": self.before, "after": self.after}
        return {
            **{f"heldout_loss_{name}": value for name, value in named.items()},
            **{f"heldout_ppl_{name}": perplexity(value) for name, value in named.items()},
            "gap_nat": self.gap,
            "recovered": self.recovered,
            "heldout_kl_before": self.first.kl,
            "heldout_kl_after": self.last.kl,
            "recovered_kl": self.recovered_kl,
        }
