"""Findings on a page: what the figures mean, the evidence, and what to try."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from core.compare.choice import Budget
from core.compare.measured import Cell
from core.compare.scene import Scene
from core.findings import Finding, of_study
from core.runs import devices
from core.runs.flags import in_words
from core.study.settings import Settings
from core.ui.say import plain


def show(found: Sequence[Finding]) -> None:
    """Draw each finding with its evidence collapsed; draw nothing if there are none."""
    for finding in found:
        with st.container(border=True):
            st.markdown(f":material/troubleshoot: **{plain(in_words(finding.sentence))}**")
            st.markdown(f"Try: {plain(in_words(finding.try_next))}")
            with st.expander("Evidence"):
                rows = [{"what": k, "value": str(v)} for k, v in finding.evidence.items()]
                st.dataframe(rows, hide_index=True)


def of_scene(scene: Scene, cell: Cell, budget: Budget, settings: Settings) -> None:
    """Draw the findings about the Compare page's study at ``cell``, but for its verdict.

    Memory is compared with the budget, or without one with what the first device has free now.
    """
    device = devices.devices()[0]
    free, where = device.free_gib, f"{device.label} (free now)"
    if budget.memory_gib:
        free, where = budget.memory_gib, "your budget"
    bench = scene.runs[0] if scene.runs else None
    found = of_study(
        scene.study, scene.protocol, bench,
        settings=settings, cell=cell, budget_mib=1024 * free, where=where,
    )  # fmt: skip
    show([f for f in found if f.key != "verdict"])
