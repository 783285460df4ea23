"""Figures of the Prune page: perplexity against the number of blocks removed, and block strips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from core.charts import palette
from core.prune.outlook import Line, Quality

MARKS = {"A": ("star", palette.DROPPED), "B": ("diamond", "#E69F00")}
"""Symbol and colour of the two plans."""
_COLOURS = {"dropped": palette.DROPPED, "protected": palette.PROTECTED, "kept": palette.KEPT}
_PATTERNS = {"dropped": "x", "protected": "/", "kept": ""}


def curve(
    lines: Sequence[Line],
    plans: Mapping[str, tuple[int, Quality | None]],
    dense_ppl: float | None,
) -> go.Figure:
    """Draw perplexity (log axis) against blocks removed, with each plan's point on it.

    Measured points are filled and joined by a solid line, estimated ones hollow and dotted.
    """
    figure = go.Figure()
    for line in lines:
        measured = line.kind == "measured"
        colour = palette.CRITERIA.get(line.name.replace("-", "_"), palette.ACCENT)
        figure.add_scatter(
            x=[p[0] for p in line.points],
            y=[p[1] for p in line.points],
            customdata=[[", ".join(map(str, p[2])) or "none"] for p in line.points],
            name=f"{palette.literal(line.name)}, {line.kind}",
            mode="lines+markers",
            line={"color": colour, "width": 2.5 if measured else 1.5}
            | {"dash": "solid" if measured else "dot"},
            marker={"size": 8, "symbol": "circle" if measured else "circle-open"},
            hovertemplate="%{x} removed: %{y:.4g}<br>blocks %{customdata[0]}"
            f"<extra>{line.kind}</extra>",
        )
    for name, (count, quality) in plans.items():
        if quality is None:
            continue
        symbol, colour = MARKS[name]
        hollow = quality.kind != "measured"
        figure.add_scatter(
            x=[count],
            y=[quality.ppl],
            name=f"plan {name}, {quality.kind}",
            mode="markers+text",
            text=[name],
            textposition="top center" if name == "A" else "bottom center",
            textfont={"size": 15, "color": colour},
            marker={
                "symbol": symbol + ("-open" if hollow else ""),
                "size": 17,
                "color": colour,
                "line": {"width": 2, "color": colour},
            },
            hovertemplate=f"plan {name}: %{{y:.4g}} with %{{x}} removed"
            f"<extra>{quality.kind}</extra>",
        )
    if dense_ppl:
        palette.dense_line(figure, dense_ppl)
    values = [y for trace in figure.data for y in trace.y] + ([dense_ppl] if dense_ppl else [])
    figure.update_yaxes(type="log", title="perplexity", **log_axis(values))
    most = max((x for trace in figure.data for x in trace.x), default=1) or 1
    figure.update_xaxes(
        title="blocks removed",
        tickformat="d",
        dtick=1 if most <= 12 else None,
        range=[-0.04 * most, 1.04 * most],  # room for whole markers at both ends
    )
    figure.update_layout(
        height=380,
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        font={"size": 13},
        legend={"orientation": "h", "y": 1.1, "yanchor": "bottom", "x": 0},
    )
    return figure


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return range and real tick values of a log axis over ``values``; empty without values.

    Plotly labels a narrow log axis with bare digits ("2, 5"); these are whole numbers, 1, 2 or 5
    times a power of ten, or evenly spaced ones if that gives fewer than three.
    """
    finite = [v for v in values if v and v > 0 and math.isfinite(v)]
    if not finite:
        return {}
    low, high = math.log10(min(finite)), math.log10(max(finite))
    pad = max(0.08 * (high - low), 0.03)
    low, high = low - pad, high + 1.8 * pad
    first, last = math.floor(low), math.ceil(high)
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in steps]
    ticks = [t for t in ticks if low <= math.log10(t) <= high]
    if len(ticks) < 3:
        rough = (10**high - 10**low) / 4
        size = 10.0 ** math.floor(math.log10(rough))
        step = min((m * size for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
        start = math.ceil(10**low / step)
        ticks = [i * step for i in range(start, int(10**high / step) + 1)]
    return {"range": [low, high], "tickvals": ticks, "ticktext": [f"{t:,.6g}" for t in ticks]}


def block_strip(
    blocks: int,
    plans: Mapping[str, Sequence[int]],
    protected: Sequence[int] = (),
    *,
    height: int | None = None,
) -> go.Figure:
    """Draw one row of cells per plan: kept, dropped (with their rank) and protected blocks.

    Each cell's customdata is [block, plan], so a click on it names both.
    """
    figure = go.Figure()
    names = list(plans)
    for row, name in enumerate(reversed(names)):
        rank = {b: at + 1 for at, b in enumerate(plans[name])}
        kinds = ["dropped" if b in rank else _kind(b, protected) for b in range(blocks)]
        figure.add_bar(
            x=list(range(blocks)),
            y=[0.8] * blocks,
            base=[row - 0.4] * blocks,
            width=0.86,
            name=palette.literal(name),
            showlegend=False,
            customdata=[[b, name, kinds[b]] for b in range(blocks)],
            text=[f"{rank[b]}" if b in rank and blocks <= 40 else "" for b in range(blocks)],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "#000000", "size": 14, "weight": 700},
            marker={
                "color": [_COLOURS[k] for k in kinds],
                "pattern": {
                    "shape": [_PATTERNS[k] for k in kinds],
                    "fgcolor": "#FFFFFF",
                    "fillmode": "overlay",
                    "solidity": 0.2,
                    "size": 8,
                },
            },
            selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 1}},
            hovertemplate="block %{customdata[0]}: %{customdata[2]}"
            f"<extra>plan {palette.literal(name)}</extra>",
        )
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[f"<b>{palette.literal(n)}</b>" for n in reversed(names)],
        tickfont={"size": 15},
        range=[-0.5, len(names) - 0.5],
        showgrid=False,
        zeroline=False,
        fixedrange=True,
    )
    figure.update_xaxes(title="block", **palette.counting_axis(blocks), showgrid=False)
    figure.update_layout(
        barmode="overlay",
        clickmode="event+select",
        dragmode=False,
        height=height or 90 + 46 * len(names),
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        font={"size": 13},
    )
    return figure


def _kind(block: int, protected: Sequence[int]) -> str:
    return "protected" if block in protected else "kept"
