"""The Prune page without a browser: what it shows against the CSV files and plain arithmetic."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from core.benchmark import analytic
from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.importance.estimate import block_flops, head_flops
from core.prune.plan import choose, default_protection
from core.prune.scores import load
from core.runs import workspace
from core.ui import prune_pad
from core.words import size

ROOT = Path(__file__).parents[2]
PPL = [90.0, 9.5, 8.0, 8.25, 20.0]
DENSE = 7.5


@pytest.fixture
def scored(tmp_path, monkeypatch, tiny_gqa):
    """A workspace with one finished importance run of the tiny checkpoint."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    folder = tmp_path / "scores"
    (folder / ".run").mkdir(parents=True)
    spec = {"checkpoint": str(tiny_gqa), "out": str(folder)}
    workspace.write_json(folder / ".run" / "spec.json", {"command": "importance", "spec": spec})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    text = {"calibration": "demo", "samples": 4, "length": 32, "seed": 7, "dtype": "float32"}
    key = headers.inspect(tiny_gqa).key
    summary = {"checkpoint_key": key, "dense_ppl": DENSE, "device": "cpu", **text}
    workspace.write_json(folder / "summary.json", summary)
    columns = ("block", "ppl", "taylor")
    rows = [(b, p, 10.0 - b) for b, p in enumerate(PPL)]
    workspace.write_csv(folder / "blocks.csv", columns, rows)
    return folder


def open_page(tiny_gqa, **query):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    for name, value in {"model": str(tiny_gqa), **query}.items():
        at.query_params[name] = value
    at.session_state["curve_form"] = True  # the form is open
    at.switch_page("pages/prune.py").run()
    assert not at.exception, at.exception
    return at


def figure(at, number):
    return json.loads(at.get("plotly_chart")[number].proto.spec)


def command(at):
    return next(c.value for c in at.code if " prune " in c.value)


def cell(at, fact, column):
    return at.table[0].value.loc[fact, column]


def test_bars_are_the_numbers_of_the_csv_file(scored, tiny_gqa):
    at = open_page(tiny_gqa, drop="3,2")
    bars = figure(at, 0)["data"][0]
    with (scored / "blocks.csv").open() as handle:
        values = [float(row["ppl"]) for row in csv.DictReader(handle)]
    assert bars["y"] == values == PPL
    assert [b for b, kind in bars["customdata"] if kind == "dropped"] == [2, 3]
    assert [b for b, kind in bars["customdata"] if kind == "protected"] == [0, 4]
    assert command(at).startswith(f"python -m core prune {tiny_gqa} --drop 3,2 ")


def test_sizes_follow_the_selection(scored, tiny_gqa):
    at = open_page(tiny_gqa, drop="3")
    info = headers.inspect(tiny_gqa)
    left = info.parameters - info.block_parameters[3]
    assert cell(at, "parameters", "plan A") == f"{left:,}"
    assert cell(at, "perplexity", "plan A") == f"{PPL[3]:.4g} (measured)"
    pills = next(g for g in at.button_group if g.key.startswith("pad_pills"))
    pills.set_value([3, 1]).run()
    left -= info.block_parameters[1]
    assert cell(at, "parameters", "plan A") == f"{left:,}"
    both = math.exp(math.log(PPL[3]) + math.log(PPL[1]) - math.log(DENSE))
    assert cell(at, "perplexity", "plan A") == f"{both:.4g} (estimated)"
    assert "--drop 3,1 " in command(at)
    assert at.query_params["drop"] in ("3,1", ["3,1"])


def test_the_slider_takes_the_criterions_plan(scored, tiny_gqa):
    at = open_page(tiny_gqa, criterion="taylor")
    at.select_slider[0].set_value(2).run()
    wanted = choose(load(scored), "taylor", count=2).drop
    assert f"--drop {wanted[0]},{wanted[1]} " in command(at)


def test_parts_of_blocks_are_two_rows_beneath_the_blocks(scored, tiny_gqa):
    parts = [(b, p, 8.0 + b + (p == "mlp")) for b in range(5) for p in ("attention", "mlp")]
    workspace.write_csv(scored / "sublayers.csv", ("block", "part", "ppl"), parts)
    at = open_page(tiny_gqa, drop="1", attention="3", mlp="2", criterion="sublayers")
    rows = [trace for trace in figure(at, 0)["data"] if trace.get("yaxis") == "y2"]
    states = {(b, part): state for row in rows for b, part, state in row["customdata"]}
    gone = {unit for unit, state in states.items() if state == "removed"}
    assert gone == {(1, "attention"), (1, "mlp"), (3, "attention"), (2, "mlp")}
    assert " --drop 1 --attention 3 --mlp 2 " in command(at)
    info = headers.inspect(tiny_gqa)
    left = info.parameters - info.block_parameters[1] - 3 * 32 * 48 - (2 * 32 * 32 + 2 * 32 * 16)
    assert cell(at, "parameters", "plan A") == f"{left:,}"
    assert cell(at, "without attention", "plan A") == "3"
    rise = sum(math.log(ppl / DENSE) for ppl in (9.5, 11.0, 11.0))
    wanted = math.exp(math.log(DENSE) + rise)
    assert cell(at, "perplexity", "plan A") == f"{wanted:.4g} (estimated)"
    # A block that loses its other part too is dropped whole, and leaves the pills.
    pills = next(g for g in at.button_group if g.key.startswith("pad_mlp"))
    assert pills.options == ["0", "2", "3", "4"]
    pills.set_value([2, 3]).run()
    assert " --drop 1,3 --mlp 2 " in command(at)
    assert at.query_params["mlp"] in ("2", ["2"])
    assert "attention" not in at.query_params
    at.select_slider[0].set_value(3).run()  # parts 1a, 1m and 2a are the cheapest
    assert " --drop 1 --attention 2 --criterion sublayers " in command(at)
    both = open_page(tiny_gqa, drop="1", attention="1")
    sentence = "Block 1 is dropped whole, so its attention cannot be removed as well."
    assert sentence in " ".join(e.value for e in both.error)


@pytest.mark.parametrize(
    ("drop", "sentence"),
    [
        ("0-4", "All 5 blocks are selected."),
        ("9", "Block 9 does not exist: the checkpoint has 5 blocks."),
        ("", "No blocks are selected."),
        ("x", "'x' is not a whole number or a range."),
    ],
)
def test_what_cannot_be_dropped_is_told_as_on_the_command_line(scored, tiny_gqa, drop, sentence):
    at = open_page(tiny_gqa, drop=drop)
    shown = " ".join(e.value for e in (*at.error, *at.info))
    assert sentence in shown
    button = next(b for b in at.button if b.label == "Create the variant")
    assert button.disabled


def test_a_measured_curve_is_told_from_an_estimate(scored, tiny_gqa, tmp_path):
    at = open_page(tiny_gqa, drop="2,3")
    names = [trace["name"] for trace in figure(at, 1)["data"]]
    assert names == ["by perplexity, measured", "by perplexity, estimated", "plan A, estimated"]
    folder = tmp_path / "curve-1"
    (folder / ".run").mkdir(parents=True)
    workspace.write_json(folder / ".run" / "spec.json", {"command": "curve", "spec": {}})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 2.0})
    drops = {"ppl 1": [2], "ppl 2": [2, 3], "ppl 3": [2, 3, 1]}
    summary = workspace.read_json(scored / "summary.json")
    workspace.write_json(folder / "summary.json", {**summary, "drops": drops})
    rows = [("ppl", 0, 7.5), ("ppl", 1, 8.0), ("ppl", 2, 11.25), ("ppl", 3, 30.5)]
    workspace.write_csv(folder / "curve.csv", ("criterion", "count", "ppl"), rows)
    at = open_page(tiny_gqa, drop="2,3")
    traces = figure(at, 1)["data"]
    assert [t["name"] for t in traces] == ["by perplexity, measured", "plan A, measured"]
    assert traces[0]["y"] == [7.5, 8.0, 11.25, 30.5]
    assert (traces[1]["x"], traces[1]["y"]) == ([2], [11.25])


def test_the_time_of_a_curve_is_told_before_it_starts(scored, tiny_gqa):
    shown = [c.value for c in open_page(tiny_gqa).caption]
    assert [c for c in shown if c.startswith("Estimated time: about ") and "assumed rate" in c]
    info = headers.inspect(tiny_gqa)
    first, last = default_protection(info.blocks)
    order = sorted(range(first, info.blocks - last), key=lambda b: PPL[b])
    sets = [set(order[:count]) for count in range(len(order) + 1)]
    shared = {
        (b, *sorted(s & set(range(b)))) for s in sets for b in range(info.blocks) if b not in s
    }
    once = sum(block_flops(info, b, 4, 32) for b in range(info.blocks)) / info.blocks
    flops = len(shared) * once + len(sets) * head_flops(info, 4, 32)
    summary = workspace.read_json(scored / "summary.json")
    measured = {"flops_per_s": flops / 600, "parameters": info.parameters}
    workspace.write_json(scored / "summary.json", {**summary, **measured})
    st.cache_data.clear()
    shown = [c.value for c in open_page(tiny_gqa).caption]
    sentence = "Estimated time: about 10 min 3 s, at the rate of the last run in this workspace."
    assert sentence in shown


def test_without_scores_blocks_are_chosen_by_hand(tmp_path, monkeypatch, tiny_gqa):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    at = open_page(tiny_gqa, drop="1")
    assert cell(at, "perplexity", "plan A") == "unknown"
    strip = figure(at, 0)["data"][0]
    assert [c[0] for c in strip["customdata"] if c[2] == "dropped"] == [1]


def test_what_a_browser_still_sends_from_before_is_no_choice(scored, tiny_gqa):
    """On a fast second click the address and the widgets are those of the page before the first."""
    at = open_page(tiny_gqa, drop="1")
    before = dict(at.query_params)

    def pills():
        return next(g for g in at.button_group if g.key.startswith("pad_pills"))

    slider, shown = at.select_slider[0].key, pills().key
    pills().set_value([1, 3]).run()
    assert "--drop 1,3 " in command(at)
    assert pills().key == shown  # a keyboard's focus stays on it
    assert at.select_slider[0].key != slider  # its old value is another widget's
    at.query_params.clear()
    for name, value in before.items():
        at.query_params[name] = value
    at.run()
    assert "--drop 1,3 " in command(at)
    assert at.query_params["drop"] in ("1,3", ["1,3"])
    at.query_params["drop"] = "2"  # opened by someone
    at.run()
    assert "--drop 2 " in command(at)
    assert pills().key != shown
    at.select_slider[0].set_value(0).run()
    assert "no blocks" in " ".join(i.value for i in at.info).lower()


def test_what_a_browser_sends_once_more_is_no_choice(monkeypatch):
    """After a widget gave way to another, its last value comes again with the next message."""
    pad = prune_pad.Pad()
    pad.drop = (3,)
    first = pad.key("pills")
    pad.change(Removal((3, 1)), "slider")
    click = {"selection": {"points": [{"customdata": [2]}]}}
    kept = {prune_pad._STATE: pad, first: [3], pad.key("pills"): [3, 1, 4], "pad_chart_0": click}
    monkeypatch.setattr(prune_pad, "st", SimpleNamespace(session_state=kept))
    prune_pad.picked(first)
    assert pad.drop == (3, 1)
    prune_pad.picked(pad.key("pills"))
    assert pad.drop == (3, 1, 4)
    prune_pad.clicked("pad_chart_0", 5)
    prune_pad.clicked("pad_chart_0", 5)
    assert pad.drop == (3, 1, 4, 2)
    kept["pad_chart_1"] = click
    prune_pad.clicked("pad_chart_1", 5)
    assert pad.drop == (3, 1, 4)


def cards(at):
    return {m.label: (m.value, m.delta) for m in at.metric}


def test_the_cards_are_the_plans_own_figures_and_change_with_it(scored, tiny_gqa):
    at = open_page(tiny_gqa, drop="3")
    info = headers.inspect(tiny_gqa)
    shown = cards(at)
    left = info.parameters - info.block_parameters[3]
    assert shown["Parameters"][0] == f"{left:,}"
    ratio = PPL[3] / DENSE
    assert shown["Perplexity, measured"] == (f"{ratio:.2f} x dense", "8.25, dense 7.5")
    cache = info.kv_bytes(1, info.context, info.compute_dtype)
    assert shown["Key/value cache"] == (
        size(cache * 4 // 5), f"{size(cache)} dense, computed",
    )  # fmt: skip
    assert shown["Task accuracy"] == ("not measured", "no tasks evaluated yet")
    assert shown["Speed"] == ("unknown", "device not measured yet")
    assert any(
        "Measured on the calibration rows: demo, 4 x 32 tokens" in c.value for c in at.caption
    )
    pills = next(g for g in at.button_group if g.key.startswith("pad_pills"))
    pills.set_value([3, 1]).run()
    both = PPL[3] * PPL[1] / DENSE**2
    assert cards(at)["Perplexity, estimated"][0] == f"{both:.2f} x dense"
    assert any("Estimated from the scores of single blocks" in c.value for c in at.caption)


def test_speed_is_estimated_from_the_rates_of_this_device(scored, tiny_gqa, tmp_path):
    folder = tmp_path / "benchmark-1"
    (folder / ".run").mkdir(parents=True)
    workspace.write_json(folder / ".run" / "spec.json", {"command": "benchmark", "spec": {}})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 2.0})
    rates = {"bandwidth_bytes_per_s": 1e9, "matmul_flops_per_s": 1e11, "block_overhead_s": 1e-4}
    rates |= {"step_overhead_s": 1e-3, "dtype": "float32"}
    workspace.write_json(folder / "summary.json", {"device": "cpu", "rates": rates})
    at = open_page(tiny_gqa, drop="1,3")
    info, known = headers.inspect(tiny_gqa), analytic.Rates(**rates)
    dense = analytic.latency_s(info, known, 1)
    cut = analytic.latency_s(analytic.without(info, (1, 3)), known, 1)
    value, beside = cards(at)["Speed, estimated"]
    assert value == f"{dense / cut:.2f} x dense"
    assert beside == f"{128 / cut:,.4g}, dense {128 / dense:,.4g} tokens/s"


def test_a_target_gives_the_nearest_counts_and_a_click_takes_one(scored, tiny_gqa):
    at = open_page(tiny_gqa)
    info = headers.inspect(tiny_gqa)
    share = info.block_parameters[2] / info.parameters
    field = next(n for n in at.number_input if n.label == "Smaller by (%)")
    assert field.value == 20.0
    field.set_value(round(150 * share, 1)).run()
    buttons = [b for b in at.button if b.key and b.key.startswith("pad_take_")]
    assert [b.label for b in buttons] == [f"1 block: {share:.1%}", f"2 blocks: {2 * share:.1%}"]
    buttons[1].click().run()
    wanted = choose(load(scored), "ppl", count=2).drop
    assert f"--drop {wanted[0]},{wanted[1]} " in command(at)
    assert at.select_slider[0].value == 2


def test_the_target_is_the_studys(scored, tiny_gqa):
    from dataclasses import replace

    from core.runs.workspace import Workspace
    from core.study import store

    found = store.of(str(tiny_gqa), Workspace())
    store.save(replace(found, settings=replace(found.settings, ratio=0.35), asked=True))
    at = open_page(tiny_gqa)
    assert next(n for n in at.number_input if n.label == "Smaller by (%)").value == 35.0


def test_bars_beyond_the_axis_carry_their_value(scored, tiny_gqa):
    at = open_page(tiny_gqa, drop="0")
    texts = {a["x"]: a["text"] for a in figure(at, 0)["layout"]["annotations"] if "x" in a}
    assert texts[0] == "#1: 90"
    assert texts[4] == "20"
    assert 2 not in texts


@pytest.mark.parametrize("noise", [0.02, 0.6])
def test_a_measured_speed_is_shown_unless_it_is_too_noisy(noise):
    from core.compare.plan import MeasuredSpeed
    from core.compare.speed import Speed
    from core.ui import cockpit

    real = MeasuredSpeed(Speed(1.25, noise), 80.0, 64.0, 12, 128, "cpu", "float32", "bench")
    facts = SimpleNamespace(
        study=object(), removal=Removal((1,)), rates=None, asked={"batch": 1, "dtype": "float32"}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cockpit.measured, "speed_of", lambda *_: real)
        card = cockpit.speed(facts)
    if noise < 0.1:
        assert (card.title, card.value) == ("Speed, measured", "1.25 x dense")
        assert card.beside == "80, dense 64 tokens/s"
        assert "128 out" in card.note
    else:
        assert (card.title, card.value) == ("Speed", "unclear")
        assert "too noisy" in card.note
