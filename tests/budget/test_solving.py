"""Solving for budgets against every choice there is, and what refuses."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from core.budget import known
from core.errors import DataError, DepthcutError, OptionError, PlanError
from core.prune import budgets
from core.prune.budgets import Library, Limits
from core.prune.version_results import WHOLE, Budget, VersionRow
from core.runs import workspace

ALL = (WHOLE, "drop", "no-attention", "no-mlp")


def library(seed=0, blocks=5, pairs=False):
    """A run of made-up versions, in which cheap is not the same as fast."""
    draw = random.Random(seed)
    rows = {}
    for block in range(blocks):
        for version in ALL:
            share = {WHOLE: 1.0, "drop": 0.0, "no-attention": 0.6, "no-mlp": 0.45}[version]
            kl = 0.0 if version == WHOLE else draw.uniform(0.05, 1.0)
            noise = draw.uniform(0.8, 1.2)
            rows[block, version] = VersionRow(
                block, version, kl, 2.0 + kl, share * noise, share * noise / 50,
                round(1000 * share), round(4000 * share), 48, 0 if "attention" in version else 600,
            )  # fmt: skip
    summary = Budget(
        blocks=blocks, measured=ALL[1:], batch=2, rest_prefill_s=0.5, rest_decode_s=0.02,
        rest_params=700, rest_weight_bytes=2800,
    )  # fmt: skip
    beyond = {pair: draw.uniform(-0.4, 0.6) for pair in itertools.combinations(range(blocks), 2)}
    return Library("run", summary, rows, beyond if pairs else {})


def naive(found, limits, protect=(0, 0), tokens=128):
    """The least KL of all choices that keep the limits; infinite if none does."""
    best = math.inf
    for choice in itertools.product(ALL, repeat=found.blocks):
        inner = range(protect[0], found.blocks - protect[1])
        if any(v != WHOLE for b, v in enumerate(choice) if b not in inner):
            continue
        if choice == ("drop",) * found.blocks:
            continue
        values = {n: budgets.value_of(found, n, choice, tokens) for n in limits.given}
        kept = all(
            values[n] >= v if n == "tokens_per_s" else values[n] <= v * (1 + 1e-9)
            for n, v in limits.given.items()
        )
        if kept:
            best = min(best, found.figures(choice, tokens).kl)
    return best


@pytest.mark.parametrize("pairs", [False, True])
def test_the_solution_is_the_best_of_all_choices(pairs):
    for seed in range(4):
        found = library(seed, pairs=pairs)
        dense = found.dense()
        exact = budgets.value_of(found, "params", ("drop", WHOLE, "no-mlp", WHOLE, WHOLE))
        for limits, protect in (
            (Limits(latency=0.8), (0, 0)),
            (Limits(latency=0.45), (0, 0)),
            (Limits(latency=0.6, params=int(0.7 * dense.params)), (1, 1)),
            (Limits(memory_gib=0.5 * dense.memory_bytes / budgets.GIB), (0, 0)),
            (Limits(params=int(exact)), (0, 0)),  # reached exactly
            (Limits(tokens_per_s=1.4 * dense.tokens_per_s, params=4000), (0, 1)),
        ):
            solved = budgets.solve(found, limits, protect=protect)
            assert solved.optimal
            assert solved.figures.kl == pytest.approx(naive(found, limits, protect), abs=1e-9)
            assert solved.figures == found.figures(solved.choice)
            for name, value in limits.given.items():
                reached = budgets.value_of(found, name, solved.choice)
                sign = -1 if name == "tokens_per_s" else 1
                assert sign * reached <= sign * value * (1 + sign * 1e-8)


def test_without_pairs_the_gain_of_a_joint_cut_is_not_seen():
    apart, joint = library(1), library(1, pairs=True)
    limits = Limits(params=2400)
    choice = budgets.solve(apart, limits).choice
    together = budgets.solve(joint, limits)
    assert together.figures.kl < joint.figures(choice).kl


def test_a_budget_out_of_reach_names_the_least_possible():
    found = library()
    low = min(
        budgets.value_of(found, "latency", choice)
        for choice in itertools.product(ALL, repeat=5)
        if choice != ("drop",) * 5
    )
    assert budgets.least(found, "latency") == pytest.approx(low)
    with pytest.raises(PlanError) as error:
        budgets.solve(found, Limits(latency=low - 0.001))
    told = float(str(error.value).split("the least possible is ")[1].split(",")[0])
    assert low <= told < low + 0.001
    budgets.solve(found, Limits(latency=told))
    most = budgets.least(found, "tokens_per_s", protect=(1, 1))
    with pytest.raises(PlanError, match="the most possible is"):
        budgets.solve(found, Limits(tokens_per_s=1.01 * most), protect=(1, 1))


def test_budgets_that_only_work_apart_are_named_together():
    found, rows = library(blocks=2), {}
    sizes = {WHOLE: (9.0, 900), "drop": (0.0, 0), "no-attention": (1.0, 800), "no-mlp": (8.0, 100)}
    for (block, version), row in found.rows.items():
        seconds, params = sizes[version]
        kl = math.nan if version == "drop" else row.kl
        rows[block, version] = dataclasses.replace(
            row, kl=kl, prefill_s=seconds, decode_s=0.0, params=params
        )
    both = dataclasses.replace(found, rows=rows)
    options = {"output_tokens": 1, "protect": (0, 1)}
    assert budgets.solve(both, Limits(latency=0.6), **options).choice[0] == "no-attention"
    assert budgets.solve(both, Limits(params=1800), **options).choice[0] == "no-mlp"
    with pytest.raises(PlanError, match="all these budgets at once") as error:
        budgets.solve(both, Limits(latency=0.6, params=1800), **options)
    assert "--latency 0.5676, --params 1,700" in str(error.value)


@pytest.mark.parametrize(
    ("limits", "options", "says"),
    [
        (Limits(), {}, "No budget is given"),
        (Limits(latency=1.0), {}, "not below the dense model's"),
        (Limits(params=0), {}, "--params must be above 0"),
        (Limits(latency=0.5), {"output_tokens": 0}, "--output-tokens must be at least 1"),
        (Limits(latency=0.5), {"protect": (3, 2)}, "leaves none to change"),
        (Limits(params=10**9), {}, "The whole model keeps this budget already"),
    ],
)
def test_what_means_nothing_is_refused(limits, options, says):
    with pytest.raises(DepthcutError, match=says) as error:
        budgets.solve(library(), limits, **options)
    assert isinstance(error.value, OptionError | PlanError)


def test_versions_that_were_not_finite_are_never_chosen():
    found = library()
    rows = dict(found.rows)
    for block in range(5):
        for version in ("drop", "no-mlp"):
            rows[block, version] = dataclasses.replace(rows[block, version], kl=math.nan)
    left = dataclasses.replace(found, rows=rows)
    solved = budgets.solve(left, Limits(latency=0.8))
    assert set(solved.choice) <= {WHOLE, "no-attention"}


def test_a_predicted_kl_is_corrected_by_plans_that_were_measured():
    """Measured = predicted to the power of 1.5, times 3: a line in logarithms."""
    curve = lambda p: 3 * p**1.5  # noqa: E731
    checks = tuple((p, curve(p)) for p in (0.4, 0.05, 0.1, 1.6, 0.8))
    found = dataclasses.replace(library(), checks=checks)
    for predicted in (0.05, 0.07, 0.3, 1.6):
        assert budgets.corrected_kl(found, predicted) == pytest.approx(curve(predicted))
    factor = curve(1.6) / 1.6
    assert budgets.corrected_kl(found, 3.2) == pytest.approx(3.2 * factor)  # the nearest's
    # each inner plan lies on the others' line; both ends take their neighbour's factor
    assert budgets.correction_error(found) == pytest.approx(0, abs=1e-9)
    assert budgets.corrected_kl(found, 0.0) is None
    for other in ({"checks": checks[:3]}, {"pairs": {(0, 1): 0.1}}):
        assert budgets.corrected_kl(dataclasses.replace(found, **other), 0.1) is None


def test_pairs_of_another_text_are_refused_and_not_offered(tmp_path):
    folder = tmp_path / "pairs"
    (folder / ".run").mkdir(parents=True)
    about = {"checkpoint_key": "k", "objective": "kl", "calibration": "/x/a.txt"}
    workspace.write_json(folder / "summary.json", {**about, "calibration_content": "a"})
    columns = ("block_a", "block_b", "nll", "kl", "interaction")
    workspace.write_csv(folder / "pairs.csv", columns, [(1, 2, 2.0, 0.5, 0.3)])
    workspace.write_json(folder / ".run" / "spec.json", {"command": "search", "spec": {}})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    same = Budget(checkpoint_key="k", blocks=5, calibration="/x/a.txt", calibration_content="a")
    other = dataclasses.replace(same, calibration="demo", calibration_content="b")
    assert budgets._pairs(folder, same) == {(1, 2): 0.3}
    with pytest.raises(DataError, match="were measured on a.txt, the budget run on demo"):
        budgets._pairs(folder, other)
    here = workspace.Workspace(tmp_path)
    assert known.with_pairs(here, same).id == "pairs"
    assert known.with_pairs(here, other) is None
