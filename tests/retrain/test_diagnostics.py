"""Every finding: one case that triggers it, and one that does not."""

import math
import random

import pytest

from core.retrain import diagnostics
from core.retrain.diagnostics import (
    Watch,
    beyond_dense,
    largest_that_fits,
    not_finite,
    pruned_too_hard,
)


def feed(losses, norms=None, dense=None):
    watch = Watch(dense)
    norms = norms or [1.0] * len(losses)
    found = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        found += watch.feed(step, loss, norm)
    return watch, found


def falling(count=100):
    rng = random.Random(1)
    return [3 * math.exp(-step / 40) + 1 + rng.gauss(0, 0.1) for step in range(count)]


def test_not_finite():
    assert not_finite(3, math.nan, 1.0).stop
    assert "gradient norm became inf at step 3" in not_finite(3, 1.0, math.inf).message
    assert not_finite(3, 1.0, 1.0) is None


def test_a_healthy_run_is_silent():
    watch, found = feed(falling(), [random.Random(i).uniform(0.5, 5) for i in range(100)])
    assert found == []
    assert watch.evaluated(100, before=4.0, loss=1.3) == []


def test_rising_loss_stops():
    _, found = feed(falling(60) + [2.0 + 0.05 * i for i in range(40)])
    assert [(f.kind, f.stop) for f in found] == [("rising", True)]
    assert "at best" in found[0].message


def test_exploding_gradient_needs_several_steps_in_a_row():
    usual = [random.Random(i).uniform(0.5, 2) for i in range(60)]
    _, once = feed([1.0] * 61, [*usual, 1e4])
    _, often = feed([1.0] * 63, [*usual, 1e4, 1e4, 1e4])
    assert once == []
    assert [(f.kind, f.stop) for f in often] == [("exploding", True)]


def test_flat_loss_warns_only_if_there_is_something_to_learn():
    watch, found = feed([2.0] * 50, dense=1.0)
    assert found == []
    flat = watch.evaluated(50, before=2.0, loss=2.0)
    assert [(f.kind, f.stop) for f in flat] == [("flat", False)]
    assert watch.evaluated(60, before=2.0, loss=2.0) == []  # reported once
    near, _ = feed([2.0] * 50, dense=1.9)
    assert near.evaluated(50, before=2.0, loss=2.0) == []
    short, _ = feed([2.0] * 10, dense=1.0)
    assert short.evaluated(10, before=2.0, loss=2.0) == []


@pytest.mark.parametrize(
    ("method", "gap", "recovered", "found"),
    [
        ("lora", 3.0, None, True),
        ("lora", 1.0, None, False),
        ("continued", 3.0, None, False),
        ("lora", None, None, False),
        ("lora", 1.5, 0.2, True),
        ("lora", 1.5, 0.8, False),
        ("lora", 0.3, 0.1, False),
    ],
)
def test_pruned_too_hard(method, gap, recovered, found):
    finding = pruned_too_hard(method, gap, recovered)
    assert bool(finding) == found
    if found:
        assert "--method continued" in finding.hint
        assert "fewer blocks" in finding.hint


@pytest.mark.parametrize(
    ("gap", "recovered", "found"),
    [
        (0.1, 8.0, True),
        (0.1, 1.02, False),
        (0.1, 0.8, False),
        (None, None, False),
        (0.01, None, False),
    ],
)
def test_better_than_the_dense_model_is_not_recovery(gap, recovered, found):
    finding = beyond_dense(gap, recovered)
    assert bool(finding) == found
    if found:
        assert "0.70 nats below the dense model's" in finding.message  # 7 times 0.1 nats
        assert "--also" in finding.hint
        assert not finding.stop
        assert "no longer measures recovery from pruning" in str(finding)


@pytest.mark.parametrize(("below", "limit"), [(8, 5), (8, 7), (64, 1), (2, 1), (8, 0), (1, 0)])
def test_largest_that_fits(below, limit):
    tried = []

    def fits(count):
        tried.append(count)
        return count <= limit

    assert largest_that_fits(below, fits) == limit
    assert len(tried) <= math.log2(below) + 1


def test_out_of_memory_names_what_fits():
    assert "--micro-batch 3" in diagnostics.out_of_memory(8, 256, 3).hint
    assert "Not even one row" in diagnostics.out_of_memory(8, 256, 0).hint


def test_a_loss_that_still_falls_asks_for_a_longer_training():
    """A run of 30 steps that recovered 12% is too short; one that has converged is too hard."""
    found = []
    for losses in ([3.0, 2.99, 2.97, 2.94, 2.91, 2.88], [3.0, 2.9, 2.885, 2.88, 2.88, 2.88]):
        watch = Watch(2.0)
        for step, loss in enumerate(losses):
            watch.evaluated(6 * step, 3.0, loss)
        found.append(pruned_too_hard("lora", 1.0, 0.12, falling=watch.is_falling(), steps=30).hint)
    assert found[0] == "Train longer: --steps 120, or a larger --lr."
    assert found[1].startswith("Try --method continued")


@pytest.mark.parametrize(
    ("recovered", "by_kl", "found"),
    [
        (0.6, 0.13, True),
        (0.47, 0.29, True),
        (0.3, 0.25, False),
        (0.2, 0.4, False),
        (-0.1, -0.4, False),
        (0.2, -0.1, True),
        (0.6, None, False),
    ],
)
def test_a_gain_by_adaptation_is_named(recovered, by_kl, found):
    finding = diagnostics.adapted(recovered, by_kl)
    assert bool(finding) == found
    if finding:
        assert "adaptation to the training text" in finding.message
