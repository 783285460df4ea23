"""Findings of one importance run: criteria that disagree, and a calibration set too small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from core.criteria import COLUMNS
from core.findings.certainty import SURE, Certainty, certainty
from core.findings.finding import Finding
from core.importance.agreement import spearman
from core.prune.plan import default_protection
from core.prune.score_results import BlockRow, DivergenceRow, Importance, SampleRow
from core.study import criterion_label
from core.words import listed

SHARE = 0.2
"""Share of blocks assumed to be removed: the paper's moderate pruning."""
AGREE = 0.5
"""Rank correlation from which on two criteria count as agreeing."""
FEWEST = 4
"""Minimum number of blocks for a meaningful rank correlation."""
ALIKE = 1.01
"""Perplexities within this factor of each other count as the same."""


def of_run(folder: Path) -> list[Finding]:
    """Return the findings from an importance run's files; none if it has no scores."""
    blocks = BlockRow.read(folder)
    summary = Importance.read(folder)
    if not blocks:
        return []
    protected = protected_of(len(blocks))
    rows = summary.samples if summary else None
    apart = [row.as_sample for row in DivergenceRow.read(folder)]
    found = (
        criteria_disagree(blocks, protected),
        calibration_small(SampleRow.read(folder), protected, rows),
        calibration_small(apart, protected, rows, divergence=True),
    )
    return [f for f in found if f]


def protected_of(blocks: int) -> list[int]:
    """Return the first and last blocks that are protected by default."""
    first, last = default_protection(blocks)
    return [*range(first), *range(blocks - last, blocks)]


def removed_first(blocks: int) -> int:
    """Return how many of ``blocks`` are assumed to be removed, at least one."""
    return max(1, round(SHARE * blocks))


def criteria_disagree(blocks: Sequence[BlockRow], protected: Sequence[int] = ()) -> Finding | None:
    """Return a finding if two criteria of blocks.csv order the removable blocks differently."""
    rows = [r for r in blocks if r.block not in set(protected)]
    if len(rows) < FEWEST:
        return None
    scored = {c: values for c in COLUMNS if (values := _ranked(rows, c))}
    pairs = {
        (a, b): spearman(scored[a], scored[b]) for a, b in combinations(scored, 2)
    }  # fmt: skip
    apart = sorted((rho, pair) for pair, rho in pairs.items() if rho < AGREE)
    if not apart:
        return None
    rho, (a, b) = apart[0]
    count = removed_first(len(blocks))
    firsts = [_first(rows, scored[c], count) for c in (a, b)]
    same = len(set(firsts[0]) & set(firsts[1]))
    one, two = criterion_label(a), criterion_label(b)
    return Finding(
        "criteria-disagree",
        f"{one} and {two} order the blocks differently: rank correlation {rho:.2f} over the "
        f"{len(rows)} removable blocks; {_overlap(count, same)}.",
        {f"rank correlation of {criterion_label(x)} and {criterion_label(y)}": round(r, 3)
         for r, (x, y) in apart}
        | {f"first {count} by {name}": ", ".join(map(str, first))
           for name, first in zip((one, two), firsts, strict=True)},
        "Let measured perplexity decide: measure the curve by both "
        "and use the order whose perplexity stays lower.",
    )  # fmt: skip


def _overlap(count: int, same: int) -> str:
    if count == 1:
        return f"they would remove {'the same block' if same else 'different blocks'} first"
    verb = "are" if same > 1 else "is"
    return f"of the {count} blocks that each would remove first, {same or 'none'} {verb} the same"


def _ranked(rows: Sequence[BlockRow], column: str) -> list[float]:
    """Return a criterion's scores; empty if one is missing or all are the same."""
    values = [getattr(r, column) for r in rows]
    known = [v for v in values if v is not None and not math.isnan(v)]
    return known if len(known) == len(rows) and len(set(known)) > 1 else []


def _first(rows: Sequence[BlockRow], values: Sequence[float], count: int) -> list[int]:
    order = sorted(range(len(rows)), key=values.__getitem__)
    return [rows[at].block for at in order[:count]]


def calibration_small(
    samples: Sequence[SampleRow],
    protected: Sequence[int] = (),
    asked: int | None = None,
    *,
    divergence: bool = False,
) -> Finding | None:
    """Return a finding if other calibration rows could easily remove other blocks.

    ``samples``: rows of samples.csv; with ``divergence``, nll is the KL from the dense model. The
    set of blocks removed first must be the same in 95 % of
    the resamples; a single row cannot show that.
    """
    blocks = {r.block for r in samples if r.block >= 0}
    if not blocks:
        return None
    found = certainty(samples, protected)
    if found is None:
        return None if divergence else _one_row(samples)
    count = min(removed_first(len(blocks)), len(found.order) - 1)
    share = found.set_share[count - 1]
    if share >= SURE:
        return None
    return _uncertain(found, count, share, asked or found.rows, divergence)


def _one_row(samples: Sequence[SampleRow]) -> Finding | None:
    if len({r.sample for r in samples}) > 1:
        return None  # there are rows, but losses are not finite: another problem
    return Finding(
        "calibration-small",
        "The blocks were scored on a single calibration row, so it is unknown how much their order "
        "depends on it.",
        {"calibration rows": 1},
        "Score again with --samples 10 or more.",
    )


def _uncertain(found: Certainty, count: int, share: float, rows: int, divergence: bool) -> Finding:
    first, gap = found.order[:count], found.gaps[count - 1]
    sure = [str(b) for b in found.certain]
    stable = "no block's rank is stable"
    if len(sure) == 1:
        stable = f"only block {sure[0]}'s rank is stable"
    elif sure:
        stable = f"only the ranks of blocks {listed(sure)} are stable"
    evidence: dict[str, Any] = {
        "calibration rows": found.rows,
        f"the first {count}": ", ".join(map(str, first)),
        f"resamples with the same first {count}": f"{share:.0%}",
    }
    for at in range(min(len(found.order), count + 3)):
        low, high = found.rank_range[at]
        text = f"{low}" if low == high else f"{low} to {high}"
        evidence[f"rank of block {found.order[at]} in 90 % of resamples"] = text
    by = " by KL" if divergence else ""
    return Finding(
        "calibration-small",
        f"{found.rows} calibration rows are too few to determine the first {_blocks(count)} to "
        f"remove{by}: resampling the rows picks the same {_set(count)} only {share:.0%} of the "
        f"time; {stable}.",
        evidence,
        _advice(found, count, gap, rows, divergence),
    )


def _set(count: int) -> str:
    return "one" if count == 1 else f"{count}"


def _blocks(count: int) -> str:
    return "block" if count == 1 else f"{count} blocks"


def _advice(found: Certainty, count: int, gap: float, rows: int, divergence: bool) -> str:
    """Advise how many rows to use, or that it does not matter which block is removed."""
    inside, outside = found.order[count - 1], found.order[count]
    if gap < ALIKE:
        apart = f"perplexity differs by {gap - 1:.2%}"
        if divergence:
            apart = f"KL differs by {math.log(gap):.2g} nats"
        return (
            f"Blocks {inside} and {outside} cost nearly the same ({apart}), so either is fine; to "
            f"be sure, score with --samples {2 * rows}."
        )
    needed = found.rows_needed[count - 1]
    more = max(2 * rows, round(needed) if math.isfinite(needed) else 4 * rows)
    return (
        f"Score again with --samples {min(more, 1000)}: blocks {inside} and {outside} are too "
        "close to call."
    )
