"""Rows of benchmark runs: speed-up, newest first, device mixtures; estimates; noise."""

from __future__ import annotations

import random
import statistics

import pytest
import study_helpers as made

from core.benchmark import analytic
from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.compare import measured, published
from core.compare.candidates import Candidate, nearest
from core.compare.scene import Scene
from core.compare.speed import speed_up
from core.prune import depth
from core.prune.outlook import outlook
from core.runs.workspace import Workspace
from core.study import study


def point(name, batch, seconds, output=8):
    return {
        "variant": name, "batch_size": batch, "input_tokens": 12, "output_tokens": output,
        "latency_s_mean": seconds, "oom": seconds is None,
    }  # fmt: skip


def test_the_newer_of_two_measurements_counts_and_speedup_is_over_dense(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    dense = made.checkpoint(tmp_path / "dense")
    total = headers.inspect(dense).parameters
    cut = made.pruned(tmp_path / "ws", "cut", dense, [1], 1, total)
    both = {"dense": str(dense), "cut": str(cut)}
    old = [point("dense", 1, 8.0), point("cut", 1, 5.0), point("cut", 4, None)]
    made.benchmark(tmp_path / "ws", "old", 2, both, old, device_name="x")
    made.benchmark(tmp_path / "ws", "new", 3, {"cut": str(cut)}, [point("cut", 1, 4.0)],
                   device_name="y")  # fmt: skip
    found = study(Workspace(), str(dense))
    rows = measured.with_speedup(measured.costs_of(found.benchmarks), str(dense))
    kept = {(r.id, r.batch_size): (r.run, r.speedup) for r in rows}
    assert kept == {
        (str(dense), 1): ("old", 1.0), ("cut", 1): ("new", 2.0), ("cut", 4): ("old", None),
    }  # fmt: skip
    said = measured.mixed_settings(found.benchmarks)
    assert said.startswith("new was measured on cpu, y, float32, old on cpu, x")
    assert measured.mixed_settings(found.benchmarks[:1]) == ""


def test_an_estimated_plan_costs_what_the_cut_checkpoint_would(tiny_dir, tmp_path):
    folder = tiny_dir("gqa")
    depth.prune(folder, [1, 3], tmp_path / "cut")
    info, real = headers.inspect(folder), headers.inspect(tmp_path / "cut")
    shapes = analytic.without(info, [1, 3])
    assert (shapes.parameters, shapes.parts) == (real.parameters, real.parts)
    rates = analytic.Rates(1e9, 1e11, 1e-4, 1e-3, 1e-8)
    for cell in ((1, 12, 8), (64, 12, 32)):
        guess = measured.estimate(shapes, rates, cell, "float32")
        assert guess == measured.estimate(real, rates, cell, "float32")
        assert guess.latency_s_mean == pytest.approx(
            guess.first_token_s + guess.per_token_s * (cell[2] - 1)
        )
        assert guess.tokens_per_s == pytest.approx(cell[0] * cell[2] / guess.latency_s_mean)
    assert measured.estimate(shapes, None, (1, 12, 8), "float32").latency_s_mean is None


def cut(key, series, ratio, is_plan=False):
    return Candidate(key, key, "depth", method_label=series, ratio=ratio, is_plan=is_plan)


def test_the_ratio_picks_one_of_every_series():
    dense = Candidate("dense", "dense", "dense", method_label="dense", ratio=0.0)
    pairs = (("a1", 0.1), ("a2", 0.3), ("b1", 0.22))
    found = [dense, *(cut(key, key[0].upper(), ratio) for key, ratio in pairs)]
    assert [c.id for c in nearest(found, 0.12)] == ["dense", "a1", "b1"]
    assert [c.id for c in nearest(found, 0.25)] == ["dense", "a2", "b1"]
    planned = [*found, cut("p1", "P", 0.04, True), cut("p2", "P", 0.08, True)]
    assert [c.id for c in nearest(planned, 0.12)] == ["dense", "a1", "b1", "p2"]
    assert [c.id for c in nearest(planned, 0.25)] == ["dense", "a2", "b1"]


def test_the_page_begins_at_a_ratio_that_was_measured():
    found = tuple(cut(f"a{n}", "A", r) for n, r in enumerate((0.1, 0.1, 0.1, 0.3)))
    rows = tuple(measured.Cost(id=n, variant=n, batch_size=1) for n in ("dense", "a3"))
    assert Scene(None, None, (), found, rows).usual_ratio == 0.3
    assert Scene(None, None, (), found).usual_ratio == 0.1
    plans = tuple(cut(f"p{n}", "P", n / 10, True) for n in range(1, 5))
    assert Scene(None, None, (), plans).usual_ratio == 0.2


def test_noise_covers_what_two_equal_models_differ_by():
    rng = random.Random(5)
    inside = 0
    for _ in range(200):
        one, two = ({v: [rng.gauss(1.0, 0.1) for _ in range(10)] for v in "12"} for _ in range(2))
        found = speed_up(one, two)
        inside += abs(found.factor - 1) <= found.noise
    assert inside > 185
    drifted = speed_up({"1": [1.0] * 5, "2": [1.4] * 5}, {"1": [1.0] * 5, "2": [1.0] * 5})
    assert drifted.noise >= 0.2 / 1.4
    faster = speed_up({"1": [2.0, 2.01, 2.02]}, {"1": [1.0, 1.01, 1.0]})
    assert faster.factor == pytest.approx(statistics.median([2.0, 2.01, 2.02]) / 1.0)
    assert "no change" in str(drifted) or drifted.factor > 1.1


def test_published_figures_stay_with_their_own_dense_row():
    assert published.sources("wikitext2_ppl") == ["authors' repository", "FLAP's README"]
    assert published.sources("speedup") == ["SLEB's README"]
    rows = {r["label"]: r["over_dense"] for r in published.over_dense("authors' repository")}
    assert rows["LLaMA-7B 5.5B PPL + LoRA"] == pytest.approx(17.66 / 12.62)
    assert rows["Vicuna-7B 5.5B Taylor+"] == pytest.approx(20.97 / 17.13)
    assert not any("13B" in label for label in rows)  # its dense row is not given
    tasks = {
        r["label"]: r["over_dense"] for r in published.over_dense("FLAP's README", "average_7")
    }
    assert tasks["LLaMA-7B FLAP 20%"] == pytest.approx(62.08 / 63.25)
    for row in published.figures():
        assert row["source"]
        if row["parameters"] and row["model"] == "LLaMA-7B" and row["ratio"]:
            assert row["ratio"] == pytest.approx(1 - row["parameters"] / 6738415616, abs=1e-4)


def test_the_prune_pages_figures_are_the_estimates_of_each_plan(tiny_dir):
    from core.ui import prune_cost

    info = headers.inspect(tiny_dir("gqa"))
    rates = analytic.Rates(1e9, 1e11, 1e-4, 1e-3)
    table = {r[""]: r for r in prune_cost.rows(info, {"A": Removal((1, 3))}, rates, 4, "float32")}
    dense = analytic.latency_s(info, rates, 4, 12, 128)
    cut = analytic.latency_s(analytic.without(info, (1, 3)), rates, 4, 12, 128)
    assert table["speed-up"] == {
        "": "speed-up",
        "dense": "1.00 x",
        "plan A": f"{dense / cut:.2f} x",
    }
    assert table["latency of 128 tokens"]["plan A"] == f"{1000 * cut:.3g} ms"
    unknown = prune_cost.rows(info, {"A": Removal()}, None, 4, "float32")
    assert [r[""] for r in unknown] == ["peak memory, 140 tokens"]
    # never below the weights and the cache that the page shows for the same context
    for context in (2, 100, 256):
        (peak,) = prune_cost.rows(info, {"A": Removal((1,))}, None, 4, "float32", context)
        for name, drop in (("dense", ()), ("plan A", (1,))):
            less = outlook(info, drop, batch=4, context=context, dtype="float32").total_bytes
            assert float(peak[name].split()[0].replace(",", "")) >= 0.999 * less / 2**20


def test_estimates_follow_what_was_measured_of_the_dense_model():
    def cost(**values):
        return measured.Cost(variant="x", batch_size=2, input_tokens=12, output_tokens=8, **values)

    guess = cost(peak_memory_mib=80.0, latency_s_mean=1.0, latency_s_p50=1.0, tokens_per_s=16.0)
    same = cost(peak_memory_mib=100.0, latency_s_mean=2.0, latency_s_p50=2.0)
    real = cost(peak_memory_mib=120.0, latency_s_mean=3.0, latency_s_p50=2.5)
    found = measured.rescaled(guess, real, same)
    assert (found.peak_memory_mib, found.latency_s_mean, found.latency_s_p50) == (96.0, 1.5, 1.25)
    assert found.tokens_per_s == pytest.approx(16 / 1.5)
    assert measured.rescaled(guess, None, None) == guess


def test_a_slow_run_moves_no_speed_up():
    dense, cut = (
        measured.Cost(variant=n, id=n, batch_size=1, input_tokens=12, output_tokens=8,
                      latency_s_mean=mean, latency_s_p50=middle)
        for n, mean, middle in (("dense", 2.0, 2.0), ("cut", 1.9, 1.6))
    )  # fmt: skip
    assert [c.speedup for c in measured.with_speedup([dense, cut], "dense")] == [1.0, 1.25]


def test_a_charts_own_page_needs_nothing_from_elsewhere():
    import plotly.graph_objects as go

    from core.charts import compare as charts

    figure = go.Figure(go.Scatter(x=[1, 2], y=[3.25, 4.5], name="one"))
    page = charts.standalone(figure, "Measured on a processor.")
    assert "Measured on a processor." in page
    assert "3.25" in page
    assert "<script src" not in page
    assert [(r["x"], r["y"], r["series"]) for r in charts.data_of(figure)] == [
        (1, 3.25, "one"), (2, 4.5, "one"),
    ]  # fmt: skip
