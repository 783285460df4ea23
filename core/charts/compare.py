"""Figures of the Compare page, from candidates and rows with the columns of points.csv.

A method has the same colour, dash and symbol in every figure; depth is solid, width dashed, dense
dotted. Measured markers are filled, estimated ones hollow; retrained ones have a dot.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from core.charts import palette
from core.charts.memo import drawn_once
from core.charts.prune import log_axis
from core.compare.candidates import Candidate
from core.compare.measured import Cost
from core.compare.outcomes import Outcome
from core.words import block_ranges

Row = Mapping[str, Any]
"""A published row; see `core.compare.published`."""
CHOSEN = "#D55E00"
"""Colour of the ring around the chosen and the best point."""
QUANTIZED = {"int8": "hourglass", "int4": "bowtie"}
"""Symbol of quantized candidates, in the colour of their method."""
DASHES = {"dense": "dot", "depth": "solid", "width": "dash", "other": "dashdot"}
LOOKS = {
    "dense": ("#7F7F7F", "star"),
    "ppl": (palette.CRITERIA["ppl"], "circle"),
    "taylor": (palette.CRITERIA["taylor"], "square"),
    "magnitude": (palette.CRITERIA["magnitude"], "diamond"),
    "block-influence": (palette.CRITERIA["block_influence"], "triangle-up"),
    "relative-update": (palette.CRITERIA["relative_update"], "triangle-down"),
    "angular": ("#8C564B", "pentagon"),
    "llm-pruner": ("#56B4E9", "hexagram"),
    "flap": ("#8C564B", "triangle-left"),
    "wanda-sp": ("#7B6FD0", "triangle-right"),
}
"""Colour and symbol by criterion or width method."""
NO_DOT = ("cross", "star", *QUANTIZED.values())
"""Symbols that plotly has without a dot, or in which one is hard to see."""
SPARE = (("#7F7F7F", "hexagon"), ("#CC79A7", "cross"), ("#009E73", "star-diamond"))
METRICS = {
    "latency_s_p50": "latency (s)",
    "tokens_per_s": "tokens/s",
    "peak_memory_mib": "peak memory (MiB)",
    "speedup": "speed-up over dense",
    "first_token_ms": "time to first token (ms)",
    "per_token_ms": "time per token (ms)",
    "reserved_mib": "reserved memory (MiB)",
    "process_mib": "process memory (MiB)",
    "utilisation_pct": "utilisation (%)",
}
"""Metrics drawn against batch size, output length and ratio, with units."""
AXES = {
    "memory_mib": "peak memory (MiB)",
    "per_token_ms": "time per token (ms)",
    "latency_s": "latency (s)",
    "parameters": "parameters",
}
"""Costs to compare with quality."""


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    colour: str
    dash: str
    symbol: str

    def marker(self, *, hollow: bool) -> str:
        """Return the symbol, ``hollow`` for estimates; plotly's order is open, then dot."""
        plain = self.symbol.removesuffix("-dot")
        return plain + "-open" * hollow + "-dot" * (plain != self.symbol)


def look_of(candidate: Candidate) -> Look:
    """Return colour, dash and symbol of a candidate's series."""
    name = "dense" if candidate.kind == "dense" else candidate.method
    spare = SPARE[sum(map(ord, candidate.series)) % len(SPARE)]
    colour, symbol = LOOKS.get(name, spare)
    symbol = QUANTIZED.get(candidate.quantized, symbol)
    symbol += "-dot" if candidate.retrained and symbol not in NO_DOT else ""
    return Look(colour, DASHES[candidate.kind], symbol)


def value(cost: Cost, metric: str) -> float | None:
    """Return one of `METRICS`; costs have times in seconds, metrics may be in ms."""
    if metric.endswith("_ms"):
        seconds = getattr(cost, metric.removesuffix("_ms") + "_s")
        return None if seconds is None else 1000 * float(seconds)
    found = getattr(cost, metric)
    return None if found is None else float(found)


# ------------------------------------------------------------------- cost against batch and output


@drawn_once
def against(
    costs: Sequence[Cost],
    found: Sequence[Candidate],
    metric: str,
    *,
    x: str = "batch_size",
    capacity_mib: float | None = None,
    legend: bool = True,
) -> go.Figure:
    """Draw a metric against ``batch_size`` or ``output_tokens`` (log2), one line per candidate.

    Points out of memory are crosses at the top; estimated ones are hollow and dotted. If there is
    only one size, each candidate is a bar instead.
    """
    figure = go.Figure()
    ticks = sorted({getattr(c, x) for c in costs})
    if len(ticks) == 1 and not any(c.oom for c in costs):
        return _bars(figure, costs, found, metric)
    lost: list[tuple[Candidate, Cost]] = []
    for candidate in found:
        mine = sorted((c for c in costs if c.id == candidate.id), key=lambda c: getattr(c, x))
        lost += [(candidate, c) for c in mine if c.oom]
        for guessed in (False, True):
            line = [c for c in mine if c.estimated == guessed and not c.oom]
            line = [c for c in line if value(c, metric) is not None]
            if line:
                _line(figure, line, candidate, metric, x, guessed)
    _crosses(figure, lost, x)
    if metric == "peak_memory_mib" and capacity_mib:
        _capacity(figure, capacity_mib)
    title = "batch size" if x == "batch_size" else "output tokens"
    figure.update_xaxes(title=title, type="log", tickvals=ticks, ticktext=[f"{t:,}" for t in ticks])
    _cost_axis(figure, metric)
    return palette.dress(figure, 340, showlegend=legend)


def _bars(
    figure: go.Figure, costs: Sequence[Cost], found: Sequence[Candidate], metric: str
) -> go.Figure:
    """Draw one bar for each candidate, the first on top; estimated ones are hatched."""
    shown = [
        (candidate, cost, amount)
        for candidate in found
        for cost in costs
        if cost.id == candidate.id and (amount := value(cost, metric)) is not None
    ]
    for candidate, cost, amount in shown:
        label = palette.literal(candidate.label) + (", estimated" if cost.estimated else "")
        figure.add_bar(
            x=[amount],
            y=[label],
            orientation="h",
            name=label,
            text=[f"{amount:.2f}" if metric == "speedup" else palette.number(amount)],
            textposition="outside",
            cliponaxis=False,
            marker={
                "color": look_of(candidate).colour,
                "pattern": palette.hatch("/" if cost.estimated else ""),
            },
            customdata=[[candidate.id, _spread(cost)]],
            hovertemplate=f"{label}: %{{x:,.4g}}%{{customdata[1]}}<extra></extra>",
        )
    most = max((amount for _, _, amount in shown), default=1.0)
    figure.update_xaxes(title=METRICS[metric], range=[0, 1.2 * most])
    figure.update_yaxes(autorange="reversed")
    return palette.dress(figure, 150 + 40 * len(shown), showlegend=False, bargap=0.3)


def _line(
    figure: go.Figure, line: list[Cost], candidate: Candidate, metric: str, x: str, guessed: bool
) -> None:
    look = look_of(candidate)
    bands = [(getattr(c, x), *_band(c, metric)) for c in line]
    banded = [(at, low, high) for at, low, high in bands if low is not None and high is not None]
    if len(banded) > 1:
        figure.add_scatter(
            x=[at for at, _, _ in banded] + [at for at, _, _ in reversed(banded)],
            y=[high for _, _, high in banded] + [low for _, low, _ in reversed(banded)],
            mode="lines",
            fill="toself",
            fillcolor=_faint(look.colour),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=candidate.id,
            name=f"{palette.literal(candidate.label)}, p10 to p90",
        )
    figure.add_scatter(
        x=[getattr(c, x) for c in line],
        y=[value(c, metric) for c in line],
        name=palette.literal(candidate.label) + (", estimated" if guessed else ""),
        legendgroup=candidate.id,
        mode="lines+markers",
        line={"color": look.colour, "width": 1.5 if guessed else 2.5}
        | {"dash": "dot" if guessed else look.dash},
        marker={"size": 9, "symbol": look.marker(hollow=guessed)},
        customdata=[[candidate.id, _spread(c)] for c in line],
        hovertemplate=f"{palette.literal(candidate.label)}<br>%{{x}}: %{{y:,.4g}}"
        "%{customdata[1]}<extra>"
        f"{'estimated' if guessed else 'measured'}</extra>",
    )


def _band(cost: Cost, metric: str) -> tuple[float | None, float | None]:
    """Return the 10th and 90th percentile of a metric; they are known for latency alone."""
    return (cost.latency_s_p10, cost.latency_s_p90) if metric == "latency_s_p50" else (None, None)


def _spread(cost: Cost) -> str:
    """Return the number of runs and the spread of a point, for its tooltip."""
    if cost.estimated or not cost.runs:
        return ""
    deviation = cost.latency_s_std
    shown = f", latency deviation {deviation:.3g} s" if deviation is not None else ""
    return f"<br>{cost.runs} runs{shown}"


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _crosses(figure: go.Figure, lost: Sequence[tuple[Candidate, Cost]], x: str) -> None:
    """Draw out-of-memory points at the top of the panel, with the memory they would need."""
    ys = [v for trace in figure.data for v in trace.y if v is not None]
    top = 1.15 * max(ys, default=1.0)
    for candidate, cost in lost:
        needed = cost.estimated_memory_mib
        text = (
            f"<br>would need about {needed:,.0f} MiB" if needed and cost.limit != "kernels" else ""
        )
        figure.add_scatter(
            x=[getattr(cost, x)],
            y=[top],
            mode="markers",
            name=f"{palette.literal(candidate.label)}: {cost.why_unmeasured}",
            legendgroup=candidate.id,
            showlegend=False,
            marker={
                "symbol": "x",
                "size": 13,
                "color": look_of(candidate).colour,
                "line": {"width": 1, "color": "#FFFFFF"},
            },
            customdata=[[candidate.id]],
            hovertemplate=f"{palette.literal(candidate.label)}, %{{x}}: {cost.why_unmeasured}{text}"
            "<extra></extra>",
        )


def _capacity(figure: go.Figure, capacity_mib: float) -> None:
    """Draw the device's memory as a line if it is near the data, otherwise note its value."""
    ys = [v for trace in figure.data for v in trace.y if v is not None]
    text = f"device memory: {capacity_mib / 1024:,.1f} GiB"
    if ys and max(ys) > 0.2 * capacity_mib:
        figure.add_hline(y=capacity_mib, line={"dash": "dash", "width": 2, "color": CHOSEN})
    else:
        text += " (off scale)"
    figure.add_annotation(
        xref="paper", yref="paper", x=1, y=1, xanchor="right", yanchor="bottom",
        text=text, showarrow=False, font={"size": palette.FONT_SIZE},
    )  # fmt: skip


def _cost_axis(figure: go.Figure, metric: str) -> None:
    """Title the y axis; it is logarithmic if the values span more than a factor of ten."""
    ys = [v for trace in figure.data for v in trace.y if v]
    figure.update_yaxes(title=METRICS[metric])
    if ys and max(ys) > 10 * min(ys) and metric != "speedup":
        figure.update_yaxes(type="log", **log_axis(ys))
    else:
        figure.update_yaxes(rangemode="tozero")
    if metric == "speedup":
        figure.add_hline(y=1, line={"dash": "dot", "width": 2, "color": LOOKS["dense"][0]})


@drawn_once
def against_ratio(
    costs: Sequence[Cost],
    found: Sequence[Candidate],
    metric: str,
    at: float | None = None,
    published: Iterable[Row] = (),
    *,
    legend: bool = True,
) -> go.Figure:
    """Draw a metric against the pruning ratio, one line per series, starting at dense.

    Quantized variants have lines of their own, which do not start there. ``costs`` are of one batch
    size and output length; ``at`` marks a ratio. ``published`` rows are drawn over the speed-up
    only: absolute times of other machines are not comparable.
    """
    figure = go.Figure()
    dense = next((c for c in found if c.kind == "dense"), None)
    by_key = {(c.id, c.estimated): c for c in costs if not c.oom}
    lines: dict[str, list[Candidate]] = {}
    for candidate in found:
        if candidate.is_made and candidate.ratio is not None:
            lines.setdefault(candidate.series, []).append(candidate)
    for name, line in lines.items():
        line = sorted(line, key=lambda c: c.ratio or 0.0)
        look = look_of(line[0])
        for guessed in (False, True):
            points = [
                (c, value(by_key[c.id, guessed], metric))
                for c in ([dense, *line] if dense and not line[0].quantized else line)
                if (c.id, guessed) in by_key
            ]
            points = [(c, v) for c, v in points if v is not None]
            if not any(c is not dense for c, _ in points):
                continue
            figure.add_scatter(
                x=[c.ratio for c, _ in points],
                y=[v for _, v in points],
                name=palette.literal(name) + (", estimated" if guessed else ""),
                legendgroup=name,
                mode="lines+markers",
                line={"color": look.colour, "width": 1.5 if guessed else 2.5}
                | {"dash": "dot" if guessed else look.dash},
                marker={"size": 9, "symbol": look.marker(hollow=guessed)},
                customdata=[[c.id, palette.literal(c.label)] for c, _ in points],
                hovertemplate="%{customdata[1]}<br>%{x:.1%} removed: %{y:,.4g}"
                f"<extra>{'estimated' if guessed else 'measured'}</extra>",
            )
    if metric == "speedup":
        _published(figure, published)
    _mark_ratio(figure, at)
    _ratio_axis(figure)
    _cost_axis(figure, metric)
    return palette.dress(figure, 340, showlegend=legend)


def _mark_ratio(figure: go.Figure, at: float | None) -> None:
    if at:
        figure.add_vline(x=at, line={"dash": "dot", "width": 2, "color": CHOSEN})


def _ratio_axis(figure: go.Figure) -> None:
    """Label the axis of ratios; if it has only the dense model, it ends at one half."""
    alone = not any(x for trace in figure.data for x in trace.x or ())
    limits = {"range": [-0.01, 0.5]} if alone else {"rangemode": "tozero"}
    figure.update_xaxes(title="parameters removed", tickformat=".0%", **limits)


# ------------------------------------------------------------------------------------------ quality


@drawn_once
def quality(
    found: Sequence[Candidate],
    *,
    at: float | None = None,
    relative: bool = False,
    published: Iterable[Row] = (),
    chosen: str = "",
) -> go.Figure:
    """Draw perplexity (log) against the share of parameters removed, one line per series.

    ``relative`` divides by the dense perplexity; only then are ``published`` rows (method, ratio,
    over_dense, label, source) drawn too. Small markers are plans without a checkpoint.
    """
    dense = next((c for c in found if c.kind == "dense" and c.ppl), None)
    base = dense.ppl if relative and dense and dense.ppl else 1.0
    figure = go.Figure()
    lines: dict[str, list[Candidate]] = {}
    for candidate in found:
        if candidate.is_made and candidate.ppl and candidate.ratio is not None:
            lines.setdefault(candidate.series, []).append(candidate)
    for name, line in lines.items():
        points = (
            [dense] if dense and not (line[0].retrained or line[0].quantized) else []
        ) + sorted(line, key=lambda c: c.ratio or 0.0)
        look = look_of(line[0])
        figure.add_scatter(
            x=[c.ratio for c in points],
            y=[(c.ppl or math.nan) / base for c in points],
            name=palette.literal(name),
            mode="lines+markers",
            line={"color": look.colour, "width": 2.5, "dash": look.dash},
            marker={"size": [7 if c.is_plan else 12 for c in points], "symbol": look.symbol}
            | {"opacity": 1}
            | _outline(line[0].retrained),
            customdata=[[c.id, palette.literal(c.label), _blocks(c)] for c in points],
            selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 1}},
            hovertemplate="%{customdata[1]}<br>%{x:.1%} removed: %{y:,.4g}%{customdata[2]}"
            "<extra>measured</extra>",
        )
    values = [v for trace in figure.data for v in trace.y]
    if dense and dense.ppl:
        palette.dense_line(figure, dense.ppl / base, below=True)
        values.append(dense.ppl / base)
    if relative:
        values += _published(figure, published)
    _ring(figure, [c for c in found if c.id == chosen], base)
    _mark_ratio(figure, at)
    _ratio_axis(figure)
    _arrows(  # last: every line that is added later would check all of them again
        figure,
        {c.id: (c.ratio or 0.0, math.log10(c.ppl / base)) for c in found if c.ppl},
        {c.id: c.parent for c in found if c.retrained or c.quantized},
    )
    title = "perplexity relative to dense" if relative else "perplexity"
    figure.update_yaxes(type="log", title=title, **log_axis(values))
    return palette.dress(figure, 420, clickmode="event+select", dragmode=False)


def _blocks(candidate: Candidate) -> str:
    if candidate.removal.partial:
        return f"<br>without {candidate.removal.text}"
    return f"<br>without {block_ranges(candidate.dropped)}" if candidate.dropped else ""


def _ring(figure: go.Figure, chosen: Sequence[Candidate], base: float) -> None:
    """Ring the chosen candidate."""
    for candidate in chosen:
        if candidate.ppl and candidate.ratio is not None:
            figure.add_scatter(
                x=[candidate.ratio], y=[candidate.ppl / base], mode="markers", hoverinfo="skip",
                marker={"symbol": "circle-open", "size": 22, "color": CHOSEN, "line_width": 3},
                name=f"chosen: {palette.literal(candidate.label)}",
            )  # fmt: skip


def _published(figure: go.Figure, published: Iterable[Row]) -> list[float]:
    """Add published points, hollow stars of one colour; returns their values."""
    rows = [r for r in published if r.get("over_dense")]
    if not rows:
        return []
    figure.add_scatter(
        x=[r["ratio"] for r in rows],
        y=[r["over_dense"] for r in rows],
        mode="markers",
        name=f"published: {palette.literal(rows[0]['source'])}",
        marker={"symbol": "star-open", "size": 14, "color": "#7F7F7F", "line_width": 2},
        customdata=[[palette.literal(r[key]) for key in ("label", "source")] for r in rows],
        hovertemplate="published: %{customdata[0]}<br>%{x:.1%} removed: %{y:.3g} x dense"
        "<extra>%{customdata[1]}</extra>",
    )
    return [float(r["over_dense"]) for r in rows]


# ------------------------------------------------------------------------------------------- Pareto


@drawn_once
def pareto(
    rows: Sequence[Outcome],
    looks: Mapping[str, Look],
    frontier: Sequence[Outcome],
    x: str,
    *,
    within: Iterable[str] = (),
    at: Iterable[str] = (),
    best: str = "",
    chosen: str = "",
    limits: Mapping[str, float | None] | None = None,
) -> go.Figure:
    """Draw perplexity (log) against a cost; a click on a point gives its key in customdata.

    ``within`` are the keys within the budget: others are faint. ``at`` are those at the chosen
    ratio: others are small. ``limits`` (by column) draws the budget. Arrows lead from each model to
    its retrained version; only the frontier has labels.
    """
    kept, large = set(within), set(at)
    known = [r for r in rows if r.figure(x) is not None and r.ppl]
    figure = go.Figure()
    figure.add_scatter(
        x=[_at(r, x) for r in frontier],
        y=[_at(r, "ppl") for r in frontier],
        mode="lines",
        line={"shape": "hv", "width": 2, "color": "#7F7F7F"},
        name="frontier",
        hoverinfo="skip",
    )
    for name in dict.fromkeys(r.candidate.series for r in known):
        _cloud(figure, [r for r in known if r.candidate.series == name], looks, x, kept, large)
    linear = x_is_linear(known, x)
    _arrows(
        figure,
        {
            r.key: (_at(r, x) if linear else math.log10(_at(r, x)), math.log10(_at(r, "ppl")))
            for r in known
        },
        {
            r.key: r.candidate.parent
            for r in known
            if r.candidate.retrained or r.candidate.quantized
        },
    )
    for key, symbol, text in ((best, "star-open", "best within budget"),
                              (chosen, "circle-open", "chosen")):  # fmt: skip
        for row in (r for r in known if r.key == key):
            figure.add_scatter(
                x=[_at(row, x)], y=[_at(row, "ppl")], mode="markers", hoverinfo="skip", name=text,
                marker={"symbol": symbol, "size": 26, "color": CHOSEN, "line_width": 3},
            )  # fmt: skip
    _labels(figure, known, frontier, x)
    _limits(figure, known, x, limits or {})
    figure.update_yaxes(type="log", title="perplexity", **log_axis([_at(r, "ppl") for r in known]))
    figure.update_xaxes(title=AXES[x], tickformat="~s" if x == "parameters" else None)
    if not x_is_linear(known, x):
        figure.update_xaxes(type="log", **log_axis([_at(r, x) for r in known]))
    return palette.dress(figure, 460, clickmode="event+select", dragmode=False)


def _at(row: Outcome, column: str) -> float:
    """Return a known number of a row."""
    found = row.figure(column)
    return math.nan if found is None else found


def _labels(
    figure: go.Figure, known: Sequence[Outcome], frontier: Sequence[Outcome], x: str
) -> None:
    """Label the frontier's points, except where a label would overlap an earlier one."""
    linear = x_is_linear(known, x)
    xs = [_at(r, x) if linear else math.log10(_at(r, x)) for r in known]
    ys = [math.log10(_at(r, "ppl")) for r in known]
    wide, high = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    taken: list[tuple[float, float]] = []
    for row in sorted(frontier, key=lambda r: (r.candidate.is_plan, _at(r, x))):
        at = (_at(row, x) if linear else math.log10(_at(row, x)), math.log10(_at(row, "ppl")))
        near = (abs(at[0] - u) / wide < 0.16 and abs(at[1] - v) / high < 0.09 for u, v in taken)
        if any(near):
            continue
        taken.append(at)
        side = "right" if at[0] > min(xs) + 0.8 * wide else "left"
        figure.add_annotation(
            x=at[0], y=at[1], text=palette.literal(row.candidate.label), showarrow=False, yshift=20,
            xanchor=side, font={"size": palette.FONT_SIZE},
        )  # fmt: skip


def x_is_linear(rows: Sequence[Outcome], x: str) -> bool:
    """Whether the costs are close enough together for a linear axis."""
    values = [v for r in rows if (v := r.figure(x))]
    return not values or max(values) <= 20 * min(values)


def _cloud(
    figure: go.Figure,
    rows: list[Outcome],
    looks: Mapping[str, Look],
    x: str,
    kept: set[str],
    large: set[str],
) -> None:
    look = looks[rows[0].key]
    open_ = [r.kind_of_cost == "estimated" and x != "parameters" for r in rows]
    figure.add_scatter(
        x=[_at(r, x) for r in rows],
        y=[_at(r, "ppl") for r in rows],
        mode="markers",
        name=palette.literal(rows[0].candidate.series),
        customdata=[
            [r.key, palette.literal(r.candidate.label), f"{r.candidate.ratio or 0:.1%}"]
            for r in rows
        ],
        marker={
            "color": look.colour,
            "symbol": [look.marker(hollow=o) for o in open_],
            "size": [14 if not large or r.key in large else 8 for r in rows],
            "opacity": [1.0 if not kept or r.key in kept else 0.25 for r in rows],
            "line": {"width": 1.5, "color": look.colour},
        }
        | (_outline(rows[0].candidate.retrained) if not any(open_) else {}),
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        hovertemplate="%{customdata[1]}<br>%{customdata[2]} removed<br>%{x:,.4g}, "
        "perplexity %{y:,.4g}<extra>click to see its plan</extra>",
    )


def _outline(retrained: str) -> dict[str, Any]:
    """Return the white outline that makes the dot of a retrained model's marker visible."""
    return {"line": {"width": 1.5, "color": "#FFFFFF"}} if retrained else {}


def _arrows(
    figure: go.Figure, places: Mapping[str, tuple[float, float]], parents: Mapping[str, str]
) -> None:
    """Draw an arrow from every model to its retrained version, in the axes' units."""
    look = {
        "axref": "x", "ayref": "y", "text": "", "showarrow": True, "arrowhead": 2,
        "arrowwidth": 2, "arrowcolor": "#7F7F7F", "standoff": 8, "startstandoff": 8,
    }  # fmt: skip
    arrows = [
        {"x": places[key][0], "y": places[key][1], "ax": places[up][0], "ay": places[up][1], **look}
        for key, up in parents.items()
        if key in places and up in places
    ]
    # one assignment: adding them one by one would copy and check all of them every time
    figure.layout.annotations = (*figure.layout.annotations, *arrows)


def _limits(
    figure: go.Figure, rows: Sequence[Outcome], x: str, limits: Mapping[str, float | None]
) -> None:
    """Draw the budget's limits that apply to this figure's axes."""
    style = {"dash": "dash", "width": 2, "color": CHOSEN}
    if (most := limits.get(x)) is not None:
        figure.add_vline(x=most, line=style)
    dense = next((r for r in rows if r.candidate.kind == "dense"), None)
    if (factor := limits.get("ppl_over_dense")) is not None and dense:
        figure.add_hline(y=factor * _at(dense, "ppl"), line=style)


def data_of(figure: go.Figure) -> list[dict[str, Any]]:
    """Return a figure's data as rows: series, x, y, and the candidate if there is one."""
    rows = []
    for trace in figure.data:
        if getattr(trace, "fill", None) == "toself" or trace.hoverinfo == "skip":
            continue
        extra = trace.customdata if trace.customdata is not None else [[""]] * len(trace.x)
        for x, y, more in zip(trace.x, trace.y, extra, strict=True):
            y = html.unescape(y) if isinstance(y, str) else y
            rows.append({"series": html.unescape(trace.name), "x": x, "y": y, "candidate": more[0]})
    return rows


def standalone(figure: go.Figure, note: str = "") -> str:
    """Return a self-contained web page with the figure, its data, its note and plotly.js."""
    page = go.Figure(figure)
    page.update_layout(
        template="plotly_white",
        height=640,
        showlegend=True,
        margin={"l": 80, "r": 30, "t": 80, "b": 90},
    )
    page.add_annotation(
        text=palette.literal(note), showarrow=False, xref="paper", yref="paper", x=0, y=0,
        xanchor="left", yanchor="top", yshift=-60, font={"size": palette.FONT_SIZE},
    )  # fmt: skip
    config = {"responsive": True, "toImageButtonOptions": {"scale": 3}}
    return str(page.to_html(include_plotlyjs=True, full_html=True, config=config))
