"""Texts to choose with one click, below a field that takes any SOURCE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from core.checkpoint.vocabulary import AUTO, default_text
from core.ui.say import plain

TEXTS = {
    AUTO: "auto ({})",
    "english": "english",
    "c4": "C4 (needs the Hub)",
    "wikitext2": "WikiText-2 (needs the Hub)",
    "demo": "demo",
}
"""Sources that need no file, with their labels; ``auto`` names what it means here."""


def offer(
    key: str, folder: Path, *, many: bool = False, then: Callable[[], None] = lambda: None
) -> None:
    """Draw the bundled and preset texts; a click writes one into the text field ``key``.

    ``folder`` is the checkpoint's; with ``many`` the field is a list that a click adds to; ``then``
    is called after the change.
    """
    usual, offered = default_text(folder), f"{key}_offered"
    labels = {name: label.format(usual) for name, label in TEXTS.items()}

    def take() -> None:
        picked = st.session_state[offered]
        st.session_state[offered] = None
        if picked is None:
            return
        given = str(st.session_state.get(key) or "")
        names = [name.strip() for name in given.split(",") if name.strip()] if many else []
        st.session_state[key] = ", ".join(dict.fromkeys([*names, picked]))
        then()

    st.pills(
        "Texts",
        list(labels),
        format_func=lambda name: plain(labels[name]),
        key=offered,
        on_change=take,
        label_visibility="collapsed",
    )
