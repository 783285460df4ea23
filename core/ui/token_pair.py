"""Token by token: one text as two models read it, through the live process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from core.evaluate import token_view
from core.evaluate.token_view import TokenView
from core.live.columns import Column
from core.live.token_pair import TokenPair
from core.ui import say, state
from core.ui.say import plain

_PAIR, _TEXT, _BY = "token_pair", "token_text", "token_by"
LOSS, DIFFERENCE = "their losses", "the difference"
REFRESH_S = 0.3


def show(columns: Sequence[Column], prompt: str, written: str, on: dict[str, Any]) -> None:
    """Draw the section: the text, both readings, and what hovering means.

    The first two of ``columns`` are compared. ``written`` is what the first one has continued the
    prompt with, if anything.
    """
    st.subheader("Token by token")
    if len(columns) < 2:
        st.info("Choose two columns above: a text is then shown as both models read it.")
        return
    first, second = columns[:2]
    st.session_state.setdefault(_TEXT, prompt)
    text = st.text_area("Text to read", key=_TEXT, height=100)

    def take() -> None:
        st.session_state[_TEXT] = written

    pair: TokenPair | None = st.session_state.get(_PAIR)
    busy = bool(pair and pair.running)

    def read() -> None:
        st.session_state[_PAIR] = TokenPair(
            st.session_state[_TEXT], (first.title, second.title), (first.question, second.question),
            state.workspace(), on,
        ).start()  # fmt: skip

    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Read it with both", icon=":material/visibility:", key="token_read", on_click=read,
            disabled=busy or not text.strip(),
        )  # fmt: skip
        if written.strip():
            st.button(
                f"Take the text of {plain(first.title)}", key="token_take", on_click=take,
                help="The prompt with what that model generated above.",
            )  # fmt: skip
    pair = st.session_state.get(_PAIR)
    if pair:
        st.fragment(_readings, run_every=REFRESH_S if pair.running else None)(pair.running)


def _readings(was_running: bool) -> None:
    pair: TokenPair = st.session_state[_PAIR]
    if was_running and not pair.running and state.is_drawn_alone():
        st.rerun()
    if pair.error:
        say.error(pair.error)
        return
    if len(pair.readings) < 2:
        say.info(f"Reading the text: {pair.note or 'computing'} ...")
        return
    dense, other = pair.readings[:2]
    draw(dense, other, pair.titles)
    more = (
        f" The last {dense.left_out:,} tokens of the text were left out." if dense.left_out else ""
    )
    say.caption(f"Measured on {other.device} in {other.dtype}.{more}")


def draw(dense: TokenView, other: TokenView, titles: tuple[str, str]) -> None:
    """Draw two readings side by side."""
    first, second = titles
    if not token_view.comparable(dense, other):
        say.warning(
            f"{first} and {second} read different tokens: their tokenizers differ, so their losses "
            "do not compare."
        )
        return
    say.paragraph(token_view.summary(dense, other, second))
    by = st.segmented_control("Colour", (LOSS, DIFFERENCE), default=LOSS, key=_BY) or LOSS
    left, right = st.columns(2)
    with left, st.container(border=True):
        say.bold(first)
        st.html(token_view.by_loss(dense, other, first, second))
    with right, st.container(border=True):
        say.bold(second)
        shown = (
            token_view.by_loss(other, dense, second, first)
            if by == LOSS
            else token_view.by_difference(dense, other, second, first)
        )
        st.html(shown)
    say.caption(token_view.LEGEND)
