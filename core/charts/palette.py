"""One palette for all charts: Okabe and Ito's colours, safe for colour-blind readers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, TypeVar

import plotly.graph_objects as go

from core.charts.sketch import Sketch
from core.words import rounded

F = TypeVar("F", go.Figure, Sketch)
KEPT = "#0072B2"
DROPPED = "#D55E00"
PROTECTED = "#999999"
ACCENT = "#009E73"
SCALE = "Cividis"
FONT_SIZE = 13

CRITERIA = {
    "ppl": "#0072B2",
    "taylor": "#D55E00",
    "magnitude": "#009E73",
    "block_influence": "#CC79A7",
    "relative_update": "#E69F00",
}

SEARCH = {
    "one-shot": ("#0072B2", "circle"),
    "greedy": ("#D55E00", "square"),
    "beam": ("#009E73", "diamond"),
    "pairs": ("#CC79A7", "triangle-up"),
    "evolve": ("#E69F00", "star"),
}
"""Colour and symbol of each method of search."""
DIVERGING = [[0.0, "#0072B2"], [0.5, "#F2F2F2"], [1.0, "#D55E00"]]
"""Scale around zero; apart also without colour vision."""


def literal(text: object) -> str:
    """Escape a text from outside (a run's, checkpoint's or task's name) for a figure.

    Plotly renders tags, entities, ``%{...}`` and TeX in names, labels and tooltips. `html.unescape`
    gives the text back.
    """
    return html.escape(str(text), quote=False).replace("$", "&#36;").replace("%{", "%&#123;")


def layout(height: int, **more: Any) -> dict[str, Any]:
    """Return the layout that all figures share."""
    return {
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 36, "b": 10},
        "font": {"size": FONT_SIZE},
        "legend": {"orientation": "h", "y": 1.08, "yanchor": "bottom", "x": 0},
        **more,
    }


def dress(figure: F, height: int, **more: Any) -> F:
    """Give a figure the common layout and axes that are readable on a projector; returns it."""
    figure.update_layout(**layout(height, **more))
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(tickfont={"size": FONT_SIZE}, title_font={"size": FONT_SIZE + 1})
    return figure


def hatch(shape: str | Sequence[str], **more: float) -> dict[str, Any]:
    """Return a pattern drawn over a bar's own colour, so that the bar stays filled."""
    return {"shape": shape, "fgcolor": "#FFFFFF", "fillmode": "overlay", **more}


def category_step(count: int) -> int:
    """Return the distance of labels on an axis of categories, so that they do not touch."""
    return 1 if count <= 24 else 4 if count <= 64 else 10


def log_bar(title: str, low: float, high: float, *, more: bool = False) -> dict[str, Any]:
    """Return a `colour_bar` of logarithms to base ten, labelled with the values themselves.

    ``more``: the scale ends at ``high`` though there are larger values.
    """
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    words = [number(10**t) for t in ticks]
    words[-1] += " or more" if more else ""
    return colour_bar(title, tickvals=ticks, ticktext=words)


BELOW_BAR = {
    "margin": {"l": 10, "r": 10, "t": 80, "b": 56},
    "xaxis": {"automargin": False, "title": {"standoff": 30}},
}
"""Space for `colour_bar`; if Plotly makes it automatically, it misplaces the axis title."""


def steady(figure: F, left: int, bottom: int = 48, top: int = 10) -> F:
    """Give a figure margins of fixed pixels; returns it.

    Plotly would measure the labels, draw again, and leave a gap below; on a page that draws several
    charts with every click that is a third of the browser's work on them.
    """
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(automargin=False)
    figure.update_layout(margin={"l": left, "r": 10, "t": top, "b": bottom})
    return figure


def counting_axis(count: int) -> dict[str, Any]:
    """Return an axis of whole numbers up to ``count``: all if they fit, else as many as do."""
    return {"dtick": 1} if count <= 24 else {"tickformat": "d"}


def colour_bar(title: str, **more: Any) -> dict[str, Any]:
    """Return a colour bar that lies above its plot, so that a narrow screen keeps its width."""
    return {
        "title": {"text": title, "side": "top"},
        "orientation": "h",
        "thickness": 12,
        "y": 1.02,
        "yanchor": "bottom",
        **more,
    }


def number(value: float) -> str:
    """Return a tick label as people write it: 7,904 or 0.0138, without powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def dense_line(figure: go.Figure | Sketch, value: float, *, below: bool = False) -> None:
    """Draw the dense perplexity as a dashed line that shows on bars and on both themes.

    Its label stands above the plot, out of the way of the bars. ``below``: beneath lines and
    markers, which it would hide.
    """
    strokes = (("solid", 4, "#FFFFFF"), ("dash", 2, "#333333"))
    for dash, width, colour in (("dash", 2, PROTECTED),) if below else strokes:
        figure.add_shape(  # what add_hline adds, in a quarter of its time
            type="line",
            **{"xref": "x domain", "x0": 0, "x1": 1, "yref": "y", "y0": value, "y1": value},
            line={"dash": dash, "width": width, "color": colour},
            layer="below" if below else "above",
        )
    figure.add_annotation(
        xref="paper",
        x=1,
        xanchor="right",
        yref="paper",
        y=1,
        yanchor="bottom",
        text=f"dashed: dense {rounded(value)}",
        font={"size": FONT_SIZE},
        showarrow=False,
    )
