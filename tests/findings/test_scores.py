"""Findings of an importance run: each is provoked once and stays silent once."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from core.findings import of_run
from core.findings.certainty import certainty
from core.findings.scores import calibration_small, criteria_disagree, protected_of
from core.prune.score_results import BlockRow, SampleRow
from core.runs import workspace

BLOCKS = 8


def table(ppl, taylor, magnitude=None):
    rest = magnitude or [None] * len(ppl)
    rows = zip(ppl, taylor, rest, strict=True)
    return [BlockRow(b, p, t, m) for b, (p, t, m) in enumerate(rows)]


def samples(nll):
    """Rows of samples.csv from losses [block][row]; block -1 is the dense model."""
    dense = [SampleRow(-1, s, 1.0) for s in range(len(nll[0]))]
    return dense + [
        SampleRow(b, s, value) for b, row in enumerate(nll) for s, value in enumerate(row)
    ]


# ------------------------------------------------------------------------- criteria that disagree


def test_opposite_orders_disagree_and_the_worst_pair_is_named():
    ppl = [9, 2, 3, 4, 5, 6, 7, 9]
    found = criteria_disagree(table(ppl, ppl, [-v for v in ppl]), [0, 7])
    assert "rank correlation -1.00 over the 6 removable blocks" in found.sentence
    assert "of the 2 blocks that each would remove first, none is the same" in found.sentence
    assert found.evidence["first 2 by PPL"] == "1, 2"
    assert found.evidence["first 2 by Magnitude"] == "6, 5"
    assert "measure the curve by both" in found.try_next
    assert len([k for k in found.evidence if k.startswith("rank correlation")]) == 2


def test_orders_that_agree_are_silent():
    ppl = [9, 2, 3, 4, 5, 6, 7, 9]
    assert criteria_disagree(table(ppl, [v**2 for v in ppl]), [0, 7]) is None


def test_protected_blocks_do_not_count():
    # Only block 0 is judged differently, and it is never removed.
    ppl, taylor = [90, 2, 3, 4, 5, 6, 7, 9], [0, 2, 3, 4, 5, 6, 7, 9]
    assert criteria_disagree(table(ppl, taylor), [0, 7]) is None


@pytest.mark.parametrize(
    ("ppl", "taylor"),
    [([1, 2, 3], [3, 2, 1]), ([1] * 8, list(range(8))), ([math.nan, *range(7)], list(range(8)))],
)
def test_too_few_or_unusable_scores_are_silent(ppl, taylor):
    assert criteria_disagree(table(ppl, taylor)) is None


# --------------------------------------------------------------------------- calibration too small


def test_the_shares_are_those_of_all_resamples_counted_one_by_one():
    nll = [[1.0, 1.4, 1.3], [1.1, 1.2, 1.6], [2.0, 1.2, 1.5], [3.0, 3.0, 3.0]]
    order = [0, 1, 2, 3]
    hits = [0] * 4
    sets = [0] * 4
    for draw in product(range(3), repeat=3):
        means = [sum(row[s] for s in draw) / 3 for row in nll]
        ranked = sorted(range(4), key=lambda b: (round(means[b], 12), b))
        for k in range(4):
            hits[k] += ranked[k] == order[k]
            sets[k] += set(ranked[: k + 1]) == set(order[: k + 1])
    found = certainty(samples(nll), resamples=40_000)
    assert found.order == tuple(order)
    assert found.rank_share == pytest.approx([h / 27 for h in hits], abs=0.02)
    assert found.set_share == pytest.approx([s / 27 for s in sets], abs=0.02)
    assert found.certain == (3,)
    assert found.gaps[0] == pytest.approx(math.exp((1.1 + 1.2 + 1.6) / 3 - (1.0 + 1.4 + 1.3) / 3))


def test_the_same_seed_gives_the_same_and_row_order_does_not_matter():
    rng = random.Random(1)
    rows = samples([[rng.gauss(b / 9, 1) for _ in range(6)] for b in range(BLOCKS)])
    shuffled = random.Random(2).sample(rows, len(rows))
    assert certainty(rows) == certainty(rows) == certainty(shuffled)


def test_noisy_rows_do_not_settle_the_order():
    rng = random.Random(5)
    nll = [[1 + 0.05 * b + rng.gauss(0, 0.5) for _ in range(4)] for b in range(BLOCKS)]
    found = calibration_small(samples(nll), [0, 7], 4)
    assert (
        "4 calibration rows are too few to determine the first 2 blocks to remove" in found.sentence
    )
    share = certainty(samples(nll), [0, 7]).set_share[1]
    assert share < 0.95
    assert f"picks the same 2 only {share:.0%} of the time" in found.sentence
    assert found.evidence["resamples with the same first 2"] == f"{share:.0%}"
    assert "--samples" in found.try_next


def test_blocks_far_apart_are_settled_by_the_same_rows():
    rng = random.Random(5)
    nll = [[1 + 5.0 * b + rng.gauss(0, 0.5) for _ in range(4)] for b in range(BLOCKS)]
    assert calibration_small(samples(nll), [0, 7], 4) is None


def test_rows_that_differ_alike_for_all_blocks_settle_the_order():
    # What a hard text adds to every block's loss says nothing against the order.
    level = [0.0, 5.0, 9.0, 2.0]
    nll = [[0.1 * b + extra for extra in level] for b in range(BLOCKS)]
    assert calibration_small(samples(nll)) is None


def test_blocks_that_cost_the_same_are_said_to():
    nll = [[1.0, 1.002, 0.998], [1.001, 1.0, 1.0], [1.0, 1.0, 1.0015], [4, 4, 4], [5, 5, 5]]
    found = calibration_small(samples(nll))
    assert "cost nearly the same" in found.try_next


def test_rows_needed_is_where_the_difference_stands_out_of_its_error():
    differences = [0.3, -0.1, 0.4, 0.2]
    nll = [[1.0] * 4, [1 + d for d in differences]]
    mean = sum(differences) / 4
    spread = (sum((d - mean) ** 2 for d in differences) / 3) ** 0.5
    expected = math.ceil((1.645 * spread / mean) ** 2)
    assert certainty(samples(nll)).rows_needed == (expected,)


def test_one_row_is_never_enough():
    found = calibration_small(samples([[1.0 * b] for b in range(BLOCKS)]))
    assert "single calibration row" in found.sentence


def test_losses_that_are_not_finite_are_silent():
    nll = [[1.0, math.inf], [2.0, 2.0], [3.0, 3.0]]
    assert calibration_small(samples(nll)) is None


# -------------------------------------------------------------------------------------- the run


def test_a_run_is_read_from_its_files(tmp_path):
    ppl = [9.0, 2, 3, 4, 5, 6, 7, 9]
    columns = ("block", "ppl", "taylor", "magnitude", "block_influence")
    rows = [[getattr(r, c) for c in columns] for r in table(ppl, [-v for v in ppl])]
    workspace.write_csv(tmp_path / "blocks.csv", columns, rows)
    rng = random.Random(5)
    nll = [[1 + 0.05 * b + rng.gauss(0, 0.5) for _ in range(4)] for b in range(BLOCKS)]
    rows = [[r.block, r.sample, r.nll] for r in samples(nll)]
    workspace.write_csv(tmp_path / "samples.csv", ("block", "sample", "nll"), rows)
    workspace.write_json(tmp_path / "summary.json", {"samples": 4})
    assert [f.key for f in of_run(tmp_path)] == ["criteria-disagree", "calibration-small"]
    assert of_run(tmp_path / "nothing") == []
    rows = [[r.block, r.sample, abs(r.nll)] for r in samples(nll) if r.block >= 0]
    workspace.write_csv(tmp_path / "divergences.csv", ("block", "sample", "kl"), rows)
    found = of_run(tmp_path)[-1]
    assert "too few to determine the first 2 blocks to remove by KL" in found.sentence
    close = [[0.02, 0.021, 0.019], [0.021, 0.02, 0.0202], [0.02, 0.02, 0.021], [4.0] * 3]
    found = calibration_small(samples(close), divergence=True)
    assert "(KL differs by 0.00033 nats)" in found.try_next


@pytest.mark.parametrize(("blocks", "expected"), [(2, []), (5, [0, 4]), (12, [0, 1, 2, 3, 10, 11])])
def test_protection_is_that_of_plans(blocks, expected):
    assert protected_of(blocks) == expected
