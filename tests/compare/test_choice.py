"""Budgets, the best choice, and the Pareto frontier, against counting by hand."""

from __future__ import annotations

import math
import random

import pytest

from core.compare.candidates import Candidate
from core.compare.choice import Budget, best, broken, frontier, within
from core.compare.outcomes import Outcome
from core.errors import OptionError


def row(key, ppl, ms=1.0, mib=100.0, over=1.0, cost="measured"):
    candidate = Candidate(key, key, "depth", parameters=1, ppl=ppl)
    return Outcome(candidate, over, per_token_ms=ms, memory_mib=mib, kind_of_cost=cost)


ROWS = [
    row("dense", 2.0, 10.0, 4096.0, 1.0),
    row("depth", 2.2, 6.0, 3000.0, 1.1),
    row("width", 2.1, 9.0, 3000.0, 1.05),
    row("small", 4.0, 3.0, 1000.0, 2.0),
]


def test_estimates_share_no_frontier_and_no_rank_with_measurements():
    guessed = [row("plan", 1.9, 1.0, 10.0, cost="estimated"), row("x", 2.3, 5.0, cost="estimated")]
    both = [*ROWS, *guessed]
    assert [r.key for r in frontier(both, "per_token_ms")] == ["small", "depth", "width", "dense"]
    assert [r.key for r in frontier(guessed, "per_token_ms")] == ["plan"]
    # perplexity and size are measured and counted for all of them
    assert [r.key for r in frontier(both, "parameters")] == ["plan"]
    assert best(both, Budget()).key == "plan"
    assert best(both, Budget(per_token_ms=7.0)).key == "depth"
    assert best(both, Budget(per_token_ms=2.0)).key == "plan"


def test_the_frontier_is_what_no_other_beats():
    rng = random.Random(3)
    rows = [row(str(n), rng.randint(1, 9), rng.randint(1, 9)) for n in range(60)]
    beaten = {
        a.key
        for a in rows
        for b in rows
        if b.ppl <= a.ppl and b.per_token_ms <= a.per_token_ms
        and (b.ppl, b.per_token_ms) != (a.ppl, a.per_token_ms)
    }  # fmt: skip
    expected = {(r.per_token_ms, r.ppl) for r in rows if r.key not in beaten}
    found = frontier(rows, "per_token_ms")
    assert {(r.per_token_ms, r.ppl) for r in found} == expected
    assert len(found) == len(expected)
    assert [r.per_token_ms for r in found] == sorted(r.per_token_ms for r in found)


def test_unknown_and_infinite_values_are_not_on_the_frontier():
    rows = [row("a", None), row("b", math.inf), row("c", 3.0, None), row("d", 2.0)]
    assert [r.key for r in frontier(rows, "per_token_ms")] == ["d"]
    assert frontier([], "per_token_ms") == []


@pytest.mark.parametrize(
    ("budget", "fit", "chosen"),
    [
        (Budget(), ["dense", "depth", "width", "small"], "dense"),
        (Budget(memory_gib=3000 / 1024), ["depth", "width", "small"], "width"),
        (Budget(per_token_ms=8), ["depth", "small"], "depth"),
        (Budget(ppl_over_dense=1.05, per_token_ms=9.5), ["width"], "width"),
        (Budget(memory_gib=0.5), [], None),
    ],
)
def test_budgets_filter_and_the_lowest_perplexity_wins(budget, fit, chosen):
    assert [r.key for r in within(ROWS, budget)] == fit
    found = best(ROWS, budget)
    assert (found.key if found else None) == chosen


def test_what_is_unknown_or_out_of_memory_keeps_to_no_budget():
    assert broken(row("x", 2.0, None), Budget(per_token_ms=5)) == ["per_token_ms"]
    assert broken(row("x", 2.0, math.nan), Budget(per_token_ms=5)) == ["per_token_ms"]
    assert within([row("x", 2.0, cost="did not fit")], Budget()) == []


def test_of_equal_perplexities_the_faster_wins_and_without_any_the_fastest():
    assert best([row("slow", 2.0, 9.0), row("fast", 2.0, 3.0)], Budget()).key == "fast"
    assert best([row("slow", None, 9.0), row("fast", None, 3.0)], Budget()).key == "fast"


@pytest.mark.parametrize("value", [0, -1.5])
def test_a_budget_that_nothing_can_keep_to_is_one_sentence(value):
    with pytest.raises(OptionError, match=r"per_token_ms must be above 0, got .*"):
        Budget(per_token_ms=value)
