"""The pair matrix of the Importance page: which blocks stand in for each other."""

from __future__ import annotations

import streamlit as st

from core import words
from core.charts import search as charts
from core.checkpoint.headers import CheckpointInfo
from core.search import known
from core.search.results import PairRow, Search
from core.ui import frame, prune_pad, say, state, widgets

NAMED = 3
"""Pairs named beneath the heatmap, of each sign."""


def draw(info: CheckpointInfo) -> None:
    """Draw the interactions that a search of these weights measured; a click takes both blocks."""
    st.subheader("Pairs of blocks")
    found = {r.id: r for r in known.of_blocks(state.workspace(), info) if PairRow.read(r.path)}
    if not found:
        st.caption(
            "Unknown so far: a search with the method pairs on the Prune page measures what every "
            "pair of blocks costs, and so which blocks stand in for each other."
        )
        frame.link("prune", "Search for sets")
        return
    if st.session_state.get("pairs_run") not in found:
        st.session_state["pairs_run"] = next(iter(found))
    record = found[
        st.selectbox(
            "Pairs of the search",
            list(found),
            key="pairs_run",
            format_func=lambda run: known.label_of(found[run], state.names().run(found[run])),
        )
    ]
    summary, rows = Search.read(record.path) or Search(), PairRow.read(record.path)
    dense = 0.0 if summary.objective == "kl" else summary.dense_nll or 0.0
    pad = prune_pad.plan_elsewhere()
    key = f"pairs_{record.id}_{pad.clicks}"
    widgets.chart(
        charts.interaction_heatmap(rows, summary.objective, dense=dense, dropped=pad.drop),
        key=key,
        on_select=lambda: prune_pad.pair_clicked(key),
        selection_mode="points",
        alt="What removing two blocks costs beyond the sum of each alone; click a cell to drop "
        "or keep both.",
    )
    chosen = words.block_ranges(pad.drop) or "none"
    say.caption(
        f"Click a cell to drop both blocks in plan {pad.active}, or to keep both. Chosen: {chosen}."
    )
    says = charts.extremes(rows, NAMED)
    if says:
        say.paragraph(says)
    say.caption(
        f"{known.measured_on(summary, heldout=False)} Orange: the two stand in for each other, so "
        "removing both costs more than the sum of each alone. Blue: it costs less."
    )
