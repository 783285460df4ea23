"""Recipe ``importance``: what every block of a small model is worth, by every criterion."""

from __future__ import annotations

from typing import Any

from core.importance.agreement import spearman
from core.recipes.chain import Chain, Recipe, Step, Verdict

CHEAP = 1.15
"""A block is called cheap where the perplexity without it is at most this many times dense."""


def steps(spec: Any) -> list[Step]:
    """One importance run with all metrics."""
    options = {"checkpoint": spec.checkpoint, "calibration": spec.data or "demo"}
    return [Step("scores", "importance", options)]


def factors(chain: Chain) -> list[float]:
    """Return the perplexity without each block over the dense one."""
    dense = float(chain.json("scores")["dense_ppl"])
    return [float(row["ppl"]) / dense for row in chain.rows("scores", "blocks.csv")]


def verdict(chain: Chain) -> Verdict:
    """Say which blocks hardly matter, which matter most, and whether the criteria agree."""
    found, summary = factors(chain), chain.json("scores")
    rows = chain.rows("scores", "blocks.csv")
    worst = max(range(len(found)), key=found.__getitem__)
    cheap = [block for block, factor in enumerate(found) if factor <= CHEAP]
    order = sorted(range(len(found)), key=found.__getitem__)
    names = ", ".join(map(str, cheap)) or "none"
    agreement = {
        name: spearman([float(r["ppl"]) for r in rows], [float(r[name]) for r in rows])
        for name in ("taylor", "magnitude", "block_influence")
    }
    closest = max(agreement, key=lambda name: agreement[name])
    return Verdict(
        f"{len(cheap)} of {len(found)} blocks can go alone for at most {CHEAP:.2f} x of the "
        f"perplexity ({names}); without block {worst} it is {found[worst]:.1f} x.",
        (
            f"The cheapest block is {order[0]}: {found[order[0]]:.3f} x of a dense perplexity of "
            f"{summary['dense_ppl']:.3f}.",
            f"Of the other criteria {closest.replace('_', ' ')} agrees best with perplexity "
            f"(rank correlation {agreement[closest]:.2f}).",
            f"Measured on {summary['device']} in {summary['dtype']}, {summary['samples']} rows of "
            f"{summary['length']} tokens of {summary['calibration']}, seed {summary['seed']}.",
        ),
        {"dense_ppl": summary["dense_ppl"], "factors": found, "rank_agreement": agreement},
    )


RECIPE = Recipe(
    "importance",
    "What every block is worth",
    "Scores every block by all criteria, and says which ones hardly matter.",
    steps,
    verdict,
)
