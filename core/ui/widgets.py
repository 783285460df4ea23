"""Widgets from the fields of a spec, which declares label, help, bounds and default once.

Also the download button that all tables share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import streamlit as st

from core.runs.spec import hints_of, kind_of, show
from core.ui.say import plain

WORDS = {"lr": "Learning rate", "kl_weight": "KL weight"}
"""Labels of fields whose names are abbreviations."""


def fields(spec_class: type, names: tuple[str, ...], start: dict[str, Any]) -> dict[str, Any]:
    """Draw one widget per field, side by side, and return their values.

    ``start`` replaces defaults. Values survive a page change: they are kept under a key that is
    not a widget's.
    """
    by_name = {f.name: f for f in dataclasses.fields(spec_class)}
    kept: dict[str, Any] = st.session_state.setdefault(f"kept_{spec_class.__name__}", {})
    for name in names:
        if name in start:
            kept[name] = start[name]
            if isinstance(st.session_state.get(f"{spec_class.__name__}_{name}"), str):
                del st.session_state[f"{spec_class.__name__}_{name}"]
    columns = st.columns(len(names))
    for name, column in zip(names, columns, strict=True):
        with column:
            kept[name] = _widget(spec_class, by_name[name], kept.get(name))
    return {name: kept[name] for name in names}


def _widget(spec_class: type, field: dataclasses.Field[Any], value: Any) -> Any:
    meta = field.metadata
    title = WORDS.get(field.name) or field.name.replace("_", " ").capitalize()
    title += f" ({meta['unit']})" if meta["unit"] else ""
    label, about = plain(title), plain(meta["help"])
    start: Any = field.default if value is None else value
    key = f"{spec_class.__name__}_{field.name}"
    if meta["choices"] and isinstance(field.default, tuple):
        picked = st.pills(
            label,
            meta["choices"],
            selection_mode="multi",
            default=list(start),
            key=key,
            format_func=plain,
            help=about,
        )
        return tuple(c for c in meta["choices"] if c in picked)
    if meta["choices"]:
        index = meta["choices"].index(start)
        return st.selectbox(label, meta["choices"], index=index, key=key, help=about)
    kind, many, optional = kind_of(hints_of(spec_class)[field.name])
    if kind is bool:
        return st.checkbox(label, value=bool(start), key=key, help=about)
    if kind in (int, float) and not many:
        return _number(field, kind, start, title, key)
    if key not in st.session_state:
        st.session_state[key] = "" if start is None else show(start)
    given = st.text_input(label, key=key, help=about)
    if many:
        return tuple(part.strip() for part in given.split(",") if part.strip())
    return None if optional and not given.strip() else given


def _number(
    field: dataclasses.Field[Any], kind: type, start: Any, title: str, key: str
) -> int | float | None:
    """Draw a number field; without a default it starts empty, showing that the default applies."""
    meta, default = field.metadata, field.default
    low, high = (None if meta[end] is None else kind(meta[end]) for end in ("low", "high"))
    more: dict[str, Any] = {"placeholder": "default"} if default is None else {}
    if kind is float:
        size = math.log10(default) if isinstance(default, float) and default > 0 else 0
        more |= {"format": "%g", "step": 10.0 ** (math.floor(size) - 1)}
    value = None if start is None else kind(start)
    about = plain(meta["help"])
    given = st.number_input(plain(title), low, high, value=value, key=key, help=about, **more)
    return given if given is None else kind(given)


def csv_download(
    name: str, csv: Callable[[], str | bytes], *, label: str = "", **more: Any
) -> None:
    """Draw the download button of a table; the label is the file's ``name`` unless given.

    The file is made when it is asked for: one made now could be replaced by the next redraw before
    the browser fetches it.
    """
    st.download_button(plain(label or name), csv, name, "text/csv", on_click="ignore", **more)
