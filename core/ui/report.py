"""The report's download: built when it is asked for."""

from __future__ import annotations

import streamlit as st

from core.report import build, material
from core.ui import state


def button(name: str) -> None:
    """Offer the report of the study that checkpoint ``name`` belongs to."""
    st.download_button(
        "Report",
        lambda: build.page(material.gather(name, state.workspace())),
        f"depthcut-{''.join(c if c.isalnum() or c in '-_.' else '-' for c in name)}.html",
        "text/html",
        key="report",
        on_click="ignore",
        icon=":material/description:",
        help="One HTML file with everything that is known of this checkpoint; works offline.",
    )
