"""Figure of where a checkpoint's parameters are."""

from __future__ import annotations

import plotly.graph_objects as go

from core.charts import palette
from core.charts.memo import drawn_once
from core.checkpoint.headers import CheckpointInfo

KINDS = {
    "attention": (("q_proj", "k_proj", "v_proj", "o_proj"), "#0072B2", ""),
    "MLP": (("gate_proj", "up_proj", "down_proj"), "#E69F00", "/"),
    "norms and others": ((), "#999999", "x"),
}
"""The stacked kinds: module names, colour and pattern; the last takes the rest."""

FEW = 12
"""Up to this many blocks each has room for its number beside the name of the embedding."""


def module_kinds(info: CheckpointInfo) -> dict[str, list[int]]:
    """Return the parameters of every block by kind; each block's kinds add up to its total."""
    found: dict[str, list[int]] = {}
    left = list(info.block_parameters)
    for kind, (modules, _, _) in list(KINDS.items())[:-1]:
        counts = [
            sum(n for name, n in block.items() if name.split(".")[0] in modules)
            for block in info.block_modules
        ]
        found[kind] = counts
        left = [rest - n for rest, n in zip(left, counts, strict=True)]
    found["norms and others"] = left
    return found


@drawn_once
def kept_bars(dense: CheckpointInfo, own: CheckpointInfo) -> go.Figure:
    """Draw the share of every block's parameters that width pruning left, and what it removed."""
    left = [
        kept / whole if whole else 0.0
        for kept, whole in zip(own.block_parameters, dense.block_parameters, strict=True)
    ]
    figure = go.Figure()
    for name, shares, colour, pattern in (
        ("kept", left, palette.KEPT, ""),
        ("removed", [1 - share for share in left], palette.DROPPED, "x"),
    ):
        figure.add_bar(
            x=list(range(len(left))),
            y=shares,
            name=name,
            marker={"color": colour, "pattern": palette.hatch(pattern)},
            hovertemplate=f"block %{{x}}: %{{y:.0%}} {name}<extra></extra>",
        )
    figure.update_xaxes(title="block", **palette.counting_axis(len(left)), showgrid=False)
    figure.update_yaxes(title="parameters", tickformat=".0%", range=[0, 1])
    return palette.dress(figure, 260, barmode="stack", bargap=0.12)


@drawn_once
def parameter_bars(info: CheckpointInfo) -> go.Figure:
    """Draw embedding, every block by kind, and head as bars along the path of a token."""
    figure = go.Figure()
    ends = {"embedding": info.parts["embedding"], "head": info.parts["head"]}
    x = ["embedding", *map(str, range(info.blocks)), "head"]
    for kind, counts in module_kinds(info).items():
        _, colour, pattern = KINDS[kind]
        figure.add_bar(
            x=x,
            y=[None, *counts, None],
            name=kind,
            marker={"color": colour, "pattern": palette.hatch(pattern)},
            hovertemplate=f"block %{{x}}, {kind}: %{{y:,}}<extra></extra>",
        )
    figure.add_bar(
        x=x,
        y=[ends["embedding"], *[None] * info.blocks, ends["head"]],
        name="embedding, head" + (" (tied: one tensor)" if info.tied else ""),
        marker={"color": "#CC79A7", "pattern": palette.hatch(".")},
        hovertemplate="%{x}: %{y:,}<extra></extra>",
    )
    step = palette.category_step(info.blocks)
    first = 0 if info.blocks <= FEW else step  # the name of the embedding needs its room
    ticks = ["embedding", *map(str, range(first, info.blocks - step // 2, step)), "head"]
    figure.update_xaxes(
        title="block",
        type="category",
        categoryorder="array",
        categoryarray=x,
        tickvals=ticks,
        tickangle=0,
    )
    figure.update_yaxes(title="parameters", tickformat="~s")
    return palette.dress(figure, 340, barmode="stack", bargap=0.12)
