"""Recipe ``importance``: what every block of a small model is worth by every criterion."""

from __future__ import annotations

import math

from core.criteria import LABELS
from core.importance.agreement import spearman
from core.prune.score_results import Importance
from core.recipes import parts, texts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.spec import RecipeSpec
from core.words import block_ranges

CHEAP = 1.15
"""A block counts as cheap if the perplexity without it is at most this many times dense."""
OTHERS = ("taylor", "magnitude", "block_influence")


def steps(spec: RecipeSpec) -> list[Step]:
    """One importance run with all metrics."""
    return [parts.scored(spec, calibration=texts.data_of(spec))]


def factors(chain: Chain) -> list[float]:
    """Return the perplexity without each block, relative to dense."""
    dense = chain.read(parts.SCORES, Importance).dense_ppl or math.nan
    return [ppl / dense for ppl in parts.scores_of(chain, "ppl")]


def verdict(chain: Chain) -> Verdict:
    """Report which blocks hardly matter, which matter most, and whether the criteria agree."""
    found, run = factors(chain), chain.read(parts.SCORES, Importance)
    worst = max(range(len(found)), key=found.__getitem__)
    best = min(range(len(found)), key=found.__getitem__)
    cheap = [block for block, factor in enumerate(found) if factor <= CHEAP]
    names = f": {block_ranges(cheap)}" if cheap else ""
    ppl = parts.scores_of(chain, "ppl")
    agreement = {name: spearman(ppl, parts.scores_of(chain, name)) for name in OTHERS}
    closest = max(agreement, key=lambda name: agreement[name])
    return Verdict(
        f"{len(cheap)} of {len(found)} blocks can be dropped singly for at most {CHEAP:.2f} x the "
        f"dense perplexity{names}. Without block {worst} it is {found[worst]:.1f} x.",
        (
            f"The cheapest is block {best}: {found[best]:.3f} x a dense perplexity of "
            f"{run.dense_ppl:.3f}.",
            f"Of the other criteria, {LABELS[closest]} ranks the blocks most like perplexity does "
            f"(rank correlation {agreement[closest]:.2f}).",
            parts.measured_on(run),
        ),
        {"dense_ppl": run.dense_ppl, "factors": found, "rank_agreement": agreement},
    )


RECIPE = Recipe(
    "importance",
    "What every block is worth",
    "Scores every block by all criteria, and reports which ones hardly matter.",
    steps,
    verdict,
)
