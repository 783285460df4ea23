"""Charts, downloads and buttons as all pages draw them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from core.errors import DepthcutError
from core.ui import say, state
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


def form(command: str, label: str, icon: str | None = None, *, opened: bool = False) -> Any:
    """Return an expander for something rarely used; draw its content only if it is ``.open``.

    What a closed one holds would be computed, sent and laid out with every click on the page.
    """
    return st.expander(plain(label), opened, key=f"{command}_form", icon=icon, on_change="rerun")


def action(label: str, do: Callable[[], object], *, key: str, told: str = "", **more: Any) -> None:
    """Draw a button that does something to a run; the page is drawn again afterwards.

    It is done before anything is drawn: a fragment that redraws the page because its run has just
    ended would otherwise swallow a click that arrives with it. An expected error is shown instead.
    ``told`` is said once when it is done, in place of drawing the page again.

    Not for what a form asks: ``do`` has the values of the last drawing, and a field that was edited
    just before the click is not among them.
    """
    kept = f"{key}_outcome"

    def clicked() -> None:
        try:
            do()
        except DepthcutError as error:
            st.session_state[kept] = str(error)
        else:
            st.session_state[kept] = ""

    st.button(plain(label), key=key, on_click=clicked, **more)
    outcome = st.session_state.pop(kept, None)
    if outcome:
        say.error(outcome)
    elif outcome is not None and told:
        st.toast(plain(told))
    elif outcome is not None:
        st.rerun()


def csv_download(
    name: str, csv: Callable[[], str | bytes], *, label: str = "", **more: Any
) -> None:
    """Draw the download button of a table; the label is the file's ``name`` unless given.

    The file is made when it is asked for: one made now could be replaced by the next redraw before
    the browser fetches it.
    """
    st.download_button(plain(label or name), csv, name, "text/csv", on_click="ignore", **more)
