"""The report's download button; the report is built on click."""

from __future__ import annotations

import streamlit as st

from core.report import build, material
from core.ui import state, widgets


def button(name: str, where: str = "") -> None:
    """Draw the download of the report on the study that checkpoint ``name`` belongs to.

    ``where`` names the place on the page, if it has more than one.
    """
    st.download_button(
        "Report",
        lambda: build.page(material.gather(name, state.workspace())),
        widgets.file_name("depthcut", state.names().checkpoint(name), ending=".html"),
        "text/html",
        key=f"report_{where}",
        on_click="ignore",
        icon=":material/description:",
        help="One HTML file with everything known about this checkpoint; works offline.",
    )
