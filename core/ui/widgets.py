"""Widgets from the fields of a spec: label, help, bounds and default are declared once there."""

from __future__ import annotations

import dataclasses
from typing import Any

import streamlit as st

from core.spec import hints_of


def fields(spec_class: type, names: tuple[str, ...], start: dict[str, Any]) -> dict[str, Any]:
    """Draw one widget a field, side by side, and return their values.

    ``start`` replaces defaults. Values outlive a page change: they are kept under a key that is
    not a widget's.
    """
    by_name = {f.name: f for f in dataclasses.fields(spec_class)}
    kept: dict[str, Any] = st.session_state.setdefault(f"kept_{spec_class.__name__}", {})
    kept.update({name: value for name, value in start.items() if name in names})
    columns = st.columns(len(names))
    for name, column in zip(names, columns, strict=True):
        with column:
            kept[name] = _widget(spec_class, by_name[name], kept.get(name))
    return {name: kept[name] for name in names}


def _widget(spec_class: type, field: dataclasses.Field[Any], value: Any) -> Any:
    meta = field.metadata
    label = field.name.replace("_", " ").capitalize()
    label += f" ({meta['unit']})" if meta["unit"] else ""
    start: Any = field.default if value is None else value
    key = f"{spec_class.__name__}_{field.name}"
    if meta["choices"] and isinstance(field.default, tuple):
        picked = st.pills(
            label,
            meta["choices"],
            selection_mode="multi",
            default=list(start),
            key=key,
            help=meta["help"],
        )
        return tuple(c for c in meta["choices"] if c in picked)
    if meta["choices"]:
        index = meta["choices"].index(start)
        return st.selectbox(label, meta["choices"], index=index, key=key, help=meta["help"])
    if hints_of(spec_class)[field.name] is int:
        low = None if meta["low"] is None else int(meta["low"])
        high = None if meta["high"] is None else int(meta["high"])
        return int(st.number_input(label, low, high, value=int(start), key=key, help=meta["help"]))
    return st.text_input(label, value=str(start), key=key, help=meta["help"])
