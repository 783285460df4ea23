"""Figures of the Prune page: perplexity against the number of blocks removed, and block strips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from core import criteria
from core.charts import palette
from core.charts.memo import drawn_once
from core.charts.sketch import Sketch
from core.checkpoint.drop import PARTS, Removal
from core.prune.outlook import Line, Quality

MARKS = {"A": ("star", palette.DROPPED), "B": ("diamond", "#E69F00")}
"""Symbol and colour of the two plans."""
_COLOURS = {
    "dropped": palette.DROPPED,
    "protected": palette.PROTECTED,
    "kept": palette.KEPT,
    "narrower": palette.KEPT,
}
_PATTERNS = {"dropped": "x", "protected": "/", "kept": "", "narrower": "-"}


@drawn_once
def curve(
    lines: Sequence[Line],
    plans: Mapping[str, tuple[float, Quality | None]],
    dense_ppl: float | None,
) -> go.Figure:
    """Draw perplexity (log axis) against blocks removed, with each plan's point on it.

    Measured points are filled and joined by a solid line, estimated ones hollow and dotted. A part
    of a block counts as half of one.
    """
    figure = Sketch()
    for line in lines:
        measured = line.kind == "measured"
        colour = palette.CRITERIA.get(line.name.replace("-", "_"), palette.ACCENT)
        figure.add_scatter(
            x=[p[0] for p in line.points],
            y=[p[1] for p in line.points],
            customdata=[[p[2] or "none"] for p in line.points],
            name=f"by {palette.literal(criteria.SHORT.get(line.name, line.name))}, {line.kind}",
            mode="lines+markers",
            line={"color": colour, "width": 2.5 if measured else 1.5}
            | {"dash": "solid" if measured else "dot"},
            marker={"size": 8, "symbol": "circle" if measured else "circle-open"},
            hovertemplate="%{x} removed: %{y:.4g}<br>%{customdata[0]}"
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
        palette.dense_line(figure, dense_ppl, below=True)
    values = [y for t in figure.data for y in t["y"]] + ([dense_ppl] if dense_ppl else [])
    figure.update_yaxes(type="log", title="perplexity", **log_axis(values))
    most = max((x for trace in figure.data for x in trace["x"]), default=1) or 1
    figure.update_xaxes(
        title="blocks removed",
        tickformat="d",
        dtick=1 if most <= 12 else None,
        range=[-0.04 * most, 1.04 * most],  # room for whole markers at both ends
    )
    figure.update_layout(
        height=380,
        font={"size": 13},
        legend={"orientation": "h", "y": 1.1, "yanchor": "bottom", "x": 0},
    )
    return palette.steady(figure, 78, top=60).finished()


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


@drawn_once
def block_strip(
    blocks: int,
    plans: Mapping[str, Removal | Sequence[int]],
    protected: Sequence[int] = (),
    *,
    height: int | None = None,
    named: bool = True,
) -> go.Figure:
    """Draw one row of cells per plan: kept, dropped (with their rank) and protected blocks.

    Of a block without attention the upper half is crossed out, without its MLP the lower one. Each
    cell's customdata is [block, plan], so a click on it names both. Beside its row stands the
    plan's name if ``named``.
    """
    figure = Sketch()
    names = list(plans)
    for row, name in enumerate(reversed(names)):
        plan = plans[name]
        removal = plan if isinstance(plan, Removal) else Removal(tuple(plan))
        rank = {b: at + 1 for at, b in enumerate(removal.drop)}
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
                "pattern": palette.hatch([_PATTERNS[k] for k in kinds], solidity=0.2, size=8),
            },
            selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 1}},
            hovertemplate="block %{customdata[0]}: %{customdata[2]}"
            f"<extra>plan {palette.literal(name)}</extra>",
        )
        _add_halves(figure, row, removal, palette.literal(name))
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[f"<b>{palette.literal(n)}</b>" for n in reversed(names)],
        tickfont={"size": 15},
        range=[-0.5, len(names) - 0.5],
        showgrid=False,
        zeroline=False,
        fixedrange=True,
        visible=None if named else False,
    )
    figure.update_xaxes(title="block", **palette.counting_axis(blocks), showgrid=False)
    figure.update_xaxes(range=[-0.6, blocks - 0.4])
    figure.update_layout(
        barmode="overlay",
        clickmode="event+select",
        dragmode=False,
        height=height or 90 + 46 * len(names),
        font={"size": 13},
    )
    return palette.steady(figure, 40).finished()


def _add_halves(figure: Sketch, row: int, removal: Removal, plan: str) -> None:
    """Cross out half of the cells of blocks that lose one part."""
    for part, low in (("attention", 0.0), ("mlp", -0.4)):
        if not (gone := list(getattr(removal, part))):
            continue
        figure.add_bar(
            x=gone,
            y=[0.4] * len(gone),
            base=[row + low] * len(gone),
            width=0.86,
            showlegend=False,
            customdata=[[b, plan, f"without {PARTS[part]}"] for b in gone],
            marker={
                "color": palette.DROPPED,
                "pattern": palette.hatch("x", solidity=0.2, size=6),
            },
            selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 1}},
            hovertemplate=f"block %{{customdata[0]}}: %{{customdata[2]}}<extra>plan {plan}</extra>",
        )


PARTS_PX = 80
"""Height of the two rows of parts."""
_PART_ROWS = {"attention": 1, "mlp": 0}


@drawn_once
def with_part_rows(
    figure: go.Figure,
    removal: Removal,
    protected: Sequence[int],
    lacking: Removal,
) -> go.Figure:
    """Return a figure over the blocks with two rows beneath: their attention and their MLP.

    Each cell's customdata is [block, attention or mlp, state], so a click on it names both. Parts
    of ``lacking`` are not in the checkpoint.
    """
    # The parts of a figure, which are not checked again: that takes longer than all the rest here,
    # and every click on a block waits for it.
    parts = figure.to_dict()
    blocks = len(figure.data[0].x)
    for part, row in _PART_ROWS.items():
        kinds = []
        for block in range(blocks):
            gone = removal.misses(block, part)
            kind = "removed" if gone else _kind(block, protected)
            if part == "mlp" and block in removal.neurons:
                kind = f"narrower, {removal.neurons[block]:,} neurons left"
            kinds.append("missing" if block in getattr(lacking, part) else kind)
        bars = {
            "type": "bar",
            "x": list(range(blocks)),
            "y": [0.84] * blocks,
            "base": [row - 0.42] * blocks,
            "width": 0.86,
            "yaxis": "y2",
            "name": PARTS[part],
            "showlegend": False,
            "customdata": [[b, part, kinds[b]] for b in range(blocks)],
            "marker": {
                "color": [_COLOURS.get(_look(k), "rgba(0,0,0,0)") for k in kinds],
                "line": {"width": [1 if k == "missing" else 0 for k in kinds], "color": "#888888"},
                "pattern": palette.hatch(
                    [_PATTERNS.get(_look(k), "") for k in kinds], solidity=0.2, size=7
                ),
            },
            "selected": {"marker": {"opacity": 1}},
            "unselected": {"marker": {"opacity": 1}},
            "hovertemplate": f"{PARTS[part]} of block %{{customdata[0]}}: %{{customdata[2]}}"
            "<extra></extra>",
        }
        parts["data"].append(bars)
    layout = parts["layout"]
    height = (layout.get("height") or 340) + PARTS_PX + 10
    share = PARTS_PX / (height - 100)  # without legend, axis title and margins
    layout |= {
        "yaxis": layout.get("yaxis", {}) | {"domain": [share + 0.06, 1]},
        "yaxis2": {
            "domain": [0, share],
            "tickvals": list(_PART_ROWS.values()),
            "ticktext": ["attn", "MLP"],
            "automargin": False,
            "range": [-0.5, 1.5],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        "xaxis": layout.get("xaxis", {}) | {"anchor": "y2"},
        "barmode": "overlay",
        "height": height,
        "margin": layout.get("margin", {}) | {"l": 78},
    }
    return go.Figure(parts, _validate=False)


_AS = {"removed": "dropped"}
"""State of a part -> the state of a block that looks the same."""


def _look(kind: str) -> str:
    return "narrower" if kind.startswith("narrower") else _AS.get(kind, kind)


def _kind(block: int, protected: Sequence[int]) -> str:
    return "protected" if block in protected else "kept"
