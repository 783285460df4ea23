"""Figures of the Retrain page, from the metrics of a run and from the recipes' tables.

Pure functions: lists and tables in, figures out. A run of 100,000 steps is thinned before it is
drawn, with the extremes kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from core import words
from core.charts import palette
from core.charts.memo import drawn_once
from core.retrain.extrapolation import Fit
from core.retrain.results import Evaluation, Rate, Step

MOST_POINTS = 1500
"""Maximum points drawn per curve; more than a screen has columns."""
METHODS = {
    "lora": ("#0072B2", "circle", ""),
    "continued": ("#D55E00", "square", "/"),
    "full": ("#009E73", "diamond", "x"),
    "partial": ("#CC79A7", "triangle-up", "\\"),
}
"""Colour, symbol and pattern of each method."""

SERIES = (palette.KEPT, palette.DROPPED, palette.ACCENT, "#CC79A7", "#E69F00", "#56B4E9", "#332288")
"""Colours of a recipe's variants, in order; each also has its own pattern."""

LINES = {"loss": (palette.DROPPED, "diamond"), "KL": (palette.KEPT, "circle")}
"""Colour and symbol of the two measures of recovery."""


def thin(values: Sequence[float | None], most: int = MOST_POINTS) -> list[int]:
    """Return at most ``most`` indices of ``values`` to draw, ascending.

    The first and the last point and, of each of equal stretches between, the lowest and the
    highest value are kept, so no spike is lost; if there are few points, all are kept.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    known = np.array([math.nan if v is None else v for v in values], dtype=float)
    edges = np.linspace(1, count - 1, max(1, (most - 2) // 2) + 1).astype(int)
    kept = {0, count - 1}
    for low, high in zip(edges, edges[1:], strict=False):
        part = known[low:high]
        if np.isnan(part).all():
            kept.add(int(low))
            continue
        kept.update((int(low + np.nanargmin(part)), int(low + np.nanargmax(part))))
    return sorted(kept)


def smooth(values: Sequence[float | None], span: float) -> list[float]:
    """Return the exponential moving average over about ``span`` steps, unbiased at the start."""
    return pd.Series(list(values), dtype=float).ewm(span=max(1.0, span)).mean().tolist()


def span_of(steps: int) -> int:
    """Return the number of steps to smooth a curve of ``steps`` steps over."""
    return max(5, min(500, steps // 40))


def loss(
    steps: Sequence[int],
    losses: Sequence[float | None],
    evaluations: Sequence[Evaluation],
    *,
    total: int = 0,
    run: str = "",
) -> go.Figure:
    """Draw the training loss raw and smoothed, and the held-out loss as diamonds.

    ``run`` keeps the zoom while points are added.
    """
    figure = go.Figure()
    drawn = thin(losses)
    figure.add_scatter(
        x=[steps[i] for i in drawn],
        y=[losses[i] for i in drawn],
        name="training loss",
        mode="lines",
        opacity=0.7,
        line={"color": palette.PROTECTED, "width": 1},
        hovertemplate="step %{x}: %{y:.4f}<extra>training</extra>",
    )
    means = smooth(losses, span_of(max(total, len(losses))))
    drawn = thin(means)
    figure.add_scatter(
        x=[steps[i] for i in drawn],
        y=[means[i] for i in drawn],
        name=f"smoothed over {span_of(max(total, len(losses)))} steps",
        mode="lines",
        line={"color": palette.KEPT, "width": 3},
        hovertemplate="step %{x}: %{y:.4f}<extra>smoothed</extra>",
    )
    figure.add_scatter(
        x=[e.step for e in evaluations],
        y=[e.heldout_loss for e in evaluations],
        name="held-out loss",
        mode="markers",
        cliponaxis=False,
        marker={
            "symbol": "diamond",
            "size": 12,
            "color": palette.DROPPED,
            "line": {"width": 1.5, "color": "#FFFFFF"},
        },
        hovertemplate="step %{x}: %{y:.4f}<extra>held out</extra>",
    )
    last = evaluations[-1] if evaluations else None
    for level, dash, name in (
        (last and last.heldout_loss_dense, "dash", "dense"),
        (last and last.heldout_loss_before, "dot", "pruned"),
    ):
        if level is not None:
            figure.add_scatter(
                x=[0, max([total, *steps, 1])],
                y=[level] * 2,
                name=f"{name}, held out: {level:.4f}",
                mode="lines",
                line={"dash": dash, "width": 2, "color": palette.PROTECTED},
                hoverinfo="skip",
            )
    figure.update_xaxes(title="step", range=[0, max([total, *steps, 1])])
    figure.update_yaxes(title="loss (nats per token)")
    palette.dress(figure, 420, uirevision=run)
    return figure


def curve(
    steps: Sequence[int],
    values: Sequence[float | None],
    title: str,
    *,
    total: int = 0,
    log: bool = False,
    run: str = "",
) -> go.Figure:
    """Draw one quantity against the step, thinned."""
    drawn = thin(values)
    figure = go.Figure(
        go.Scatter(
            x=[steps[i] for i in drawn],
            y=[values[i] for i in drawn],
            mode="lines",
            line={"color": palette.KEPT, "width": 1.5},
            hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="step", range=[0, max([total, *steps, 1])])
    figure.update_yaxes(type="log" if log else "linear", tickformat=",.3~r", rangemode="tozero")
    figure.update_layout(title={"text": title, "font": {"size": palette.FONT_SIZE + 1}})
    return palette.dress(figure, 230, uirevision=run, showlegend=False)


def recovery(evaluations: Sequence[Evaluation], *, total: int = 0) -> go.Figure:
    """Draw the recovered shares of loss and KL at every evaluation, with lines at 0 and 1."""
    found = [(e.step, e.recovered) for e in evaluations if e.recovered is not None]
    by_kl = [(e.step, e.recovered_kl) for e in evaluations if e.recovered_kl is not None]
    figure = go.Figure()
    for name, points, symbol, colour in (
        ("loss", found, "diamond", palette.DROPPED),
        ("KL to the dense model", by_kl, "circle", palette.KEPT),
    ):
        if points:
            figure.add_scatter(
                x=[step for step, _ in points],
                y=[share for _, share in points],
                name=name,
                mode="lines+markers",
                cliponaxis=False,
                marker={"symbol": symbol, "size": 10, "color": colour},
                line={"color": colour, "width": 1},
                hovertemplate=f"step %{{x}}: %{{y:.1%}}<extra>{name}</extra>",
            )
    for level, dash in ((0.0, "dot"), (1.0, "dash")):
        figure.add_hline(y=level, line={"dash": dash, "width": 2, "color": palette.PROTECTED})
    figure.update_xaxes(title="step", range=[0, max([total, *(s for s, _ in found), 1]) * 1.03])
    figure.update_yaxes(tickformat=".0%")
    text = "recovered (dashed: dense, dotted: pruned)"
    if by_kl:
        text = "recovered: loss (◆), KL (●)"
    figure.update_layout(title={"text": text, "font": {"size": palette.FONT_SIZE + 1}})
    return palette.dress(figure, 230, showlegend=False)


def by_tokens(
    points: Mapping[str, Sequence[tuple[float, float]]], fits: Mapping[str, Fit]
) -> go.Figure:
    """Draw shares recovered against tokens, and their continuation by the fitted power laws.

    ``points`` and ``fits`` are by measure (loss, KL); a fit is drawn with its interval.
    """
    figure = go.Figure()
    ends = [tokens for rows in points.values() for tokens, _ in rows]
    reach = np.linspace(0, 4 * max([*ends, 1.0]), 60)[1:]
    for name, rows in points.items():
        colour, symbol = LINES[name]
        figure.add_scatter(
            x=[tokens for tokens, _ in rows],
            y=[share for _, share in rows],
            name=f"{name}, measured",
            mode="markers",
            marker={"symbol": symbol, "size": 10, "color": colour},
            hovertemplate="%{x:,.0f} tokens: %{y:.1%}<extra>measured</extra>",
        )
        if name not in fits:
            continue
        shares = [fits[name].at(tokens) for tokens in reach]
        figure.add_scatter(
            x=[*reach, *reach[::-1]],
            y=[*(high for _, _, high in shares), *(low for _, low, _ in reversed(shares))],
            fill="toself",
            fillcolor=_faded(colour),
            line={"width": 0},
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=list(reach),
            y=[best for best, _, _ in shares],
            name=f"{name}, estimated",
            mode="lines",
            line={"color": colour, "dash": "dash", "width": 2},
            hovertemplate="%{x:,.0f} tokens: %{y:.1%}<extra>estimated</extra>",
        )
    figure.update_xaxes(title="tokens trained on", rangemode="tozero")
    figure.update_yaxes(title="share recovered", tickformat=".0%", rangemode="tozero")
    return palette.dress(figure, 320)


@drawn_once
def parallel(table: pd.DataFrame, columns: Sequence[str]) -> go.Figure:
    """Draw every row of a sweep as a line through its settings and results.

    The colour is the last of ``columns`` that has values; texts are numbered in their order.
    """
    shown = [name for name in columns if table[name].notna().any()]
    axes = []
    for name in shown:
        label = palette.literal(name.replace("_", " "))
        if pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool:
            axes.append({"label": label, "values": table[name].tolist()})
            continue
        texts = table[name].astype(str)
        known = list(dict.fromkeys(texts))
        axes.append(
            {
                "label": label,
                "values": [known.index(text) for text in texts],
                "tickvals": list(range(len(known))),
                "ticktext": [palette.literal(text) for text in known],
            }
        )
    colour = table[shown[-1]].tolist() if shown else []
    figure = go.Figure(
        go.Parcoords(line={"color": colour, "colorscale": "Viridis"}, dimensions=axes)
    )
    figure = palette.dress(figure, 360)
    figure.update_layout(margin={"l": 60, "r": 60, "t": 60, "b": 30})
    return figure


def _faded(colour: str) -> str:
    """Return a colour of the form #RRGGBB, for filled areas."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


@drawn_once
def rates(rows: Sequence[Rate], best: float | None = None) -> go.Figure:
    """Draw what a few steps at each learning rate recovered, by loss and by KL.

    ``best`` is the suggested rate.
    """
    figure = go.Figure()
    for name, colour, symbol, dash, values in (
        ("by loss", palette.KEPT, "circle", "solid", [row.recovered for row in rows]),
        ("by KL", palette.DROPPED, "square", "dash", [row.recovered_kl for row in rows]),
    ):
        if all(value is None for value in values):
            continue
        figure.add_scatter(
            x=[row.rate for row in rows],
            y=values,
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 10},
            hovertemplate="%{x:g}: %{y:.1%}<extra>" + name + "</extra>",
        )
    if best is not None:
        figure.add_vline(
            x=best,
            line={"dash": "dot", "width": 2, "color": palette.PROTECTED},
            annotation_text=f"best: {best:g}",
        )
    figure.update_xaxes(title="learning rate", type="log", tickvals=[row.rate for row in rows])
    figure.update_yaxes(title="share recovered", tickformat=".0%")
    return palette.dress(figure, 320)


@drawn_once
def recovered_bars(table: pd.DataFrame) -> go.Figure:
    """Draw the recovered shares of several retrained variants of one parent: bars by loss.

    Diamonds are the shares by KL. ``table`` has name, method and recovered (a share, or None if it
    is not reported), and may have ``recovered by KL``.
    """
    figure = go.Figure()
    for method, (colour, _, pattern) in METHODS.items():
        rows = table[(table["method"] == method) & table["recovered"].notna()]
        if rows.empty:
            continue
        figure.add_bar(
            x=rows["recovered"].tolist(),
            y=rows["name"].map(palette.literal).tolist(),
            orientation="h",
            name=method,
            text=[words.percent(share) for share in rows["recovered"]],
            textposition="auto",
            width=0.55,
            marker={"color": colour, "pattern": palette.hatch(pattern)},
            hovertemplate="%{y}: %{x:.1%} of the gap recovered<extra></extra>",
        )
    by_kl = "recovered by KL"
    rows = table[table[by_kl].notna()] if by_kl in table else table[:0]
    if len(rows):
        figure.add_scatter(
            x=rows[by_kl].tolist(),
            y=rows["name"].map(palette.literal).tolist(),
            mode="markers",
            name="by KL to dense",
            marker={"symbol": "diamond", "size": 12, "color": palette.DROPPED,
                    "line": {"width": 1.5, "color": "white"}},
            hovertemplate="%{y}: %{x:.1%} of the KL to dense closed<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=1.0, line={"dash": "dash", "width": 2, "color": palette.PROTECTED})
    title = "share recovered (dashed: dense; bars: loss, diamonds: KL)"
    if rows.empty:
        title = "share of the gap recovered (dashed: dense)"
    figure.update_xaxes(title=title, tickformat=".0%")
    order = table["name"].map(palette.literal).tolist()
    figure.update_yaxes(categoryorder="array", categoryarray=order, autorange="reversed")
    return palette.dress(figure, 130 + 42 * len(order), barmode="overlay", showlegend=True)


@drawn_once
def recipe(table: pd.DataFrame, value: str, title: str) -> go.Figure:
    """Draw one column of a recipe's table: a bar per variant, grouped by what it was evaluated on.

    ``table`` has variant, evaluated_on and ``value``; a column ``spread`` gives error bars.
    """
    figure = go.Figure()
    names = list(dict.fromkeys(table["variant"]))
    patterns = ("", "/", "x", ".", "-", "|", "+", "\\")
    for place, variant in enumerate(names):
        rows = table[table["variant"] == variant]
        error: dict[str, Any] = {}
        if "spread" in rows and rows["spread"].notna().any():
            error = {"error_y": {"type": "data", "array": rows["spread"].tolist()}}
        figure.add_bar(
            x=rows["evaluated_on"].map(palette.literal).tolist(),
            y=rows[value].tolist(),
            name=palette.literal(variant),
            text=[palette.number(v) if pd.notna(v) else "" for v in rows[value]],
            textposition="outside",
            cliponaxis=False,
            marker={
                "color": SERIES[place % len(SERIES)],
                "pattern": palette.hatch(patterns[place % len(patterns)]),
            },
            hovertemplate=f"{palette.literal(variant)}, %{{x}}: %{{y:.4g}}<extra></extra>",
            **error,
        )
    figure.update_yaxes(title=title)
    return palette.dress(figure, 380, barmode="group")


FIELDS = {
    "training loss": "loss",
    "held-out loss": "heldout_loss",
    "recovered": "recovered",
    "recovered by KL": "recovered_kl",
}
"""What runs can be overlaid by -> field of a `Step` or an `Evaluation`."""
LOOKS = tuple(
    (colour, dash)
    for dash in ("solid", "dash", "dot")
    for colour in (palette.KEPT, palette.DROPPED, palette.ACCENT)
)
"""Colour and dash of every overlaid run, in their order."""


@drawn_once
def overlay(runs: Mapping[str, Sequence[Step] | Sequence[Evaluation]], what: str) -> go.Figure:
    """Draw one quantity of several runs against the step; ``what`` is one of `FIELDS`.

    The training loss is smoothed and thinned; evaluations are marked.
    """
    field, figure = FIELDS[what], go.Figure()
    for place, (name, rows) in enumerate(runs.items()):
        colour, dash = LOOKS[place % len(LOOKS)]
        points = [(r.step, value) for r in rows if (value := getattr(r, field)) is not None]
        steps, values = [step for step, _ in points], [value for _, value in points]
        if what == "training loss":
            values = smooth(values, span_of(len(values)))
            kept = thin(values)
            steps, values = [steps[i] for i in kept], [values[i] for i in kept]
        figure.add_scatter(
            x=steps,
            y=values,
            name=palette.literal(name),
            mode="lines" if what == "training loss" else "lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"color": colour, "size": 8},
            hovertemplate="step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )
    share = what.startswith("recovered")
    figure.update_xaxes(title="step")
    figure.update_yaxes(
        title=what if share else f"{what} (nats per token)", tickformat=".0%" if share else None
    )
    return palette.dress(figure, 380, showlegend=True)
