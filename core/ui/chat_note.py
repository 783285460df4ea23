"""Captions about the chat template of a checkpoint's tokenizer."""

from __future__ import annotations

import streamlit as st

from core.checkpoint import chat
from core.checkpoint.locate import local_folder
from core.ui.say import plain

CALIBRATION = (
    "This tokenizer has a chat template: chat and instruction rows are written with it by "
    "default; plain text stays as it is."
)
"""Shown beside the choice of calibration text."""


def applies(name: str) -> bool:
    """Whether the tokenizer of a local checkpoint has a chat template."""
    return bool(name) and chat.has_template(local_folder(name))


def draw(name: str, text: str) -> None:
    """Draw ``text`` as a caption if the checkpoint's tokenizer has a chat template."""
    if applies(name):
        st.caption(plain(text))
