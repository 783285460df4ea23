"""Whether the methods of a search differ on text that chose nothing, beyond noise.

The held-out rows are a sample. Resampling them with replacement (bootstrap, Efron 1979), the same
rows for both sets, shows how far the difference between two sets could be chance.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from core import words
from core.findings.finding import Finding
from core.search.results import HeldoutRow, Search, SetRow, by_count, units_in
from core.words import listed

RESAMPLES = 10_000
SEED = 1234
Key = tuple[str, frozenset[Any]]
"""How a set was healed, and its blocks or parts."""
CHANCE = 0.05
"""How often at least one difference may be called certain though there is none."""


@dataclass(frozen=True)
class Difference:
    """What another method's set costs on held-out text beyond the set that a search prefers."""

    count: int
    """Blocks, or parts of blocks, removed."""
    chosen: tuple[str, ...]
    """Methods that found the set with the lowest cost on the calibration rows."""
    others: tuple[str, ...]
    """Methods that found the other set."""
    mean: float
    """Cost of the other set minus that of the chosen one, in nats; negative if it is cheaper."""
    low: float
    high: float
    rows: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def differences(
    sets: Sequence[SetRow], rows: Iterable[HeldoutRow], objective: str
) -> list[Difference]:
    """Compare, for every count, the set with the lowest calibration cost with each other set.

    Sets that were not measured on the held-out rows are left out. With fewer than two rows there
    is nothing to resample, and the result is empty. The intervals are wide enough for all of them
    together: if sets do not differ, one leaves out zero in about 5 % of cases.
    """
    table: dict[Key, dict[int, tuple[int, float]]] = {}
    for row in rows:
        cost = row.kl if objective == "kl" else row.nll
        table.setdefault((row.heal, frozenset(units_in(row.drop))), {})[row.row] = (
            row.tokens,
            cost,
        )
    found: list[Difference] = []
    compared: list[tuple[int, tuple[str, ...], tuple[str, ...], Key, Key]] = []
    for count, best in by_count(sets).items():
        methods: dict[Key, list[str]] = {}
        for one in sets:
            if one.count == count:
                methods.setdefault(_key(one), []).append(one.method)
        chosen = methods.pop(_key(best), [best.method])
        for key, names in methods.items():
            compared.append((count, tuple(chosen), tuple(names), _key(best), key))
    for count, chosen_by, others, cheapest, key in compared:
        both = _paired(table.get(cheapest, {}), table.get(key, {}), len(compared))
        if both is not None:
            found.append(Difference(count, chosen_by, others, *both))
    return found


def fewest(comparisons: int) -> int:
    """Return the rows from which on one of several differences can be called certain.

    With fewer, all rows point the same way by chance too often (sign test).
    """
    return 1 + math.ceil(math.log2(comparisons / CHANCE))


def _key(row: SetRow) -> Key:
    return row.heal, frozenset(row.units)


def _paired(
    chosen: dict[int, tuple[int, float]],
    other: dict[int, tuple[int, float]],
    comparisons: int,
) -> tuple[float, float, float, int] | None:
    """Return mean, both ends of the interval, and the number of rows; None without an interval.

    Percentiles of resampled means are too narrow for few rows: they are taken further out, as far
    as Student's t is beyond the normal distribution (Hesterberg 2015), and for every comparison
    more (Bonferroni).
    """
    from scipy.special import ndtr, stdtrit

    common = sorted(set(chosen) & set(other))
    tokens = np.array([chosen[row][0] for row in common], dtype=float)
    apart = np.array([other[row][1] - chosen[row][1] for row in common], dtype=float)
    if len(common) < 2 or not np.isfinite(apart).all():
        return None
    weights = _picks(len(common)) * tokens
    means = (weights @ apart) / weights.sum(axis=1)
    rows = len(common)
    t = float(stdtrit(rows - 1, CHANCE / 2 / comparisons))
    tail = float(ndtr(math.sqrt(rows / (rows - 1)) * t))
    low, high = (float(v) for v in np.quantile(means, (tail, 1 - tail)))
    return float((tokens * apart).sum() / tokens.sum()), low, high, len(common)


@functools.lru_cache(maxsize=2)
def _picks(rows: int) -> Any:
    """Return how often each of ``rows`` rows is drawn in each resample, [resamples, rows]."""
    draw = np.random.default_rng(SEED)
    return draw.multinomial(rows, [1 / rows] * rows, size=RESAMPLES)


def of_search(folder: Path) -> Finding | None:
    """Return what a search's held-out rows say of its methods; None if they say nothing."""
    summary, sets = Search.read(folder), SetRow.read(folder)
    if summary is None or len({row.method for row in sets}) < 2:
        return None
    found = differences(sets, HeldoutRow.read(folder), summary.objective)
    counts = sorted({row.count for row in sets})
    if not found:
        same = all(len({_key(r) for r in sets if r.count == c}) == 1 for c in counts)
        return _same(counts, summary) if same else None
    return _compared(found, summary)


@dataclass(frozen=True)
class Spread:
    """How far choices are apart: the mean share of a set that the other one does not have."""

    methods: float
    """Between methods on one text."""
    texts: float
    """Between texts, by one method."""
    other: Path
    """The search on the other text."""
    counts: tuple[int, ...]


def spread(folder: Path, other: Path) -> Spread | None:
    """Compare a search with one on another text; None if they have no method or count in common.

    Nor if more than the text differs: objective, healing, protected blocks. Counts with fewer than
    two methods here say nothing.
    """
    found, theirs = Search.read(folder), Search.read(other)
    if found is None or theirs is None:
        return None
    if (
        _searched(found) != _searched(theirs)
        or found.calibration_content == theirs.calibration_content
    ):
        return None
    tables = [
        {(row.count, row.method): frozenset(row.units) for row in SetRow.read(one)}
        for one in (folder, other)
    ]
    methods: list[float] = []
    texts: list[float] = []
    counts: list[int] = []
    for count in sorted({count for count, _ in tables[0]}):
        own = {name: drop for (size, name), drop in tables[0].items() if size == count}
        shared = [name for name in own if (count, name) in tables[1]]
        if len(own) < 2 or not shared:
            continue
        pairs = itertools.combinations(own.values(), 2)
        methods.append(fmean(len(a - b) / count for a, b in pairs))
        texts.append(fmean(len(own[n] - tables[1][count, n]) / count for n in shared))
        counts.append(count)
    return Spread(fmean(methods), fmean(texts), other, tuple(counts)) if counts else None


def _searched(found: Search) -> tuple[Any, ...]:
    """Return what a search was asked for but for its methods, counts and text."""
    protected = found.protect_first, found.protect_last
    return found.checkpoint_key, found.units, found.objective, found.heal, protected


def of_texts(folder: Path, others: Iterable[Path]) -> Finding | None:
    """Return whether the calibration text decides more than the method, by searches on others.

    The search whose sets are furthest from those of ``folder`` is named.
    """
    found = [one for other in others if (one := spread(folder, other))]
    most = max(found, key=lambda one: one.texts, default=None)
    if most is None or most.texts <= most.methods:
        return None
    here = Search.read(folder) or Search()
    name = words.markdown(Path((Search.read(most.other) or Search()).calibration or "").name)
    return Finding(
        "text-matters",
        "The calibration text matters more than the search method: with "
        f"{_counts(most.counts, here)} removed, the methods differ in {most.methods:.0%} of a set "
        f"on average, but the same method on {name} chooses {most.texts:.0%} other "
        f"{_noun(here)}s.",
        {"between methods": f"{most.methods:.2f}", "between texts": f"{most.texts:.2f}"},
        "Search on text like what the model is for before you try more methods.",
    )


def _same(counts: Sequence[int], summary: Search) -> Finding:
    return Finding(
        "methods-alike",
        f"All methods found the same sets for {_counts(counts, summary)} removed.",
        {"counts": words.block_ranges(counts)},
        "Use one-shot or greedy here: they need the fewest block passes.",
    )


def _compared(found: Sequence[Difference], summary: Search) -> Finding:
    unit = f"nats of {'KL' if summary.objective == 'kl' else 'loss'} per token"
    evidence = {
        f"{one.count} removed: {listed([*one.others])} minus {listed([*one.chosen])}": (
            f"{one.mean:+.4f} {unit}, 95 % interval {one.low:+.4f} to {one.high:+.4f}"
        )
        for one in found
    }
    evidence["held-out rows"] = f"{found[0].rows}, {summary.heldout}"
    sure = [one for one in found if one.is_certain]
    needed = fewest(len(found))
    if found[0].rows < needed:
        return Finding(
            "methods-alike",
            f"{found[0].rows} held-out rows are too few to distinguish the methods.",
            evidence,
            f"Search again with --samples {max(10, needed)}, or with another text if this one has "
            f"no more rows: at least {needed} held-out rows are needed for {len(found)} "
            f"comparison{'s' * (len(found) > 1)}.",
        )
    if not sure:
        counts = sorted({one.count for one in found})
        return Finding(
            "methods-alike",
            "On the held-out text the methods do not differ beyond noise: with "
            f"{_counts(counts, summary)} removed, every 95 % interval over {found[0].rows} rows "
            "includes zero.",
            evidence,
            "Use the method with the fewest block passes, or search again with more --samples "
            "to distinguish them.",
        )
    most = max(sure, key=lambda one: abs(one.mean) if math.isfinite(one.mean) else 0.0)
    better, worse = (most.chosen, most.others) if most.mean > 0 else (most.others, most.chosen)
    near, far = sorted((abs(most.low), abs(most.high)))
    rest = len(found) - len(sure)
    others = {0: "", 1: " One other difference is within noise."}.get(
        rest, f" {rest} other differences are within noise."
    )
    surprise = "" if most.mean > 0 else " On the calibration text it is the other way around."
    return Finding(
        "methods-differ",
        "On the held-out text the methods differ beyond noise: with "
        f"{_counts([most.count], summary)} removed, the set of {listed([*better])} costs "
        f"{abs(most.mean):.4f} {unit} less than that of {listed([*worse])} (95 % interval "
        f"{near:.4f} to {far:.4f}, {most.rows} rows).{others}{surprise}",
        evidence,
        "Prefer the set whose held-out cost is lowest at the count you need."
        if most.mean > 0
        else "Search again with more --samples, or with text closer to what the model is for.",
    )


def _counts(counts: Sequence[int], summary: Search) -> str:
    return f"{words.block_ranges(counts)} {_noun(summary)}{'s' * (list(counts) != [1])}"


def _noun(summary: Search) -> str:
    return "part" if summary.units != Search.units else "block"
