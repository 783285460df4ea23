"""How certain an order of blocks is that was measured on a few calibration rows.

The rows are a sample of the text. Resampling them with replacement a thousand times (bootstrap,
Efron 1979) shows how much the order would differ with other rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.prune.score_results import SampleRow

RESAMPLES = 1000
SEED = 1234
SURE = 0.95
"""Share of resamples from which on a rank or a set counts as certain."""


@dataclass(frozen=True)
class Certainty:
    """Blocks in removal order, and how often that order holds when the rows are resampled."""

    order: tuple[int, ...]
    """The least important block first; protected ones are left out."""
    rank_share: tuple[float, ...]
    """Share of resamples in which the block at each rank has exactly that rank."""
    set_share: tuple[float, ...]
    """For k = 1, 2, ...: share of resamples in which the first k blocks are the same set."""
    rank_range: tuple[tuple[int, int], ...]
    """For the block at each rank: the range of ranks (from 1) in the middle 90 % of resamples."""
    rows: int
    rows_needed: tuple[float, ...]
    """For k = 1, 2, ...: rows needed to distinguish block k from block k + 1."""
    gaps: tuple[float, ...]
    """For k = 1, 2, ...: perplexity without block k + 1 over perplexity without block k; of KL, exp
    of the difference."""

    @property
    def certain(self) -> tuple[int, ...]:
        """Blocks whose rank is certain, in removal order."""
        return tuple(b for b, s in zip(self.order, self.rank_share, strict=True) if s >= SURE)


def losses(samples: Sequence[SampleRow]) -> tuple[list[int], np.ndarray]:
    """Return the blocks of samples.csv and their losses [rows, blocks] in nats per token."""
    table: dict[int, dict[int, float]] = {}
    for row in samples:
        if row.block >= 0:
            table.setdefault(row.block, {})[row.sample] = row.nll
    blocks = sorted(table)
    rows = sorted(set.intersection(*(set(table[b]) for b in blocks))) if blocks else []
    return blocks, np.array([[table[b][r] for b in blocks] for r in rows], dtype=float)


def certainty(
    samples: Sequence[SampleRow],
    protected: Sequence[int] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Certainty | None:
    """Resample the calibration rows of samples.csv (block, sample, nll) and rank again.

    All rows have the same weight, because they have the same length. Returns None with fewer than
    two rows or two blocks, or if a loss is not finite: then there is nothing to resample.
    """
    blocks, table = losses(samples)
    kept = [at for at, block in enumerate(blocks) if block not in set(protected)]
    if len(kept) < 2 or len(table) < 2:
        return None
    table, names = table[:, kept], np.array(blocks)[kept]
    if not np.isfinite(table).all():
        return None
    order = np.argsort(table.mean(axis=0), kind="stable")
    table, names = table[:, order], names[order]
    rows, count = table.shape
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(rows, [1 / rows] * rows, size=resamples) / rows
    ranked = np.argsort(weights @ table, axis=1, kind="stable")  # [resamples, rank] -> old rank
    ranks = np.argsort(ranked, axis=1)  # [resamples, old rank] -> rank
    firsts = np.maximum.accumulate(ranked, axis=1)
    low, high = np.quantile(ranks, (0.05, 0.95), axis=0, method="nearest")
    return Certainty(
        order=tuple(int(b) for b in names),
        rank_share=tuple((ranks == np.arange(count)).mean(axis=0).tolist()),
        set_share=tuple((firsts == np.arange(count)).mean(axis=0).tolist()),
        rank_range=tuple((int(a) + 1, int(b) + 1) for a, b in zip(low, high, strict=True)),
        rows=rows,
        rows_needed=tuple(_rows_needed(table[:, k + 1] - table[:, k]) for k in range(count - 1)),
        gaps=tuple(math.exp(min(g, 700.0)) for g in np.diff(table.mean(axis=0)).tolist()),
    )


def _rows_needed(differences: np.ndarray) -> float:
    """Return the rows after which a mean difference is 1.645 standard errors above 0 (95 %)."""
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    return math.inf if mean <= 0 else math.ceil((1.645 * spread / mean) ** 2) or 1
