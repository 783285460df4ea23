"""Live curves: thinned without losing extremes, and read incrementally."""

import json
import os
import random
import time
from dataclasses import replace

import pandas as pd
import pytest

from core.charts import retrain as charts
from core.retrain import history
from core.retrain.log import MetricLog
from core.retrain.results import Evaluation, Step, Summary
from core.runs import dry_run


@pytest.mark.parametrize("count", [1, 2, 1500, 1501, 4000, 100_000])
def test_thinning_keeps_the_ends_and_every_spike(count):
    rng = random.Random(count)
    values = [2 + rng.gauss(0, 0.1) for _ in range(count)]
    spikes = {count // 3: 50.0, 2 * count // 3: -7.0}
    for place, value in spikes.items():
        values[place] = value
    kept = charts.thin(values)
    assert len(kept) <= charts.MOST_POINTS
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert kept[-1] == count - 1
    assert max(values[i] for i in kept) == max(values)
    assert min(values[i] for i in kept) == min(values)
    if count <= charts.MOST_POINTS:
        assert kept == list(range(count))
    # Not only the global extremes: those of every tenth of the run are drawn too.
    for part in range(10):
        low, high = count * part // 10, count * (part + 1) // 10
        if high - low > 1000:
            inside = [values[i] for i in kept if low <= i < high]
            assert max(inside) == pytest.approx(max(values[low:high]), abs=0.05)


def test_thinning_of_gaps():
    assert charts.thin([None] * 5000)
    values = [None if i % 3 else float(i) for i in range(9000)]
    kept = charts.thin(values)
    assert 8997 in kept
    assert len(kept) <= charts.MOST_POINTS


def test_smoothing_is_an_unbiased_moving_average():
    assert charts.smooth([4.0] * 30, 10) == pytest.approx([4.0] * 30)
    values, alpha = [1.0, 5.0, 2.0, 8.0], 2 / (3 + 1)
    top = bottom = 0.0
    expected = []
    for value in values:
        top, bottom = value + (1 - alpha) * top, 1 + (1 - alpha) * bottom
        expected.append(top / bottom)
    assert charts.smooth(values, 3) == pytest.approx(expected)


def metric_lines(steps, start=1):
    lines = []
    for step in range(start, start + steps):
        lines.append({"step": step, "loss": 3 / step, "lr": 1e-3, "grad_norm": 0.5,
                      "tokens_per_s": 100.0, "memory_mib": 5.0, "tokens": step})  # fmt: skip
        if step % 1000 == 0:
            lines.append({"event": "eval", "step": step, "heldout_loss": 1.0, "recovered": 0.5,
                          "heldout_loss_dense": 0.5, "heldout_loss_before": 1.5})  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_the_log_is_read_incrementally_and_again_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    assert not log.update()
    whole = metric_lines(12)
    path.write_text(whole + '{"step": 13, "lo')
    assert log.update()
    assert [s.step for s in log.steps] == list(range(1, 13))
    version = log.version
    assert not log.update()  # half a line is not read
    assert log.version == version
    with path.open("a") as handle:
        handle.write('ss": 0.25}\n{"event": "finding", "kind": "flat", "message": "Flat."}\nno\n')
    assert log.update()
    assert log.steps[-1].step == 13
    assert log.steps[-1].loss == 0.25
    assert log.steps[-1].lr is None
    assert [f.kind for f in log.findings] == ["flat"]
    other = tmp_path / "new"
    other.write_text(metric_lines(5))
    os.replace(other, path)  # as trim_metrics does
    assert log.update()
    assert [s.step for s in log.steps] == [1, 2, 3, 4, 5]
    assert log.findings == []


def test_a_hundred_thousand_steps_are_quick(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(metric_lines(100_000))
    log = MetricLog(path)
    log.update()
    assert len(log.steps) == 100_000
    with path.open("a") as handle:
        handle.write(metric_lines(1, start=100_001))
    began = time.process_time()
    assert log.update()
    steps, losses = [s.step for s in log.steps], [s.loss for s in log.steps]
    figure = charts.loss(steps, losses, log.evaluations, total=100_001)
    took = time.process_time() - began
    assert took < 1.0
    drawn = sum(len(trace.x) for trace in figure.data)
    assert drawn < 3 * charts.MOST_POINTS
    raw, means, evaluations, dense, pruned = figure.data
    assert raw.line.width < means.line.width
    assert raw.y[0] == 3.0
    assert raw.x[-1] == 100_001
    assert evaluations.marker.symbol == "diamond"
    assert list(evaluations.x) == list(range(1000, 100_001, 1000))
    assert (dense.y[0], pruned.y[0]) == (0.5, 1.5)
    assert len(figure.to_json()) < 400_000


def test_bars_of_several_variants_show_the_table():
    table = pd.DataFrame(
        {"name": ["a", "b", "c"], "method": ["lora", "full", "lora"],
         "recovered": [0.5, 0.75, None]}
    )  # fmt: skip
    figure = charts.recovered_bars(table)
    drawn = {name: share for bar in figure.data for name, share in zip(bar.y, bar.x, strict=True)}
    assert drawn == {"a": 0.5, "b": 0.75}
    assert len({bar.marker.pattern.shape for bar in figure.data}) == 2  # not colour alone
    table["recovered by KL"] = [0.1, None, 0.2]
    *bars, by_kl = charts.recovered_bars(table).data
    assert len(bars) == 2
    assert dict(zip(by_kl.y, by_kl.x, strict=True)) == {"a": 0.1, "c": 0.2}


def test_a_recipes_chart_has_its_tables_values_and_spread():
    table = pd.DataFrame(
        {"variant": ["x", "x", "y"], "evaluated_on": ["a", "mean", "a"], "value": [1.0, 2.0, 3.0],
         "spread": [None, 0.5, None]}
    )  # fmt: skip
    figure = charts.recipe(table, "value", "loss")
    assert [list(bar.y) for bar in figure.data] == [[1.0, 2.0], [3.0]]
    assert list(figure.data[0].error_y.array)[1] == 0.5
    # Over the colour, not instead of it: a bar must not vanish on its background.
    assert {bar.marker.pattern.fillmode for bar in figure.data} == {"overlay"}
    assert figure.layout.yaxis.title.text == "loss"


def test_the_sample_marks_tokens_with_a_loss_and_escapes():
    text = history.sample_html(
        [{"masked": True, "text": "<b>given</b>"}, {"masked": False, "text": "learned"}]
    )
    assert "&lt;b&gt;given" in text
    given, learned = text.split("</span>")[:2]
    assert "italic" in given
    assert "underline" not in given
    assert "border-bottom" in learned


def test_the_verdict_says_what_is_not_stated():
    base = Summary(heldout_loss_before=1.5, heldout_loss_after=1.25, heldout_loss_dense=1.0)
    assert "50% of the gap" in history.verdict(replace(base, recovered=0.5))
    small = history.verdict(replace(base, heldout_loss_dense=1.48))
    assert "too small to report" in small
    alone = history.verdict(replace(base, heldout_loss_dense=None))
    assert "Without a dense model" in alone


def test_a_dry_run_runs_beside_the_page(tiny_gqa, tasks, tmp_path):
    from core.retrain.spec import RetrainSpec
    from core.runs.workspace import Workspace

    def answer(**options):
        spec = RetrainSpec(
            checkpoint=str(tiny_gqa), data=tasks, out="x", template="plain", cutoff=128, **options
        )
        asked = dry_run.ask(known, "retrain", spec, Workspace(tmp_path))
        assert (asked.plan, asked.error) == (None, "")  # does not wait for the process
        deadline = time.monotonic() + 60
        while not asked.poll():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert dry_run.ask(known, "retrain", spec, Workspace(tmp_path)) is asked
        return asked

    known = {}
    good = answer()
    assert good.plan["rows"] == 54
    assert len(good.plan["samples"]) == 8
    assert set(history.tiles(good.plan)) >= {"Trainable", "Tokens", "Steps", "Time"}
    bad = answer(steps=1, epochs=1.0)
    assert bad.plan is None
    assert bad.error.startswith("Both --steps and --epochs")
    other = RetrainSpec(checkpoint=str(tiny_gqa), data=tasks, out="x", cutoff=64)
    left = dry_run.ask(known, "retrain", other, Workspace(tmp_path))
    dry_run.ask(known, "retrain", replace(other, cutoff=32), Workspace(tmp_path))
    assert left.process.returncode is not None  # only the newest dry run keeps running
    again = dry_run.ask(known, "retrain", other, Workspace(tmp_path))
    assert again is not left  # and one that was stopped is started again
    theirs = {}
    assert (
        dry_run.ask(theirs, "retrain", other, Workspace(tmp_path)) is again
    )  # one for all sessions
    assert again.wanted_by == 2
    dry_run.ask(known, "retrain", replace(other, cutoff=32), Workspace(tmp_path))
    assert again.wanted_by == 1  # and it goes on for the other one
    process = again.process
    del again
    known.clear()
    theirs.clear()  # both sessions have gone
    assert process.returncode is not None


def test_recovery_is_drawn_against_tokens():
    steps = [Step(step=s, tokens=100 * s) for s in (1, 2, 3)]
    evaluations = [
        Evaluation(step=0, recovered=0.0, recovered_kl=None),
        Evaluation(step=2, recovered=0.25, recovered_kl=0.125),
        Evaluation(step=3, recovered=None, recovered_kl=0.5),
        Evaluation(step=9, recovered=0.75),  # its step was not read
    ]
    found = history.by_tokens(steps, evaluations)
    assert found == {"loss": [(0.0, 0.0), (200.0, 0.25)], "KL": [(200.0, 0.125), (300.0, 0.5)]}
