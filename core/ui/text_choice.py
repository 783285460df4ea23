"""Texts to choose with one click, below a field that takes any SOURCE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from core.checkpoint.vocabulary import default_text
from core.ui.say import plain

TEXTS = {
    "english": "english",
    "demo": "demo",
    "c4": "C4 (needs the Hub)",
    "wikitext2": "WikiText-2 (needs the Hub)",
}
"""Sources that need no file, with their labels; demo is offered for the demo's vocabulary only."""


def offer(key: str, folder: Path, take: Callable[[str], None]) -> None:
    """Draw the bundled and preset texts for the text field ``key``; a click calls ``take``.

    ``folder`` is the checkpoint's.
    """
    usual, offered = default_text(folder), f"{key}_offered"
    labels = {name: label for name, label in TEXTS.items() if name != "demo" or name == usual}

    def taken() -> None:
        picked = st.session_state[offered]
        st.session_state[offered] = None
        if picked is not None:
            take(picked)

    st.pills(
        "Texts",
        list(labels),
        format_func=lambda name: plain(labels[name]),
        key=offered,
        on_change=taken,
        label_visibility="collapsed",
    )
