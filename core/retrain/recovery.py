"""How much of the loss from pruning was recovered, from held-out losses on identical rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from core.prune.results import perplexity

SMALLEST_GAP = 0.05
"""Below this gap in nats the recovered share is mostly noise, so it is not reported."""

BEYOND = 1.05
"""Above this recovered share, training added knowledge that the dense model did not have."""


@dataclass(frozen=True)
class Recovery:
    """Held-out losses in nats per token of the dense, the pruned and the retrained model."""

    dense: float | None
    """None without a dense model to compare with."""
    before: float
    after: float

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

    def summary(self) -> dict[str, Any]:
        """Return losses, perplexities, gap and share for summary.json."""
        named = {"dense": self.dense, "before": self.before, "after": self.after}
        return {
            **{f"heldout_loss_{name}": value for name, value in named.items()},
            **{f"heldout_ppl_{name}": perplexity(value) for name, value in named.items()},
            "gap_nat": self.gap,
            "recovered": self.recovered,
        }
