"""Figures of the Importance page; each shows exactly the content of one CSV file of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from core import criteria
from core.charts import palette
from core.charts.memo import drawn_once
from core.charts.prune import log_axis
from core.charts.sketch import Sketch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MOST_NLL = 700.0
"""Above this the exponential overflows a float."""
MODULES = ("input_norm", "q", "k", "v", "o", "post_norm", "gate", "up", "down")
"""Modules of a block in the order of computation."""
PARTS = {"attention": "attention", "mlp": "MLP"}
"""Parts of a block, and how they are written."""
LABELS = {column: criteria.LABELS[column] for column in criteria.COLUMNS}
"""Column of blocks.csv -> its label."""


def table(rows: Sequence[DataclassInstance]) -> pd.DataFrame:
    """Return rows of one result file as a table with the file's columns; None becomes NaN."""
    found = pd.DataFrame(rows)
    return found.astype({n: float for n in found.columns if found[n].isna().all()})


@drawn_once
def perplexity_bars(
    values: Sequence[float | None],
    dense_ppl: float | None,
    *,
    dropped: Sequence[int] = (),
    protected: Sequence[int] = (),
    log: bool = True,
    top: float | None = None,
    height: int = 380,
) -> go.Figure:
    """Draw the perplexity without each block as bars; the toggle pad of the Prune page.

    Dropped blocks carry a cross pattern and their rank, protected ones are grey and hatched. Each
    bar's customdata is [block, state]. ``top`` cuts the axis off to show the useful band; bars that
    reach beyond it carry their value.
    """
    rank = {block: at + 1 for at, block in enumerate(dropped)}
    kinds = [
        "dropped" if b in rank else "protected" if b in protected else "kept"
        for b in range(len(values))
    ]
    looks = {
        "kept": (palette.KEPT, ""),
        "dropped": (palette.DROPPED, "x"),
        "protected": (palette.PROTECTED, "/"),
    }
    figure = Sketch()
    figure.add_bar(
        x=list(range(len(values))),
        y=list(values),
        customdata=[[b, kind] for b, kind in enumerate(kinds)],
        text=[f"#{rank[b]}" if b in rank else "" for b in range(len(values))],
        textposition="outside",
        cliponaxis=False,
        marker={
            "color": [looks[k][0] for k in kinds],
            "pattern": palette.hatch([looks[k][1] for k in kinds], size=7),
        },
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        hovertemplate="block %{customdata[0]} (%{customdata[1]})<br>"
        "perplexity without it: %{y:,.5g}<extra></extra>",
        showlegend=False,
    )
    for kind in ("dropped", "protected"):
        if kind in kinds:
            figure.add_bar(
                x=[None],
                y=[None],
                name=kind,
                marker={"color": looks[kind][0], "pattern": palette.hatch(looks[kind][1])},
            )
    if dense_ppl:
        palette.dense_line(figure, dense_ppl)
    known = [v for v in (*values, dense_ppl) if v and math.isfinite(v)] or [1.0]
    title = "perplexity" if height < 340 else "perplexity without the block"  # as it fits
    if log:
        axis = log_axis(known)
        if top and axis:
            axis |= {"range": [log_axis([min(known), top])["range"][0], math.log10(top)]}
            axis |= {k: v for k, v in log_axis([min(known), top]).items() if k != "range"}
        figure.update_yaxes(type="log", title=title, **axis)
    else:
        low, high = min(known), top or max(known)
        room = 0.08 * (high - low) or 0.1 * high
        figure.update_yaxes(title=title, range=[max(0.0, low - room), top or high + room])
    figure.update_xaxes(title="block", **palette.counting_axis(len(values)), showgrid=False)
    palette.dress(figure, height, bargap=0.15, clickmode="event+select", dragmode=False)
    palette.steady(figure, 78, top=44)
    if top:
        _add_clipped(figure, values, rank, top, log)
    return figure.finished()


def _add_clipped(
    figure: Sketch,
    values: Sequence[float | None],
    rank: Mapping[int, int],
    top: float,
    log: bool,
) -> None:
    """Write the value of every bar that ``top`` clips upright into it, with its rank."""
    for block, value in enumerate(values):
        if value is None or not value > top:
            continue
        shown = palette.number(value) if math.isfinite(value) else "infinite"
        figure.add_annotation(
            x=block,
            y=math.log10(top) if log else top,
            yanchor="top",
            textangle=-90,
            text=f"#{rank[block]}: {shown}" if block in rank else shown,
            showarrow=False,
            font={"size": 12 if len(values) <= 40 else 9, "color": "#FFFFFF", "weight": 700},
            bgcolor="rgba(0,0,0,0.45)",
            borderpad=1,
        )


def useful_top(values: Sequence[float], dense_ppl: float | None) -> float | None:
    """Return the upper end of the perplexity axis that keeps outliers from hiding the rest.

    The median plus four times its distance to the lower quartile. That is Tukey's fence, as if the
    upper half mirrored the lower one: in a short model a quarter of the blocks can be outliers.
    None if nothing exceeds it.
    """
    finite = sorted(v for v in values if math.isfinite(v))
    if len(finite) < 4:
        return None
    low, middle = finite[len(finite) // 4], finite[len(finite) // 2]
    top = middle + 4 * max(middle - low, 0.02 * middle)
    return max(top, 1.05 * (dense_ppl or 0)) if finite[-1] > top else None


def row_perplexity(samples: pd.DataFrame) -> pd.DataFrame:
    """Return perplexity by block left out (rows; -1 is dense) and calibration row (columns)."""
    table = samples.pivot(index="block", columns="sample", values="nll").sort_index()
    return table.clip(upper=MOST_NLL).map(math.exp)


def row_ratios(samples: pd.DataFrame) -> pd.DataFrame:
    """Return each row's perplexity without a block over its dense one; without -1, dense.

    Rows of text differ far more in perplexity than blocks do, which this takes out.
    """
    perplexity = row_perplexity(samples)
    return perplexity.drop(index=-1).div(perplexity.loc[-1], axis=1)


@drawn_once
def sample_heatmap(samples: pd.DataFrame, *, top: float | None = None) -> go.Figure:
    """Draw the perplexity of each calibration row (x) without each block (y) over its dense one.

    Colours are logarithmic. ``top`` ends the scale there, so that the few blocks without which
    nothing works do not hide the others; hovering tells the value all the same. Each cell's
    customdata is [ratio, perplexity, dense perplexity].
    """
    perplexity, ratios = row_perplexity(samples), row_ratios(samples)
    bases, without = perplexity.loc[[-1]].to_numpy()[0].tolist(), perplexity.drop(index=-1)
    logs = ratios.map(math.log10)
    names = [str(block) for block in ratios.index]
    low = float(logs.min().min())
    high = math.log10(top) if top else float(logs.max().max())
    bar = palette.log_bar("times the row's dense perplexity", low, high, more=bool(top))
    figure = go.Figure(
        go.Heatmap(
            z=logs.to_numpy().tolist(),
            zmin=low,
            zmax=high,
            customdata=[
                [list(cell) for cell in zip(*row, bases, strict=True)]
                for row in zip(ratios.to_numpy().tolist(), without.to_numpy().tolist(), strict=True)
            ],
            x=[str(c) for c in ratios.columns],
            y=names,
            colorscale=palette.SCALE,
            colorbar=bar,
            hovertemplate="without block %{y}, row %{x}: %{customdata[0]:,.4g} x dense<br>"
            "(%{customdata[1]:,.4g}, dense %{customdata[2]:,.4g})<extra></extra>",
        )
    )
    return _rows_and_blocks(figure, [str(c) for c in ratios.columns], names)


@drawn_once
def divergence_heatmap(divergences: pd.DataFrame, *, top: float | None = None) -> go.Figure:
    """Draw the KL from the dense model of each calibration row (x) without each block (y).

    ``top`` ends the scale there; hovering tells the value all the same.
    """
    table = divergences.pivot(index="block", columns="sample", values="kl").sort_index()
    high = top or float(table.max().max())
    ticks = [high * i / 4 for i in range(5)]
    words = [palette.number(tick) if tick else "0" for tick in ticks]
    words[-1] += " or more" if top else ""
    rows, names = [str(c) for c in table.columns], [str(block) for block in table.index]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy().tolist(),
            zmin=0.0,
            zmax=high,
            x=rows,
            y=names,
            colorscale=palette.SCALE,
            colorbar=palette.colour_bar("nats per token", tickvals=ticks, ticktext=words),
            hovertemplate="without block %{y}, row %{x}: %{z:,.4g} nats<extra></extra>",
        )
    )
    return _rows_and_blocks(figure, rows, names)


def _rows_and_blocks(figure: go.Figure, rows: Sequence[str], blocks: Sequence[str]) -> go.Figure:
    """Give a heatmap of calibration rows and blocks its axes; returns it."""
    figure.update_xaxes(
        title="calibration row",
        type="category",
        tickvals=list(rows[:: palette.category_step(len(rows))]),
    )
    figure.update_yaxes(
        title="block left out",
        type="category",
        autorange="reversed",
        tickvals=list(blocks[:: palette.category_step(len(blocks))]),
    )
    return palette.dress(figure, min(900, 200 + 17 * len(blocks)), **palette.BELOW_BAR)


@drawn_once
def taylor_heatmap(
    weights: pd.DataFrame,
    column: str = "taylor",
    *,
    rows: bool = False,
    dropped: Sequence[int] = (),
) -> go.Figure:
    """Draw modules (y) x blocks (x) with the block sums as bars above.

    ``rows`` divides every module's row by its largest value: modules differ 10 to 50 times. Every
    column can be clicked: bars and the invisible points over the cells carry their block as
    customdata; ``dropped`` blocks have bars in the drop colour with a cross pattern.
    """
    table = weights.pivot(index="module", columns="block", values=column)
    table = table.reindex([m for m in MODULES if m in table.index])
    sums = table.sum(axis=0)
    blocks = [int(b) for b in table.columns]
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.3, 0.7], vertical_spacing=0.04)
    figure.add_bar(
        x=blocks,
        y=sums.to_list(),
        customdata=[[block] for block in blocks],
        marker={
            "color": [
                palette.DROPPED if b in dropped else palette.CRITERIA.get(column, palette.KEPT)
                for b in blocks
            ],
            "pattern": palette.hatch(["x" if b in dropped else "" for b in blocks], size=7),
        },
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        hovertemplate="block %{x}: %{y:.5g}<extra>sum</extra>",
        showlegend=False,
        row=1,
        col=1,
    )
    if rows:
        shown = table.div(table.max(axis=1).replace(0, 1), axis=0)
        bar = palette.colour_bar("of the row's largest")
    else:
        tiny = float(table.where(table > 0).min().min() or 1e-12)
        shown = table.clip(lower=tiny).map(math.log10)
        low, high = float(shown.min().min()), float(shown.max().max())
        bar = palette.log_bar(column, low, high)
    figure.add_heatmap(
        z=shown.to_numpy().tolist(),
        customdata=table.to_numpy().tolist(),
        x=blocks,
        y=list(table.index),
        colorscale=palette.SCALE,
        colorbar=bar,
        hoverinfo="skip",
        row=2,
        col=1,
    )
    cells = [(module, block) for module in table.index for block in blocks]
    figure.add_scatter(
        x=[block for _, block in cells],
        y=[module for module, _ in cells],
        # Points without a size: Plotly takes any of several markers that overlap under the pointer,
        # not the nearest, and in a narrow column that is another block.
        mode="text",
        text=" ",
        customdata=[[block, table.at[module, block]] for module, block in cells],
        hovertemplate="block %{x}, %{y}: %{customdata[1]:.5g}<extra></extra>",
        showlegend=False,
        row=2,
        col=1,
    )
    figure.update_yaxes(title=f"{column}, sum", row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=2, col=1)
    figure.update_xaxes(range=[min(blocks) - 0.5, max(blocks) + 0.5], automargin=False)
    figure.update_xaxes(title="block", **palette.counting_axis(len(blocks)), row=2, col=1)
    # Far enough that a click anywhere in a cell finds its point. Not -1, without a limit: then all
    # bars above are equally near, and the last one is taken.
    pad = {"clickmode": "event+select", "dragmode": False, "hoverdistance": 1000}
    return palette.dress(figure, 500, **pad, **palette.BELOW_BAR)


@drawn_once
def angular_triangle(angular: pd.DataFrame) -> go.Figure:
    """Draw the angular distance by start (x) and cut length (y); the minimum of each circled."""
    table = angular.pivot(index="length", columns="start", values="distance").sort_index()
    hover = [
        [
            f"drop {start}" + (f"-{start + length - 1}" if length > 1 else "")
            for start in table.columns
        ]
        for length in table.index
    ]
    best = angular.loc[angular.groupby("length")["distance"].idxmin()]
    values = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[int(c) for c in table.columns],
            y=[int(i) for i in table.index],
            customdata=hover,
            colorscale=palette.SCALE,
            colorbar=palette.colour_bar("angle / pi"),
            hoverongaps=False,
            hovertemplate="%{customdata}: %{z:.4f}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=best["start"].tolist(),
        y=best["length"].tolist(),
        mode="markers",
        name="best start of each length",
        marker={
            "symbol": "circle-open",
            "size": 13 if len(best) <= 40 else 8,
            "color": palette.DROPPED,
            "line": {"width": 2.5},
        },
        hoverinfo="skip",
    )
    ticks = palette.counting_axis(len(table.index))
    across, up = int(table.columns.max()), int(table.index.max())
    figure.update_xaxes(title="first block of the cut", **ticks, range=[-0.5, across + 0.5])
    figure.update_yaxes(title="blocks in the cut", **ticks, range=[0.5, up + 0.5])
    height = min(760, 240 + 14 * len(table.index))
    return palette.dress(figure, height, showlegend=False, **palette.BELOW_BAR)


@drawn_once
def score_bars(blocks: pd.DataFrame, column: str, top: float | None = None) -> go.Figure:
    """Draw one criterion's score of every block.

    ``top`` cuts the axis off; bars that reach beyond it carry their value.
    """
    figure = Sketch()
    figure.add_bar(
        x=blocks["block"].tolist(),
        y=blocks[column].tolist(),
        marker={"color": palette.CRITERIA.get(column, palette.KEPT)},
        hovertemplate="block %{x}: %{y:.5g}<extra></extra>",
    )
    figure.update_xaxes(title="block", **palette.counting_axis(len(blocks)), showgrid=False)
    figure.update_yaxes(title=LABELS.get(column, column))
    palette.dress(figure, 320)
    if top:
        figure.update_yaxes(range=[0, top])
        _add_clipped(figure, blocks[column].tolist(), {}, top, log=False)
    return figure.finished()


@drawn_once
def greedy_line(greedy: pd.DataFrame, dense_ppl: float | None) -> go.Figure:
    """Draw the perplexity after every round of greedy removal, each point named by its block."""
    figure = go.Figure(
        go.Scatter(
            x=greedy["round"].tolist(),
            y=greedy["ppl"].tolist(),
            text=greedy["block"].astype(str).tolist(),
            mode="lines+markers+text",
            textposition="top center",
            line={"color": palette.KEPT},
            hovertemplate="round %{x}: block %{text} goes, perplexity %{y:,.5g}<extra></extra>",
        )
    )
    if dense_ppl:
        palette.dense_line(figure, dense_ppl)
    known = [*greedy["ppl"].tolist(), *([dense_ppl] if dense_ppl else [])]
    figure.update_yaxes(type="log", title="perplexity", **log_axis(known))
    figure.update_xaxes(title="blocks removed", **palette.counting_axis(len(greedy)))
    return palette.dress(figure, 340)


@drawn_once
def sublayer_bars(
    sublayers: pd.DataFrame, dense_ppl: float | None, top: float | None = None
) -> go.Figure:
    """Draw the perplexity without the attention and without the MLP of every block.

    ``top`` ends the axis there, so that the few parts without which nothing works do not hide the
    others.
    """
    figure = go.Figure()
    for part, colour, pattern in (("attention", palette.KEPT, ""), ("mlp", palette.ACCENT, "/")):
        rows = sublayers[sublayers["part"] == part]
        figure.add_bar(
            x=rows["block"].tolist(),
            y=rows["ppl"].tolist(),
            name=f"without {PARTS[part]}",
            marker={"color": colour, "pattern": palette.hatch(pattern)},
            hovertemplate=f"block %{{x}} without {PARTS[part]}: %{{y:,.5g}}<extra></extra>",
        )
    if dense_ppl:
        palette.dense_line(figure, dense_ppl)
    known = [*sublayers["ppl"].tolist(), *([dense_ppl] if dense_ppl else [])]
    figure.update_yaxes(type="log", title="perplexity without the part", **log_axis(known))
    if top:
        low = min(known)
        room = 0.08 * (top - low)
        figure.update_yaxes(type="linear", range=[max(0.0, low - room), top], tickvals=None)
    blocks = int(sublayers["block"].max()) + 1
    figure.update_xaxes(title="block", **palette.counting_axis(blocks), showgrid=False)
    return palette.dress(figure, 360)


def scored_columns(blocks: pd.DataFrame) -> list[str]:
    """Return the criteria that the table has values for."""
    return [c for c in LABELS if c in blocks and blocks[c].notna().all()]


def rank_agreement(blocks: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's rank correlation between the criteria, one row and column each."""
    ranks = blocks[scored_columns(blocks)].rank()
    return ranks.corr()


@drawn_once
def agreement_heatmap(blocks: pd.DataFrame) -> go.Figure:
    """Draw Spearman's rank correlation between criteria, with its value in every cell."""
    table = rank_agreement(blocks)
    names = [LABELS[c] for c in table.columns]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy().tolist(),
            x=names,
            y=names,
            zmin=-1,
            zmax=1,
            colorscale=palette.SCALE,
            texttemplate="%{z:.2f}",
            showscale=False,
            hovertemplate="%{x} and %{y}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return palette.dress(figure, 380)
