"""Figures of a search: how the best sets came down, and which pairs belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from core.charts import palette
from core.charts.prune import log_axis
from core.search.results import Found, PairRow, interactions

OBJECTIVES = {"kl": "KL from the dense model", "nll": "loss"}
"""What a search minimises, in words; in nats per token."""
STRONG = 0.1
"""Share of a pair's cost from which on its interaction is called one."""


def best_curve(found: Sequence[Found], objective: str) -> go.Figure:
    """Draw the best cost so far (log axis) against block passes: a line per number of blocks.

    Markers show which method found the improvement.
    """
    figure = go.Figure()
    end = max((one.passes for one in found), default=0)
    better = _improvements(found)
    for count in sorted({one.count for one in better}):
        x = [one.passes for one in better if one.count == count]
        y = [one.best for one in better if one.count == count]
        figure.add_scatter(
            x=[*x, 1.02 * end],
            y=[*y, y[-1]],
            mode="lines+text",
            line={"shape": "hv", "color": palette.PROTECTED, "width": 1.5},
            text=[""] * len(x) + [f" {count} out"],
            textposition="middle right",
            textfont={"size": palette.FONT_SIZE},
            cliponaxis=False,
            hoverinfo="skip",
            showlegend=False,
        )
    for method, (colour, symbol) in palette.SEARCH.items():
        own = [one for one in better if one.method == method]
        if own:
            figure.add_scatter(
                x=[one.passes for one in own],
                y=[one.best for one in own],
                customdata=[[one.count] for one in own],
                mode="markers",
                name=method,
                marker={"color": colour, "symbol": symbol, "size": 11},
                hovertemplate=f"{method}, %{{customdata[0]}} out: %{{y:.4g}} nats after %{{x:,}} "
                "block passes<extra></extra>",
            )
    figure.update_yaxes(
        type="log",
        title=f"best {OBJECTIVES.get(objective, objective)}, nats",
        **log_axis([one.best for one in found]),
    )
    figure.update_xaxes(title="block passes", rangemode="tozero")
    margin = {"l": 10, "r": 60, "t": 36, "b": 10}
    return palette.dress(figure, 380, margin=margin)


def _improvements(found: Sequence[Found]) -> list[Found]:
    """Return the sets that were better than all before them of their size."""
    best: dict[int, float] = {}
    better: list[Found] = []
    for one in found:
        if math.isfinite(one.best) and one.best < best.get(one.count, math.inf):
            best[one.count] = one.best
            better.append(one)
    return better


def pair_words(row: PairRow, objective: str, dense: float = 0.0) -> str:
    """Describe what removing two blocks costs compared with the two alone, in plain words.

    ``dense`` is the objective of the whole model: 0 for KL.
    """
    value = row.kl if objective == "kl" else row.nll
    name, beyond = f"Blocks {row.block_a} and {row.block_b}", row.interaction
    if beyond is None or value is None:
        return f"{name} were not measured"
    both, alone = value - dense, value - dense - beyond
    sizes = f"({both:.4g} against {alone:.4g} nats)"
    if abs(beyond) < STRONG * max(abs(both), abs(alone)):
        return (
            f"{name} are independent:<br>removing both costs about the sum of each alone<br>{sizes}"
        )
    says, more = ("stand in for each other", "more") if beyond > 0 else ("go well together", "less")
    return (
        f"{name} {says}:<br>removing both costs {abs(beyond):.4g} nats {more}<br>"
        f"than the sum of each alone {sizes}"
    )


def extremes(rows: Sequence[PairRow], most: int) -> str:
    """Name the pairs that stand in for each other most, and those that go together best."""
    known = [(row.interaction, row) for row in rows if row.interaction is not None]
    known.sort(key=lambda pair: pair[0])
    ends = (
        ("Stand in for each other most", [p for p in known[::-1][:most] if p[0] > 0]),
        ("Cheapest together", [p for p in known[:most] if p[0] < 0]),
    )
    return " ".join(
        f"{title}: "
        + ", ".join(f"{row.block_a} and {row.block_b} ({beyond:+.3g})" for beyond, row in some)
        + "."
        for title, some in ends
        if some
    )


def interaction_heatmap(
    rows: Sequence[PairRow],
    objective: str,
    *,
    dense: float = 0.0,
    dropped: Sequence[int] = (),
) -> go.Figure:
    """Draw what every pair costs beyond the sum of both alone; zero is the neutral colour.

    Each cell can be clicked: its customdata begins with both blocks. ``dropped`` blocks are crossed
    out on the diagonal. A few extreme pairs share the last colour of the scale.
    """
    known = [row for row in rows if row.interaction is not None]
    blocks = sorted({b for row in known for b in (row.block_a, row.block_b)})
    size = max(blocks, default=0) + 1
    matrix = interactions(known, size)
    sizes = sorted(abs(row.interaction) for row in known if row.interaction is not None)
    top = (sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1e-9
    cut = bool(sizes) and sizes[-1] > top
    ends = [-top, 0.0, top]
    words = [f"{'+' if v > 0 else ''}{palette.number(v)}" if v else "0" for v in ends]
    if cut:
        words[0], words[-1] = f"\u2264 {words[0]}", f"\u2265 {words[-1]}"
    figure = go.Figure(
        go.Heatmap(
            z=[[matrix[a][b] for b in blocks] for a in blocks],
            x=blocks,
            y=blocks,
            zmin=-top,
            zmax=top,
            xgap=1,
            ygap=1,
            colorscale=palette.DIVERGING,
            colorbar=palette.colour_bar(
                "nats beyond the sum of both alone",
                tickvals=ends,
                ticktext=words,
                len=0.8,
                tickangle=0,
            ),
            hoverinfo="skip",
        )
    )
    hover = {
        (a, b): pair_words(row, objective, dense)
        for row in known
        for a, b in ((row.block_a, row.block_b), (row.block_b, row.block_a))
    }
    cells = list(hover)
    figure.add_scatter(
        x=[b for _, b in cells],
        y=[a for a, _ in cells],
        mode="text",
        # Points without a size: see `core.charts.importance.taylor_heatmap`.
        text=" ",
        customdata=[[a, b, hover[a, b]] for a, b in cells],
        hovertemplate="%{customdata[2]}<extra></extra>",
        showlegend=False,
    )
    chosen = [b for b in dropped if b in blocks]
    figure.add_scatter(
        x=chosen,
        y=chosen,
        mode="markers",
        hoverinfo="skip",
        showlegend=False,
        marker={"symbol": "x", "size": 9, "color": palette.DROPPED},
    )
    edges = [blocks[0] - 0.5, blocks[-1] + 0.5] if blocks else [0, 1]
    plain = {"showgrid": False, "zeroline": False, "tickformat": "d"}
    figure.update_xaxes(range=edges, nticks=14, tickangle=0, **plain)
    step = 1 if len(blocks) <= 24 else 2
    figure.update_yaxes(title="block", range=edges[::-1], dtick=step, **plain)
    pad = {"clickmode": "event+select", "dragmode": False, "hoverdistance": 1000}
    figure.add_annotation(
        text="block", xref="paper", x=0.5, yref="paper", y=0, yshift=-48, showarrow=False,
        font={"size": palette.FONT_SIZE + 1},
    )  # fmt: skip
    height = min(720, 260 + 18 * len(blocks))
    return palette.dress(figure, height, **pad, **palette.BELOW_BAR)
