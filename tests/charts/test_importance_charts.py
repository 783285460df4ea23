"""Figures hold just what the tables hold."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from core.charts import importance as charts
from core.charts.checkpoint import module_kinds, parameter_bars
from core.checkpoint import headers

BLOCKS = [2, 5, 16, 80, 126]


def table(blocks: int) -> pd.DataFrame:
    rng = np.random.default_rng(blocks)
    columns = ("ppl", "taylor", "magnitude", "block_influence", "relative_update")
    return pd.DataFrame({"block": range(blocks), **{c: rng.random(blocks) + 3 for c in columns}})


@pytest.mark.parametrize("blocks", BLOCKS)
def test_perplexity_bars(blocks: int) -> None:
    values = table(blocks)["ppl"].tolist()
    figure = charts.perplexity_bars(values, 2.5, dropped=(1,), protected=(0,))
    bars = figure.data[0]
    assert list(bars.y) == values
    assert [d[0] for d in bars.customdata] == list(range(blocks))
    assert bars.customdata[1][1] == "dropped"
    assert bars.customdata[0][1] == "protected"
    assert bars.text[1] == "#1"
    assert bars.marker.color[0] != bars.marker.color[1]
    assert bars.marker.pattern.shape[0] != bars.marker.pattern.shape[1]
    low, high = figure.layout.yaxis.range
    assert low <= math.log10(2.5) <= high
    assert low <= math.log10(max(values)) <= high
    assert figure.layout.shapes[0].y0 == 2.5


def test_the_useful_band_cuts_outliers_only() -> None:
    assert charts.useful_top([19178, 14743, *np.linspace(21, 26, 29), 46], 12.2) < 100
    assert charts.useful_top(list(np.linspace(21, 26, 32)), 12.2) is None
    assert charts.useful_top([1.0, 2.0], 1.0) is None


@pytest.mark.parametrize("blocks", BLOCKS)
def test_sample_heatmap(blocks: int) -> None:
    rng = np.random.default_rng(1)
    rows = [(b, s, float(rng.random() + 1)) for b in range(-1, blocks) for s in range(3)]
    figure = charts.sample_heatmap(pd.DataFrame(rows, columns=["block", "sample", "nll"]))
    heat = figure.data[0]
    dense = {sample: nll for block, sample, nll in rows if block < 0}
    assert list(heat.y) == [str(block) for block in range(blocks)]
    for block, sample, nll in rows:
        if block < 0:
            continue
        ratio = math.exp(nll - dense[sample])
        wanted = [ratio, math.exp(nll), math.exp(dense[sample])]
        assert list(heat.customdata[block][sample]) == pytest.approx(wanted)
        assert 10 ** heat.z[block][sample] == pytest.approx(ratio)


@pytest.mark.parametrize("log", [False, True])
def test_clipped_bars_carry_their_value(log: bool) -> None:
    values = [19178.0, 25.0, 22.0, 23.0, 24.0, 31.2]
    figure = charts.perplexity_bars(values, 12.2, dropped=(5,), log=log, top=30.0)
    texts = {a.x: a.text for a in figure.layout.annotations if a.textangle}
    assert texts == {0: "19,178", 5: "#1: 31.2"}
    end = figure.layout.yaxis.range[1]
    assert (10**end if log else end) == pytest.approx(30.0)
    plain = charts.perplexity_bars(values, 12.2, dropped=(5,), log=log)
    assert not [a for a in plain.layout.annotations if a.textangle]


@pytest.mark.parametrize("rows", [False, True])
def test_taylor_heatmap(rows: bool) -> None:
    rng = np.random.default_rng(2)
    values = [
        (f"model.layers.{b}.{m}", b, m, float(rng.random() + 0.01))
        for b in range(6)
        for m in reversed(charts.MODULES)
    ]
    frame = pd.DataFrame(values, columns=["name", "block", "module", "taylor"])
    figure = charts.taylor_heatmap(frame, "taylor", rows=rows)
    sums, heat, cells = figure.data
    assert list(heat.y) == list(charts.MODULES)
    assert [list(c) for c in sums.customdata] == [[b] for b in range(6)]
    for x, y, (block, value) in zip(cells.x, cells.y, cells.customdata, strict=True):
        assert (x, value) == (block, heat.customdata[charts.MODULES.index(y)][block])
    expected = frame.groupby("block")["taylor"].sum()
    assert list(sums.y) == pytest.approx(expected.tolist())
    for _, block, module, value in values:
        assert heat.customdata[charts.MODULES.index(module)][block] == value
    if rows:
        assert max(max(r) for r in heat.z) == pytest.approx(1.0)
    dropped = charts.taylor_heatmap(frame, "taylor", dropped=(2,)).data[0].marker
    assert [b for b, shape in enumerate(dropped.pattern.shape) if shape] == [2]


def test_angular_triangle_rings_every_minimum() -> None:
    rng = np.random.default_rng(3)
    rows = [(s, n, float(rng.random())) for n in range(1, 8) for s in range(8 - n)]
    frame = pd.DataFrame(rows, columns=["start", "length", "distance"])
    heat, rings = charts.angular_triangle(frame).data
    for start, length, distance in rows:
        assert heat.z[length - 1][start] == distance
    assert heat.z[6][1] is None
    assert heat.customdata[2][4] == "drop 4-6"
    for start, length in zip(rings.x, rings.y, strict=True):
        best = min((d, s) for s, n, d in rows if n == length)
        assert start == best[1]


def test_rank_agreement_is_spearman() -> None:
    from scipy.stats import spearmanr

    blocks = table(16)
    found = charts.rank_agreement(blocks)
    expected = spearmanr(blocks["ppl"], blocks["taylor"]).statistic
    assert found.loc["ppl", "taylor"] == pytest.approx(expected)
    heat = charts.agreement_heatmap(blocks).data[0]
    assert heat.z[0][1] == pytest.approx(expected)


def test_criteria_without_scores_are_left_out() -> None:
    blocks = table(4)
    blocks["taylor"] = np.nan
    assert "taylor" not in charts.scored_columns(blocks)
    assert list(charts.score_bars(blocks, "ppl").data[0].y) == blocks["ppl"].tolist()


def test_parameter_bars_add_up(tiny_dir) -> None:
    for variant in ("gqa", "tied", "qwen2", "qwen3"):
        info = headers.inspect(tiny_dir(variant))
        kinds = module_kinds(info)
        assert [sum(column) for column in zip(*kinds.values(), strict=True)] == list(
            info.block_parameters
        )
        drawn = sum(y for trace in parameter_bars(info).data for y in trace.y if y)
        assert drawn + info.parts["norm"] == info.parameters


def test_greedy_and_sublayers_show_their_tables() -> None:
    greedy = pd.DataFrame({"round": [1, 2], "block": [4, 2], "ppl": [3.5, 4.25]})
    line = charts.greedy_line(greedy, 3.0).data[0]
    assert (list(line.x), list(line.y), list(line.text)) == ([1, 2], [3.5, 4.25], ["4", "2"])
    rows = [(b, part, 3.0 + b + (part == "mlp")) for b in range(3) for part in ("attention", "mlp")]
    parts = pd.DataFrame(rows, columns=["block", "part", "ppl"])
    attention, mlp = charts.sublayer_bars(parts, None).data
    assert list(attention.y) == [3.0, 4.0, 5.0]
    assert list(mlp.y) == [4.0, 5.0, 6.0]
    assert mlp.marker.pattern.fillmode == "overlay"  # a hatch alone is white on white
    assert mlp.name == "without MLP"
    axis = charts.sublayer_bars(parts, 3.0, 4.5).layout.yaxis
    assert (axis.type, axis.range[1]) == ("linear", 4.5)


def test_kl_is_drawn_by_block_and_by_row() -> None:
    rows = [(b, s, 0.1 * b + 0.01 * s) for b in range(4) for s in range(3)]
    table = pd.DataFrame(rows, columns=["block", "sample", "kl"])
    figure = charts.divergence_heatmap(table, top=0.2)
    heat = figure.data[0]
    assert heat.z[3] == pytest.approx([0.3, 0.31, 0.32])
    assert (heat.zmin, heat.zmax) == (0.0, 0.2)
    assert heat.colorbar.ticktext[-1].endswith("or more")
    blocks = pd.DataFrame({"block": range(4), "kl": [6.8, 0.1, 0.2, 0.3]})
    figure = charts.score_bars(blocks, "kl", 0.4)
    assert tuple(figure.layout.yaxis.range) == (0, 0.4)
    assert [note.text for note in figure.layout.annotations] == ["6.8"]
