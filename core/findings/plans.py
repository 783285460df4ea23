"""Finding of a plan: it takes many attentions, which other text may need."""

from __future__ import annotations

from typing import Any

from core.checkpoint.drop import Removal
from core.findings.finding import Finding
from core.prune import cautions


def of_plan(removal: Removal, blocks: int, calibration: str | None = None) -> Finding | None:
    """Return a finding if a cut takes as many attentions as those that were found to cost more.

    Args:
        removal: What goes.
        blocks: Number of blocks of the model before.
        calibration: The text that the cut was chosen on, for the evidence.
    """
    sentence = cautions.attention(removal, blocks)
    if not sentence:
        return None
    measured = cautions.OTHER | cautions.ALIKE
    evidence: dict[str, Any] = {"chosen on": calibration} if calibration else {}
    for text, (low, high) in measured.items():
        what = f"{cautions.MODEL}, {text}: perplexity over that of whole blocks"
        evidence[what] = f"{low:.1f} to {high:.1f}"
    evidence["measured in"] = cautions.SOURCE
    return Finding("attention-lost", sentence, evidence, cautions.TRY)
