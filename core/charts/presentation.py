"""The figure of the Presentation page: the gain and the cost of dropping blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from core.charts import palette
from core.charts.memo import drawn_once
from core.compare.headline import Stop
from core.compare.speed import NOISY

BIG = 20
"""Font size in pixels, readable from the back row."""


@dataclass(frozen=True)
class Line:
    """How one quantity is drawn; every line has its own colour, dash and symbol."""

    field: str
    label: str
    colour: str
    dash: str
    symbol: str


LINES = (
    Line("speed", "speed", palette.ACCENT, "solid", "triangle-up"),
    Line("memory", "memory", palette.KEPT, "dash", "square"),
    Line("ppl", "perplexity", palette.DROPPED, "dot", "circle"),
)


@drawn_once
def payoff(found: Sequence[Stop], at: Stop) -> go.Figure:
    """Draw speed, memory and perplexity relative to dense against the parameters removed.

    Perplexity is always measured. Estimated speed and memory are hollow. A star is what retraining
    made of the perplexity. A speed that was measured too noisily is left out. ``at`` is marked, and
    its values stand beside its points.
    """
    figure = go.Figure()
    values = [1.0]
    for line in LINES:
        noisy = NOISY if line.field == "speed" else math.inf
        known = [s for s in found if getattr(s, line.field) and (s.noise or 0.0) <= noisy]
        points = [(s, getattr(s, line.field)) for s in known]
        if not points:
            continue
        values += [v for _, v in points]
        hollow = [line.field != "ppl" and s.cost == "estimated" for s, _ in points]
        figure.add_scatter(
            x=[0.0, *(s.ratio for s, _ in points)],
            y=[1.0, *(v for _, v in points)],
            name=line.label,
            mode="lines+markers",
            line={"color": line.colour, "width": 5, "dash": line.dash},
            marker={
                "size": [0, *(18 if s == at else 12 for s, _ in points)],
                "symbol": [line.symbol, *(line.symbol + "-open" * h for h in hollow)],
                "color": line.colour,
                "line": {"width": 3, "color": line.colour},
            },
            hovertemplate=f"%{{x:.1%}} removed: {line.label} %{{y:.2f}} x dense<extra></extra>",
        )
    retrained = [s for s in found if s.retrained_ppl]
    if retrained:
        values += [s.retrained_ppl for s in retrained if s.retrained_ppl]
        figure.add_scatter(
            x=[s.ratio for s in retrained],
            y=[s.retrained_ppl for s in retrained],
            name="perplexity after retraining",
            mode="markers",
            marker={"size": 20, "symbol": "star", "color": palette.DROPPED},
            hovertemplate="after retraining: %{y:.2f} x dense<extra></extra>",
        )
    figure.add_vline(x=at.ratio, line={"dash": "dot", "width": 3, "color": palette.PROTECTED})
    figure.add_hline(y=1, line={"width": 2, "color": palette.PROTECTED})
    low, high = min(values), max(values)
    pad = 1.12
    figure.update_yaxes(
        title="relative to the dense model",
        type="log",
        range=[math.log10(low / pad), math.log10(high * pad)],
        **_ticks(low / pad, high * pad),
    )
    most = max(s.ratio for s in found)
    figure.update_xaxes(
        title="parameters removed", tickformat=".0%", range=[-0.01 * most, 1.04 * most]
    )
    palette.dress(figure, 430)
    figure.update_layout(legend={"font": {"size": BIG}}, margin={"t": 50}, dragmode=False)
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(tickfont={"size": BIG}, title_font={"size": BIG})
    return figure


def _ticks(low: float, high: float) -> dict[str, list[float] | list[str]]:
    """Return ticks labelled as factors: 0.5 x, 1 x, 2 x."""
    steps: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10, 30, 100, 300, 1000)
    if high / low < 1.8:
        steps = tuple(n / 10 for n in range(1, 31))
    shown = [t for t in steps if low <= t <= high]
    return {"tickvals": shown, "ticktext": [f"{t:g} x" for t in shown]}
