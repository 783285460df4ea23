"""Sentences on a page: shown letter for letter, never rendered as Markdown, HTML or an image.

Names of models, runs and tasks, URLs, and whatever stands in a file come from outside. Streamlit
renders Markdown nearly everywhere, labels and tooltips included; `plain` escapes it. The functions
here do so for whole sentences, in which options have the names of their fields (`core.runs.flags`);
where a page marks up its own text, only the inserted parts are escaped:
``st.markdown(f"**{plain(name)}**")``. `tests/pages/test_plain_text.py` checks every call.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import streamlit as st

from core import words
from core.errors import DepthcutError
from core.runs.flags import in_words

if TYPE_CHECKING:
    import pandas as pd

_JOINER = "\u2060"
"""An invisible character that keeps a shortcode from becoming an icon."""
_DIRECTIVE = re.compile(r":(?=[A-Za-z:])")
"""What Streamlit would take for the start of :red[...]."""
_SHORTCODE = re.compile(r":(?=[\w+-]+:|material[/_])")


def plain(text: object) -> str:
    """Return text in Markdown that shows it letter for letter, in one line.

    A web address stays clickable, as its text is its target.
    """
    return _plain(str(text))


@functools.lru_cache(maxsize=8192)
def _plain(text: str) -> str:
    """Keep the labels of long lists, which are asked for at every draw, and more than once."""
    line = _DIRECTIVE.sub(r"\:", words.markdown(text))
    return _SHORTCODE.sub(":" + _JOINER, line)


def code(text: object) -> str:
    """Return Markdown that shows text letter for letter as code, within a line."""
    line = words.LINE_BREAKS.sub(" ", str(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line[:1] in ("`", " ") or line[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{line or ' '}{pad}{fence}"


def error(text: str | DepthcutError) -> None:
    """Show an error."""
    st.error(plain(in_words(str(text))))


def warning(text: str, icon: str | None = None) -> None:
    """Show a warning."""
    st.warning(plain(in_words(text)), icon=icon)


def info(text: str, icon: str | None = None) -> None:
    """Show what a person should know or do."""
    st.info(plain(in_words(text)), icon=icon)


def success(text: str) -> None:
    """Show that something has ended well."""
    st.success(plain(in_words(text)))


def caption(text: str) -> None:
    """Show a small remark."""
    st.caption(plain(in_words(text)))


def paragraph(text: str) -> None:
    """Show a sentence of the page's own size."""
    st.markdown(plain(in_words(text)))


def bold(text: str) -> None:
    """Show a sentence in bold."""
    st.markdown(f"**{plain(in_words(text))}**")


def bullets(lines: list[str]) -> None:
    """Show sentences as a list."""
    st.markdown("\n".join(f"- {plain(in_words(line))}" for line in lines))


def table(frame: pd.DataFrame) -> None:
    """Show a table, whose cells and headings Streamlit would render as Markdown."""
    names = [*map(plain, frame.columns)]
    clean = frame.map(lambda cell: plain(cell) if isinstance(cell, str) else cell)
    clean = clean.set_axis(names, axis=1)
    clean.index = clean.index.map(lambda name: plain(name) if isinstance(name, str) else name)
    st.table(clean)
