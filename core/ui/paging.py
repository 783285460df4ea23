"""Long lists a page at a time; the page's number is in the URL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import streamlit as st

from core.ui import say

PER_PAGE = 25
T = TypeVar("T")


def page_of(items: Sequence[T], key: str, noun: str, per_page: int = PER_PAGE) -> Sequence[T]:
    """Draw the choice of a page, and return its items; draw nothing if one page holds them all.

    The page is kept in the URL as ``?KEY=``; one beyond the last is the last, and what is not a
    page number the first. ``noun`` names the items in the plural.
    """
    pages = max(1, -(-len(items) // per_page))
    kept = st.session_state.setdefault(f"paging_{key}", {"url": "", "start": 1, "widget": 0})
    asked = st.query_params.get(key, "")
    wish = st.session_state.get(f"paging_{key}_{kept['widget']}", kept["start"])
    if asked != kept["url"]:  # the URL was opened or changed by hand
        wish = int(asked[:9]) if asked.isdecimal() else 1
    number = min(pages, max(1, wish))
    if asked != kept["url"] or number != wish:
        # a new widget that starts there: the value of one that is shown cannot be changed
        kept |= {"start": number, "widget": kept["widget"] + 1}
    if pages > 1:
        with st.container(horizontal=True, vertical_alignment="center"):
            number = st.pagination(pages, default=number, key=f"paging_{key}_{kept['widget']}")
            first, end = (number - 1) * per_page, min(number * per_page, len(items))
            say.caption(f"{first + 1:,} to {end:,} of {len(items):,} {noun}")
    wanted = str(number) if number > 1 else ""
    if wanted:
        st.query_params[key] = wanted
    elif asked:
        st.query_params.pop(key, None)
    kept |= {"url": wanted, "start": number}
    return items[(number - 1) * per_page : number * per_page]
