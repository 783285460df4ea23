"""Figures of budgets: what every block becomes, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from core.charts import palette
from core.charts.prune import log_axis
from core.prune.budgets import Library
from core.prune.version_results import MLP_SHARES, VERSIONS, WHOLE, PlanCheck

_ROWS = {"attention": 1, "mlp": 0}
_LEFT = {
    WHOLE: (1.0, 1.0),
    "drop": (0.0, 0.0),
    "no-attention": (0.0, 1.0),
    "no-mlp": (1.0, 0.0),
    **{name: (1.0, share) for name, share in MLP_SHARES.items()},
}
"""Version -> share of the attention and of the MLP that is left."""
CELL = 0.84


def versions(library: Library, choice: Sequence[str], protected: Sequence[int] = ()) -> go.Figure:
    """Draw what every block becomes: its attention and its MLP, filled as far as they are left.

    Above them stand the KL that each change costs alone. Hovering over a block tells what else it
    could become. Protected blocks are grey and hatched.
    """
    blocks = list(range(library.blocks))
    figure = go.Figure()
    words = [_words(library, block, choice[block], block in protected) for block in blocks]
    colours = [palette.PROTECTED if b in protected else palette.KEPT for b in blocks]
    for part, row in _ROWS.items():
        left = [_LEFT[version][1 - row] for version in choice]
        low = row - CELL / 2
        for name, heights, bases, colour, shapes in (
            (
                f"{part} left", [CELL * v for v in left], [low] * len(blocks), colours,
                ["/" if b in protected else "" for b in blocks],
            ),
            (
                f"{part} removed", [CELL * (1 - v) for v in left],
                [low + CELL * v for v in left], palette.DROPPED, ["x"] * len(blocks),
            ),
        ):  # fmt: skip
            figure.add_bar(
                x=blocks,
                y=heights,
                base=bases,
                width=0.86,
                name=name,
                showlegend=False,
                yaxis="y2",
                customdata=[[text] for text in words],
                marker={
                    "color": colour,
                    "line": {"width": 0},
                    "pattern": palette.hatch(shapes, solidity=0.2, size=7),
                },
                hovertemplate="%{customdata[0]}<extra></extra>",
            )
    costs = [library.kl(block, choice[block]) for block in blocks]
    figure.add_bar(
        x=blocks,
        y=costs,
        width=0.86,
        name="KL alone",
        showlegend=False,
        customdata=[[text] for text in words],
        marker={"color": palette.DROPPED, "line": {"width": 0}},
        hovertemplate="%{customdata[0]}<extra></extra>",
    )
    figure.update_layout(
        barmode="overlay",
        yaxis={
            "domain": [0.5, 1],
            "title": "KL alone, nats",
            "rangemode": "tozero",
            "exponentformat": "none",
            "nticks": 4,
            "range": None if any(costs) else [0, 1],
        },
        yaxis2={
            "domain": [0, 0.42],
            "tickvals": list(_ROWS.values()),
            "ticktext": ["attn", "MLP"],
            "range": [-0.5, 1.5],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
    )
    figure.update_xaxes(
        title="block",
        anchor="y2",
        range=[-0.6, len(blocks) - 0.4],
        showgrid=False,
        **palette.counting_axis(len(blocks)),
    )
    margin = {"l": 10, "r": 10, "t": 16, "b": 10}
    return palette.dress(figure, 320, margin=margin)


def frontier(
    line: Sequence[tuple[float, float]],
    checked: Sequence[PlanCheck],
    now: tuple[float, float] | None,
    output_tokens: int,
) -> go.Figure:
    """Draw KL against latency: solved plans, those measured whole, and the plan shown now.

    ``line`` and ``now`` are predicted (share of the dense latency, KL). A thin line joins what a
    measured plan was predicted to be with what it is.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[x for x, _ in line],
        y=[y for _, y in line],
        mode="lines+markers",
        name="solved, predicted",
        line={"color": palette.KEPT, "dash": "dot", "width": 2},
        marker={"symbol": "circle-open", "size": 8},
        hovertemplate="predicted: %{x:.3f} x dense, KL %{y:.4g}<extra></extra>",
    )
    pairs = []
    for row in checked:
        dense = row.seconds(output_tokens, "dense_")
        if row.kl is not None and dense > 0:
            pairs.append((row, row.seconds(output_tokens) / dense, row.kl))
    figure.add_scatter(
        x=[x for row, share, _ in pairs for x in (row.predicted_share, share, None)],
        y=[y for row, _, kl in pairs for y in (row.predicted_kl, kl, None)],
        mode="lines",
        line={"color": palette.PROTECTED, "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.add_scatter(
        x=[share for _, share, _ in pairs],
        y=[kl for _, _, kl in pairs],
        mode="markers",
        name="measured whole",
        marker={"color": palette.KEPT, "symbol": "diamond", "size": 10},
        hovertemplate="measured: %{x:.3f} x dense, KL %{y:.4g}<extra></extra>",
    )
    if now:
        figure.add_scatter(
            x=[now[0]],
            y=[now[1]],
            mode="markers",
            name="this plan, predicted",
            marker={"color": palette.DROPPED, "symbol": "star", "size": 15},
            hovertemplate="this plan: %{x:.3f} x dense, KL %{y:.4g}<extra></extra>",
        )
    values = [y for trace in figure.data for y in trace.y if y]
    figure.update_yaxes(type="log", title="KL, nats a token", **log_axis(values))
    figure.update_xaxes(title="latency, times the dense model's")
    return palette.dress(figure, 320)


def _words(library: Library, block: int, version: str, protected: bool) -> str:
    """Describe a block: what it becomes, and what every version of it costs and saves."""
    whole = library.rows[block, WHOLE]
    lines = [f"block {block}: {VERSIONS.get(version, 'whole')}{', protected' if protected else ''}"]
    for name in library.options(block)[1:]:
        row = library.rows[block, name]
        saved = 1000 * ((whole.decode_s or 0.0) - (row.decode_s or 0.0))
        lines.append(
            f"{VERSIONS[name]}: KL {palette.number(library.kl(block, name))}, saves "
            f"{palette.number(saved)} ms a step"
        )
    return "<br>".join(lines)
