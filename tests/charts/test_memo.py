"""A figure is drawn again only if something that it shows has changed."""

from __future__ import annotations

import json

import pandas as pd
import plotly.graph_objects as go
import plotly.io

from core.charts import importance, memo, prune
from core.checkpoint.drop import Removal
from core.compare.candidates import Candidate


def test_equal_arguments_give_the_figure_drawn_before():
    made = []

    @memo.drawn_once
    def draw(found, *, at=None):
        made.append(list(found))
        return go.Figure().add_scatter(x=[c.ratio for c in found], y=[at])

    def candidates(*ratios):
        return [Candidate(f"c{r}", "label", "depth", ratio=r) for r in ratios]

    first = draw(candidates(0.1, 0.2), at=1)
    assert draw(candidates(0.1, 0.2), at=1) is first  # other objects, the same values
    assert list(draw(candidates(0.1, 0.3), at=1).data[0].x) == [0.1, 0.3]
    assert draw(candidates(0.1, 0.2), at=2) is not first
    growing = candidates(0.4)
    alone = draw(growing)
    growing += candidates(0.5)
    assert draw(growing) is not alone
    assert len(made) == 5
    for number in range(memo.KEPT):
        draw([], at=number)
    assert draw(candidates(0.1, 0.2), at=1) is not first  # the oldest are forgotten


def test_tables_are_compared_cell_by_cell():
    @memo.drawn_once
    def draw(table, column="x", *, more=None):
        return go.Figure().add_scatter(y=table[column])

    table = pd.DataFrame({"x": [1.0, None], "y": ["a", "b"]})
    first = draw(table)
    assert draw(table.copy()) is first
    assert draw(table.assign(x=[1.0, 2.0])) is not first
    assert draw(table.rename(columns={"y": "z"})) is not first
    assert draw(table, more={"t": table}) is draw(table, more={"t": table.copy()})
    assert draw(table, more={"t": table}) is not draw(table, more={"t": table[:1]})
    assert draw({"x": [1.0]}) is not first  # not a table
    kept = draw(table)
    table.loc[0, "x"] = 9.0  # the caller's own table
    assert draw(table) is not kept
    assert list(draw(table).data[0].y)[0] == 9.0


def sent(figure):
    return json.loads(plotly.io.to_json(figure.to_dict(), validate=False))


def test_part_rows_are_what_plotly_accepts_and_leave_the_bars_alone():
    values, removal = [float(v) for v in range(2, 10)], Removal((3,), (5,), (6,))
    for bars in (
        importance.perplexity_bars(values, 1.5, dropped=[3], protected=[0], height=300, top=8.0),
        prune.block_strip(8, {"A": [3]}, (0,), height=150),
    ):
        before = bars.to_dict()
        both = prune.with_part_rows(bars, removal, (0,), Removal((), (), (7,)))
        assert bars.to_dict() == before
        checked = go.Figure(both.to_dict())
        assert sent(checked) == sent(both)
        rows = {trace.name: [c[2] for c in trace.customdata] for trace in both.data[-2:]}
        assert rows["attention"][3:6] == ["removed", "kept", "removed"]
        assert rows["MLP"][6:] == ["removed", "missing"]
        assert rows["MLP"][0] == "protected"
        assert both.layout.yaxis.domain[0] > both.layout.yaxis2.domain[1]
        assert both.layout.margin.l == 78
        assert both.layout.xaxis.anchor == "y2"
        assert both.layout.xaxis.title == bars.layout.xaxis.title
