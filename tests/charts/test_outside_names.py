"""Names from outside are drawn letter for letter: Plotly would render tags, templates and TeX."""

from __future__ import annotations

import html
import re
from types import SimpleNamespace

import pandas as pd
import plotly.graph_objects as go

from core.charts import compare, evaluate, palette, prune, retrain
from core.compare.candidates import Candidate
from core.compare.measured import Cost
from core.compare.outcomes import Outcome
from core.evaluate.by_content import Cell, Evaluated, Measure
from core.evaluate.results import BlockCost
from core.prune.outlook import Line
from core.study import Variant

NAME = "<a href='http://there'>x</a> <b>&lt; %{x} $a$"
FORBIDDEN = ("<a ", "x</a>", " <b>", "%{x} $", "$a")


def texts(value):
    """Every string of a figure that can be seen: no keys of legends and of clicks."""
    if isinstance(value, dict):
        seen = {k: part for k, part in value.items() if k != "legendgroup"}
        if "customdata" in value:
            used = set(map(int, re.findall(r"customdata\[(\d)", value.get("hovertemplate") or "")))
            rows = value["customdata"]
            seen["customdata"] = [p for row in rows for at, p in enumerate(row) if at in used]
        return [t for part in seen.values() for t in texts(part)]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in texts(part)]
    return [value] if isinstance(value, str) else []


def figures():
    dense = Candidate("d", NAME, "dense", method_label=NAME, parameters=2, ppl=2.0, ratio=0.0)
    cut = Candidate("c", NAME, "depth", "ppl", NAME, parameters=1, ppl=3.0, ratio=0.5)
    costs = [
        Cost(id=c.id, variant=NAME, batch_size=1, latency_s_p50=1.0, latency_s_p10=0.9,
             latency_s_p90=1.1, oom=oom, estimated_memory_mib=5.0, runs=3)
        for c in (dense, cut) for oom in (False, True)
    ]  # fmt: skip
    yield "against", compare.against(costs, [dense, cut], "latency_s_p50")
    yield "ratio", compare.against_ratio(costs[::2], [dense, cut], "latency_s_p50")
    published = [{"ratio": 0.2, "over_dense": 1.5, "label": NAME, "source": NAME}]
    yield "quality", compare.quality([dense, cut], relative=True, published=published, chosen="c")
    rows = [Outcome(c, latency_s=t, kind_of_cost="measured") for c, t in ((dense, 2.0), (cut, 1.0))]
    looks = {row.key: compare.look_of(row.candidate) for row in rows}
    yield "pareto", compare.pareto(rows, looks, rows, "latency_s", chosen="c", best="d")
    measure = Measure("task", NAME, "acc", "c", "float32")
    found = {measure: Cell(0.5, 0.1, 20, SimpleNamespace(id="r", device="cpu"))}
    one = Evaluated(Variant(NAME, NAME, "depth", folder=None), found)
    yield "dots", evaluate.task_dots([one], [measure], {})
    changes = [BlockCost(b, NAME, NAME, 0.5, 0.1, 0.0, 0.1) for b in (-1, 0)]
    yield "skills", evaluate.skill_heatmap(changes)
    cell = {"calibration": NAME, "evaluated": NAME, "ratio": 1.0, "ppl": 2.0}
    yield "grid", evaluate.calibration_grid([cell])
    yield "curve", prune.curve([Line(NAME, "measured", [(1, 2.0, "0")])], {}, 2.0)
    yield "strip", prune.block_strip(2, {NAME: [1]})
    bars = pd.DataFrame([{"name": NAME, "method": "lora", "recovered": 0.5}])
    yield "recovered", retrain.recovered_bars(bars)
    table = pd.DataFrame([{"variant": NAME, "evaluated_on": NAME, "loss": 1.0}])
    yield "recipe", retrain.recipe(table, "loss", "loss")


def test_no_figure_renders_a_name():
    for title, figure in figures():
        shown = go.Figure(figure).to_plotly_json()
        found = [t for t in texts(shown) if any(sign in t for sign in FORBIDDEN)]
        assert not found, (title, found)
        assert palette.literal(NAME) in " ".join(texts(shown)), title


def test_an_escaped_name_is_read_back():
    assert html.unescape(palette.literal(NAME)) == NAME
    (figure,) = (f for title, f in figures() if title == "ratio")
    assert {row["series"] for row in compare.data_of(figure)} == {NAME}
