"""Figures that plotly does not check are those that it draws itself."""

from __future__ import annotations

import json
import math

import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest

from core.charts import importance, prune
from core.charts.sketch import Sketch
from core.checkpoint.drop import Removal
from core.prune.outlook import Line, Quality


class Checked(go.Figure):
    """Plotly's own figure in the place of a sketch."""

    def finished(self):
        return self


def sent(figure):
    """The figure as the browser gets it."""
    return json.loads(plotly.io.to_json(figure.to_dict(), validate=False))


VALUES = [19178.25, 14743.0, 22.5, math.inf, 21.75, 23.0, None, 46.0]
SCORES = pd.DataFrame({"block": range(6), "taylor": [0.5, 0.1, 9.0, 0.2, 0.3, 4.0]})
LINES = (
    Line("ppl", "measured", ((1, 2.5, "3"), (2, 3.5, "3,4"))),
    Line("taylor", "estimated", ((0.5, 2.0, ""), (13, 900.0, "5"))),
)
PLANS = {
    "A": (2, Quality(3.5, "measured", "run")),
    "B": (1, Quality(4.0, "estimated", "sum")),
}
DRAWN = {
    "bars": (importance.perplexity_bars, (VALUES[:3], 1.9), {}),
    "bars of a plan": (
        importance.perplexity_bars,
        (VALUES, 20.5),
        {"dropped": [3, 1], "protected": [0, 7], "top": 60.0, "height": 300},
    ),
    "bars, linear": (importance.perplexity_bars, (VALUES, None), {"log": False, "top": 50.0}),
    "scores": (importance.score_bars, (SCORES, "taylor"), {}),
    "scores, clipped": (importance.score_bars, (SCORES, "taylor", 1.0), {}),
    "curve": (
        prune.curve,
        (LINES, PLANS, 1.9),
        {},
    ),
    "curve of nothing": (prune.curve, ((), {"A": (0, None)}, None), {}),
    "strip": (prune.block_strip, (14, {"A <b>": Removal((3, 5), (1,), (2,)), "B": [4]}, (0,)), {}),
    "strip without names": (
        prune.block_strip, (48, {"A": [3]}), {"height": 130, "named": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_a_sketch_is_what_plotly_draws(name, monkeypatch):
    draw, arguments, more = DRAWN[name]
    found = draw.__wrapped__(*arguments, **more)
    for module in (importance, prune):
        monkeypatch.setattr(module, "Sketch", Checked)
    theirs = draw.__wrapped__(*arguments, **more)
    assert type(theirs) is Checked
    assert sent(found) == sent(theirs)


def test_a_setting_can_be_taken_back_and_sketches_share_nothing():
    first, second = Sketch(), Sketch()
    for figure in (first, checked := Checked()):
        figure.update_layout(title="a", legend={"x": 0, "y": 1}, height=30)
        figure.update_layout(title_font={"size": 9}, legend={"y": None}, height=None)
        figure.update_xaxes(title="block", tickvals=[1, 2])
        figure.update_xaxes(title_font={"size": 14}, tickvals=None, visible=None)
        figure.add_shape(type="line", x0=0, line={"dash": "dash"})
        figure.add_annotation(text="x", font={"size": 1})
    assert sent(first.finished()) == sent(checked)
    assert sent(second.finished()) == sent(go.Figure())
