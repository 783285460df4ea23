"""The registry of criteria: name, label, score column and source of each way to rank blocks.

The command line, plans, pages and charts take their names from here. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Criterion:
    """One way to rank blocks; a lower score means "remove first"."""

    name: str
    """Name on the command line; also the metric of an importance run that measures it."""
    label: str
    column: str = ""
    """Column of blocks.csv with one score per block; empty if the scores are kept elsewhere."""
    source: str = ""
    short: str = ""
    """Name in lists and headings, if the label is too long for one."""
    by_default: bool = True
    """Computed by an importance run unless metrics are named."""
    control: bool = False
    """Needs no scores: a baseline that every criterion should beat."""
    searched: bool = False
    """Chooses whole sets: only a run of search has measured them."""
    of_parts: bool = False
    """Ranks the attention and the MLP of every block on their own, not blocks."""
    solved: bool = False
    """Chooses versions of blocks within budgets: only a budget run has measured them."""


CRITERIA = (
    Criterion("ppl", "perplexity without it", "ppl", "Kim et al., arXiv 2402.02834", "perplexity"),
    Criterion("taylor", "Taylor", "taylor", "Kim et al., arXiv 2402.02834"),
    Criterion("magnitude", "magnitude", "magnitude", "Kim et al., arXiv 2402.02834"),
    Criterion("block-influence", "Block Influence", "block_influence", "Men et al., ShortGPT"),
    Criterion("angular", "angular distance", "", "Gromov et al., arXiv 2403.17887"),
    Criterion("relative-update", "relative update", "relative_update"),
    Criterion("sleb", "SLEB (greedy)", "", "Song et al., SLEB", by_default=False),
    Criterion("kl", "KL from the dense model", "kl", by_default=False),
    Criterion(
        "sublayers",
        "perplexity without the part",
        short="attention and MLP",
        by_default=False,
        of_parts=True,
    ),
    Criterion("one-shot", "cheapest single blocks", searched=True),
    Criterion("greedy", "greedy search", source="Song et al., SLEB", searched=True),
    Criterion("beam", "beam search", searched=True),
    Criterion("pairs", "search by pairs", searched=True),
    Criterion("evolve", "evolution", source="EvoPress, arXiv 2410.14649", searched=True),
    Criterion("best", "best set found", searched=True),
    Criterion("budget", "solved for budgets", source="Puzzle, arXiv 2411.19146", solved=True),
    Criterion("last", "last blocks", control=True),
    Criterion("random", "random", control=True),
)
SUBLAYERS = "sublayers"
"""The criterion that ranks parts of blocks."""

BUDGET = "budget"
"""The criterion of plans that were solved for budgets."""

METRICS = tuple(c.name for c in CRITERIA if not (c.control or c.searched or c.solved))
"""What an importance run can compute."""
DEFAULT_METRICS = tuple(c.name for c in CRITERIA if c.by_default and c.name in METRICS)
NAMES = tuple(c.name for c in CRITERIA)
CONTROLS = tuple(c.name for c in CRITERIA if c.control)
SEARCHED = tuple(c.name for c in CRITERIA if c.searched)
"""The methods of search, and ``best``: the cheapest set of any of them."""
COLUMNS = {c.column: c.name for c in CRITERIA if c.column}
"""Column of blocks.csv -> criterion."""
LABELS = {c.column or c.name.replace("-", "_"): c.label for c in CRITERIA}
"""Column, or the name with underscores -> label in charts."""
SHORT = {c.name: c.short or c.label for c in CRITERIA}
"""Name -> what lists and headings call it."""
