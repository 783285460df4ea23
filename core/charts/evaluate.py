"""Figures of the Evaluate page: tasks as dots, blocks against skills, calibration against text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from core.charts import palette
from core.charts.compare import look_of
from core.charts.memo import drawn_once
from core.evaluate.by_content import Evaluated, Measure
from core.evaluate.results import BlockCost
from core.words import rounded

DIVERGING = ((0.0, "#D55E00"), (0.5, "#F4F4F4"), (1.0, "#0072B2"))
"""Worse is orange, no change is light, better is blue."""


SPARE = (
    ("#0072B2", "circle"),
    ("#D55E00", "square"),
    ("#009E73", "diamond"),
    ("#CC79A7", "triangle-up"),
    ("#E69F00", "triangle-down"),
    ("#56B4E9", "pentagon"),
    ("#8C564B", "cross"),
)
"""Colours and symbols of checkpoints beyond the first of a method."""
BAR: dict[str, Any] = {"orientation": "h", "y": -0.28, "yanchor": "top", "thickness": 12}
"""A colour bar below the plot, so that a narrow window keeps its width for the cells."""


@drawn_once
def task_dots(
    evaluated: Sequence[Evaluated[Any]], tasks: Sequence[Measure], chance: dict[str, float]
) -> go.Figure:
    """Draw every task's value for every checkpoint, with one standard error to each side.

    ``chance`` is the accuracy of guessing by task, drawn as a short line if it is known. Rows
    of a task are a little apart, so that equal values do not hide each other. A checkpoint that
    was asked none of the tasks takes no room.
    """
    evaluated = [one for one in evaluated if any(m in one.cells for m in tasks)]
    figure = go.Figure()
    names = [palette.literal(m.label) for m in tasks]
    spread = min(0.2, 0.7 / max(1, len(evaluated)))
    looks = _looks(evaluated)
    for place, one in enumerate(evaluated):
        colour, symbol = looks[place]
        rows = [(at, one.cells[m]) for at, m in enumerate(tasks) if m in one.cells]
        offset = (place - (len(evaluated) - 1) / 2) * spread
        figure.add_scatter(
            x=[cell.value for _, cell in rows],
            y=[at + offset for at, _ in rows],
            error_x={"array": [cell.stderr or 0.0 for _, cell in rows], "thickness": 1.5},
            mode="markers",
            name=palette.literal(one.variant.label),
            marker={"size": 11, "color": colour, "symbol": symbol,
                    "line": {"width": 1, "color": "#FFFFFF"}},
            customdata=[[names[at], cell.count] for at, cell in rows],
            hovertemplate="%{customdata[0]}: %{x:.4f}, %{customdata[1]} questions"
            "<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    known = [(at, chance[m.name]) for at, m in enumerate(tasks) if m.name in chance]
    for number, (at, value) in enumerate(known):
        figure.add_scatter(
            x=[value, value],
            y=[at - 0.35, at + 0.35],
            mode="lines",
            line={"dash": "dot", "color": palette.PROTECTED, "width": 2},
            name="guessing",
            legendgroup="guessing",
            showlegend=number == 0,
            hoverinfo="skip",
        )
    palette.dress(figure, 120 + (22 + 12 * len(evaluated)) * len(tasks))
    figure.update_yaxes(
        tickvals=list(range(len(tasks))), ticktext=names, range=[len(tasks) - 0.5, -0.5],
        zeroline=False, automargin=True,
    )  # fmt: skip
    figure.update_xaxes(title="value, with one standard error", zeroline=False)
    return figure


def _looks(evaluated: Sequence[Evaluated[Any]]) -> list[tuple[str, str]]:
    """Return colour and symbol of every checkpoint: its method's, or spare ones if taken."""
    spare = iter(SPARE)
    found: list[tuple[str, str]] = []
    for one in evaluated:
        own = look_of(one.variant)  # type: ignore[arg-type]
        look = (own.colour, own.symbol)
        while look in found:
            look = next(spare, (own.colour, f"{own.symbol.removesuffix('-dot')}-open"))
            if look in found and look[1].endswith("-open"):
                break
        found.append(look)
    return found


@drawn_once
def skill_heatmap(rows: Sequence[BlockCost]) -> go.Figure:
    """Draw the change on every task when one block is left out.

    A cell whose change is within two standard errors of zero carries a dot: it may be chance.
    """
    tasks = list(dict.fromkeys((row.task, row.metric) for row in rows))
    blocks = sorted({row.block for row in rows if row.block >= 0})
    by_cell = {(row.block, row.task, row.metric): row for row in rows}
    found = [[by_cell[block, *task] for block in blocks] for task in tasks]
    most = max((abs(row.delta) for line in found for row in line), default=0.0) or 1.0
    dense = {task: by_cell[-1, *task].value for task in tasks}
    names = [palette.literal(f"{_short(task)} ({metric})") for task, metric in tasks]
    figure = go.Figure(
        go.Heatmap(
            z=[[row.delta for row in line] for line in found],
            x=blocks,
            y=names,
            zmin=-most,
            zmax=most,
            colorscale=DIVERGING,
            xgap=2,
            ygap=2,
            text=[["·" if _unsure(row) else "" for row in line] for line in found],
            texttemplate="%{text}",
            textfont={"size": 20, "color": "#333333"},
            customdata=[
                [[row.value, dense[task], _plus_minus(row.delta_stderr)] for row in line]
                for task, line in zip(tasks, found, strict=True)
            ],
            hovertemplate="%{y}<br>without block %{x}: %{customdata[0]:.4f}, dense "
            "%{customdata[1]:.4f}<br>change %{z:+.4f}%{customdata[2]}<extra></extra>",
            colorbar={**BAR, "title": {"text": "change", "side": "top"}, "tickformat": "+.2f"},
        )
    )
    palette.dress(figure, 210 + 34 * len(tasks))
    figure.update_xaxes(title="block left out", nticks=min(16, len(blocks) + 1), tickangle=0)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def _short(task: str) -> str:
    return task.removeprefix("demo_")


def _unsure(row: BlockCost) -> bool:
    return row.delta_stderr is None or abs(row.delta) <= 2 * row.delta_stderr


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


@drawn_once
def calibration_grid(cells: Sequence[dict[str, Any]]) -> go.Figure:
    """Draw perplexity over dense: calibrated on (rows) against evaluated on (columns).

    ``cells``: calibration, evaluated, ratio (perplexity over the dense one on that text), ppl.
    """
    rows = list(dict.fromkeys(cell["calibration"] for cell in cells))
    columns = list(dict.fromkeys(cell["evaluated"] for cell in cells))
    by = {(c["calibration"], c["evaluated"]): c for c in cells}
    figure = go.Figure(
        go.Heatmap(
            z=[[by[row, column]["ratio"] for column in columns] for row in rows],
            x=[f"on {palette.literal(column)}" for column in columns],
            y=[f"plan from {palette.literal(row)}" for row in rows],
            colorscale=palette.SCALE,
            xgap=3,
            ygap=3,
            text=[
                [f"{by[r, c]['ratio']:.3f} x<br>{rounded(by[r, c]['ppl'])}" for c in columns]
                for r in rows
            ],
            texttemplate="%{text}",
            hovertemplate="%{y}, evaluated %{x}: %{z:.4f} x dense<extra></extra>",
            colorbar={**BAR, "title": {"text": "x dense", "side": "top"}},
        )
    )
    palette.dress(figure, 400)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure
