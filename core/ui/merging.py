"""The Merge button: a LoRA result as a whole checkpoint, which every other page takes."""

from __future__ import annotations

import streamlit as st

from core.retrain import history
from core.retrain.results import Summary
from core.runs import jobs
from core.runs.workspace import RunRecord
from core.ui import say, widgets


def draw(record: RunRecord, where: str) -> None:
    """Draw the button if a finished retraining left an adapter alone; ``where`` names the widget.

    The run itself continues: its adapter stays, and merged/ appears once it is complete.
    """
    if not history.is_unmerged(record):
        return
    widgets.action(
        "Merge",
        lambda: jobs.restart(record, merge=True),
        key=f"merge_{where}_{record.id}",
        icon=":material/merge:",
        help="Adds the adapter to the weights, so that the result can be evaluated, benchmarked "
        "and written with like any other variant. The adapter is kept.",
    )


def offer(record: RunRecord, summary: Summary) -> None:
    """Draw what a finished retraining's result still needs: merging, or more precision."""
    if history.is_unmerged(record):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.info(
                "Only the adapter was written, so this result cannot be chosen on other pages "
                "yet. Merging it makes it a variant."
            )
            draw(record, "result")
    if not summary.merged:
        return
    say.caption(history.merged_note(summary.merged))
    lost = history.lost_in_merging(summary)
    if lost and record.state == "done":
        say.warning(lost)
        widgets.action(
            "Merge in float32",
            lambda: jobs.restart(record, merge=True, merge_dtype="float32"),
            key=f"float32_{record.id}",
            icon=":material/merge:",
        )
