"""The download button that all tables share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from core.ui.say import plain


def csv_download(
    name: str, csv: Callable[[], str | bytes], *, label: str = "", **more: Any
) -> None:
    """Draw the download button of a table; the label is the file's ``name`` unless given.

    The file is made when it is asked for: one made now could be replaced by the next redraw before
    the browser fetches it.
    """
    st.download_button(plain(label or name), csv, name, "text/csv", on_click="ignore", **more)
