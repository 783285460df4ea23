"""The time left: of a retraining with its evaluations, a benchmark, and work in parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from core.benchmark.duration import START_S, Work, point_s
from core.benchmark.protocol import Cell
from core.retrain.spec import RetrainSpec, settings_of
from core.runs import status
from core.runs.progress import InParts, Progress


@pytest.mark.parametrize(("steps", "every"), [(100, 10), (30, 7), (5, 1)])
def test_a_retraining_counts_its_evaluations(steps, every):
    trainer = pytest.importorskip("core.retrain.trainer")
    spec = RetrainSpec(checkpoint="x", data="x", out="x", steps=steps, eval_every=every)
    settings = settings_of(spec, 1000)
    for step in range(1, steps + 1):
        left = 0.0  # walk to the end, as `on_step_end` does: evaluate, then take the next step
        for later in range(step, steps + 1):
            left += 2.0 if later > step else 0.0
            left += 9.0 if later % every == 0 or later == steps else 0.0
        assert trainer.time_left(step, settings, 2.0, 9.0, after=3) == left + 27.0


def test_evaluations_take_at_most_a_tenth_of_the_time_by_default():
    trainer = pytest.importorskip("core.retrain.trainer")
    spec = RetrainSpec(checkpoint="x", data="x", out="x", steps=100)
    settings = settings_of(spec, 1000)
    assert settings.eval_every == 10
    before = trainer.Held(3.0)
    watcher = trainer.StepWatcher(
        settings, Progress(), lambda: trainer.Held(2.0), dense=None, before=before, clip=0.0,
        memory=lambda: 0.0,
    )  # fmt: skip
    watcher.evaluation_s, made = 9.0, []  # a step takes 2 s
    for step in range(1, 101):
        watcher.training_s = 2.0 * step
        if step < 100 and watcher._is_time_to_evaluate(step):
            made.append(step)
            watcher.evaluations_s += 9.0
    assert made == [50, 90]
    # 140 s of training; at most 14 s of evaluations on the way, then the last one
    assert trainer.time_left(30, settings, 2.0, 9.0) == 140.0 + 9.0 + 14.0
    # evaluations that take little all take place
    assert trainer.time_left(30, settings, 2.0, 0.1) == pytest.approx(140.0 + 0.8)


def test_a_benchmark_weighs_its_points_and_says_when_the_limit_is_too_short():
    assert point_s(1.0, runs=15, limit_s=None) == 15.0
    assert point_s(1.0, runs=15, limit_s=5.0) == 5.0
    assert point_s(1.0, runs=15, limit_s=0.5) == 3.0
    info = SimpleNamespace(parameters=250_000_000)  # a token a tenth of a second, assumed
    cells = [Cell(1, 10), Cell(1, 40)]  # generations of 1 s and of 4 s
    work = Work([("a", info), ("b", info)], cells, rates=None, input_tokens=12, runs=20, warmup=10,
                visits=2, point_limit_s=6.0)  # fmt: skip
    assert work.total_s == 2 * 2 * (START_S + 6.0 + 12.0)
    assert work.least_s == 2 * 2 * (3.0 + 12.0)
    assert work.left_s(1.0) is None
    work.finish("a", cells[:1])
    done = START_S / 2 + 6.0
    assert work.left_s(2 * done) == pytest.approx(2 * (work.total_s - done))


def test_parts_are_one_whole():
    seen = []

    class Recorder(Progress):
        def step(self, done, total, message="", *, left_s=None):
            seen.append((done, total, message))

    parts = InParts(Recorder(), [3.0, 1.0])
    for name in ("long", "short"):
        parts.begin()
        parts.step(5, 10, name)
        parts.step(10, 10, name)
    assert seen == [(750, 2000, "long"), (1500, 2000, "long"), (1750, 2000, "short"),
                    (2000, 2000, "short")]  # fmt: skip


def test_what_the_run_says_of_itself_counts(monkeypatch):
    monkeypatch.setattr(status.time, "monotonic", lambda: 110.0)
    step = {"done": 1, "total": 4, "first": 1, "since_clock": 100.0, "at_clock": 100.0}
    assert status.eta_s({"progress": step}) is None
    assert status.eta_s({"progress": {**step, "left_s": 30.0}}) == 20.0
    assert status.eta_s({"progress": {**step, "left_s": 5.0}}) == 0.0
    assert status.eta_s({"progress": {**step, "left_s": status.UNKNOWN_S}}) is None
