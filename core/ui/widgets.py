"""The download button that all tables share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from core.ui import state
from core.ui.say import plain


def file_name(*parts: str, ending: str) -> str:
    """Return the name of a download: readable parts, without anything a file system dislikes."""
    clean = (re.sub(r"[^\w.+%-]+", "-", part).strip("-.") for part in parts)
    return "-".join(part for part in clean if part)[:120] + ending


def chart(figure: go.Figure, key: str, **more: Any) -> Any:
    """Draw a chart; its picture is saved under the name of the checkpoint and of the chart."""
    active = state.names().checkpoint(state.current_checkpoint())
    name = file_name(active, key.rstrip("0123456789").rstrip("_"), ending="")
    config = {"toImageButtonOptions": {"scale": 3, "filename": name}}
    return st.plotly_chart(figure, key=key, config=config, **more)


def csv_download(
    name: str, csv: Callable[[], str | bytes], *, label: str = "", **more: Any
) -> None:
    """Draw the download button of a table; the label is the file's ``name`` unless given.

    The file is made when it is asked for: one made now could be replaced by the next redraw before
    the browser fetches it.
    """
    st.download_button(plain(label or name), csv, name, "text/csv", on_click="ignore", **more)
