"""One palette for all charts: Okabe and Ito's colours, readable with every colour vision."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

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


def layout(height: int, **more: Any) -> dict[str, Any]:
    """Return the layout that all figures share."""
    return {
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 36, "b": 10},
        "font": {"size": FONT_SIZE},
        "legend": {"orientation": "h", "y": 1.08, "yanchor": "bottom", "x": 0},
        **more,
    }


def dress(figure: go.Figure, height: int, **more: Any) -> go.Figure:
    """Give a figure the common layout, and axes that can be read on a projector; returns it."""
    figure.update_layout(**layout(height, **more))
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(tickfont={"size": FONT_SIZE}, title_font={"size": FONT_SIZE + 1})
    return figure


def number(value: float) -> str:
    """Return a value of a scale as people write it: 7,904 or 0.0138, no powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def dense_line(figure: go.Figure, value: float) -> None:
    """Draw the dense perplexity as a dashed line that shows on bars and on both themes.

    Its label stands above the plot, where no bar can be in its way.
    """
    for dash, width, colour in (("solid", 4, "#FFFFFF"), ("dash", 2, "#333333")):
        figure.add_hline(y=value, line={"dash": dash, "width": width, "color": colour})
    figure.add_annotation(
        xref="paper",
        x=1,
        xanchor="right",
        yref="paper",
        y=1,
        yanchor="bottom",
        text=f"dashed: dense {value:,.4g}",
        font={"size": FONT_SIZE},
        showarrow=False,
    )
