"""What has been measured of cuts like a plan's, so that a plan can say so; no torch.

Plans that take many attentions are cheap on text like the one that chose them, and dearer on other
text. The figures are those of docs/results/choosing.md, perplexity of the plain cut: a budget plan,
chosen on C4, over whole blocks chosen on the same rows by greedy search, at the same predicted
latency, with 4, 6 and 8 whole blocks.
"""

from __future__ import annotations

from core.checkpoint.drop import Removal

FROM = 0.25
"""Share of blocks without attention from which on a cut is like those that were measured."""
MODEL, CHOSEN_ON, SOURCE = "SmolLM2-135M", "C4", "docs/results/choosing.md"
TAKEN = (8, 12)
"""Of 30 blocks, those that lost their attention alone in the measured plans."""
OTHER = {"WikiText-2": (1.1, 2.1)}
"""Text unlike the one that chose -> least and most perplexity, over that of whole blocks."""
ALIKE = {"C4": (0.9, 1.0), "BoolQ passages": (0.8, 1.0)}
"""The same of the text that chose, and of one where the plans did as well."""


def is_like_measured(removal: Removal, blocks: int) -> bool:
    """Whether a cut of a model of ``blocks`` blocks takes as many attentions as those measured."""
    return len(removal.attention) >= FROM * blocks > 0


def attention(removal: Removal, blocks: int) -> str:
    """Return what is known of cuts that take this many attentions; empty for fewer."""
    if not is_like_measured(removal, blocks):
        return ""
    (text, (low, high)), (least, most) = next(iter(OTHER.items())), _span()
    return (
        f"{len(removal.attention)} of {blocks} blocks lose their attention alone, which can cost "
        f"more on text unlike the calibration: with {MODEL}, such plans ({TAKEN[0]} to {TAKEN[1]} "
        f"of 30, chosen on {CHOSEN_ON}) had {low:g} to {high:g} times the perplexity of whole "
        f"blocks at about the same latency on {text}, but {least:.1f} to {most:.1f} times on "
        f"{' and '.join(ALIKE)}."
    )


def _span() -> tuple[float, float]:
    """Return the least and the most over the texts where such plans did well."""
    return min(low for low, _ in ALIKE.values()), max(high for _, high in ALIKE.values())


TRY = "Measure the perplexity on a text like the model's use, beside a cut of whole blocks."
