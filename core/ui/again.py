"""Use the settings of an earlier run again: its form is filled in; what is active stays so.

A run on another checkpoint is asked about first: its settings are taken for the active one, or the
run's own checkpoint becomes the active one.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from core.errors import DepthcutError
from core.runs.workspace import RunRecord
from core.study import store, study
from core.ui import forms, prune_pad, state
from core.ui.say import plain

PAGES = {
    "importance": "pages/importance.py",
    "curve": "pages/prune.py",
    "recipe": "app.py",
    "prune": "pages/prune.py",
    "search": "pages/prune.py",
    "width": "pages/prune.py",
    "quantize": "pages/prune.py",
    "evaluate": "pages/evaluate.py",
    "retrain": "pages/retrain.py",
    "live": "pages/playground.py",
    "benchmark": "pages/compare.py",
}
"""The page that launches each command."""
_GOING = "again_page"
_NAMED = ("evaluate", "benchmark", "retrain")
"""Commands whose form names its checkpoints itself: any of the study's will do."""


def offer(record: RunRecord) -> None:
    """Draw the button; the page opens at the next drawing of the whole page, see `follow`."""
    active, own = state.current_checkpoint(), str(record.spec.get("checkpoint") or "")
    if not own or not active or _is_of(record, own, active):
        if st.button("Use settings again", key=f"again_{record.id}", icon=":material/tune:"):
            _use(record, active or own)
        return
    with st.popover("Use settings again", icon=":material/tune:", key=f"again_{record.id}"):
        st.caption(plain(f"This run was of {own}; the active checkpoint is {active}."))
        if st.button("Use them for the active one", key=f"again_here_{record.id}"):
            _use(record, active)
        if st.button("Make its checkpoint the active one", key=f"again_there_{record.id}"):
            _use(record, own)


def _is_of(record: RunRecord, own: str, active: str) -> bool:
    """Whether a run's settings fit the active checkpoint without asking."""
    if own == active:
        return True
    where = state.workspace()
    one, other = (store.dense_of(name, where) for name in (own, active))
    if record.command in _NAMED:
        return store.file_of(one, where) == store.file_of(other, where)
    return store.file_of(own, where) == store.file_of(active, where)


def _use(record: RunRecord, checkpoint: str) -> None:
    """Fill in the form for ``checkpoint``, make it active and ask for the page."""
    if checkpoint and checkpoint != state.current_checkpoint():
        state.set_checkpoint(checkpoint)
    command, values = record.command, _values(record, checkpoint)
    if command == "recipe":
        command = f"recipe {record.spec.get('name')}"
    forms.put(checkpoint, command, values)
    if record.command == "search":
        forms.put(checkpoint, "curve", {k: v for k, v in values.items() if k.startswith("protect")})
    prune_pad.adopt(record)
    state.open_form(record.command)
    st.session_state[_GOING] = PAGES[record.command]
    st.rerun()


def _values(record: RunRecord, checkpoint: str) -> dict[str, Any]:
    """Return a run's options as the fields of its form."""
    values = {k: v for k, v in record.spec.items() if k not in ("out", "dry_run", "resume")}
    named = [values.pop("checkpoint", None), *(values.pop("checkpoints", None) or ())]
    names = [str(name) for name in named if name]
    if record.command == "retrain":
        values |= {"checkpoint": names[0] if names else "", "folder": ""}
    elif record.command in _NAMED:
        try:
            known = study(state.workspace(), checkpoint)
        except DepthcutError:
            return values
        found = [known.at(name) for name in names]
        values["checkpoints"] = [v.id for v in found if v and v.folder]
    elif record.command == "width":
        amounts = ("ratio", "match", "params")
        values["amount"] = next((a for a in amounts if values.get(a) is not None), "ratio")
    return values


def follow() -> None:
    """Open the page that a button has asked for."""
    page = st.session_state.pop(_GOING, None)
    if page:
        st.switch_page(page)
