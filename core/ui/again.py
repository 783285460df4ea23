"""Use the settings of an earlier run again: its form is filled in; what is active stays so.

A run on another checkpoint is asked about first: its settings are taken for the active one, or the
run's own checkpoint becomes the active one.
"""

from __future__ import annotations

import time
from typing import Any

import streamlit as st

from core.errors import DepthcutError
from core.runs.workspace import RunRecord
from core.study import store, study
from core.ui import forms, prune_pad, recipes, retrain_recipes, state
from core.ui.prune_pad import ECHO_S
from core.ui.say import plain

PAGES = {
    "importance": "pages/importance.py",
    "curve": "pages/prune.py",
    "recipe": "app.py",
    "prune": "pages/prune.py",
    "search": "pages/prune.py",
    "budget": "pages/prune.py",
    "width": "pages/prune.py",
    "quantize": "pages/prune.py",
    "evaluate": "pages/evaluate.py",
    "retrain": "pages/retrain.py",
    "generate": "pages/retrain.py",
    "live": "pages/playground.py",
    "benchmark": "pages/compare.py",
}
"""The page that launches each command."""
ASKED, LABEL, _TAKEN = "again", "Use settings again", "again_taken"
_NAMED = ("evaluate", "benchmark", "retrain")
"""Commands whose form names its checkpoints itself: any of the study's will do."""


def offer(record: RunRecord) -> None:
    """Draw the link to the page whose form takes the run's settings; see `take`."""
    active, own = state.current_checkpoint(), str(record.spec.get("checkpoint") or "")
    if not own or not active or _is_of(record, own, active):
        _link(record, active or own, LABEL)
        return
    with st.popover(LABEL, icon=":material/tune:", type="tertiary"):
        st.caption(plain(f"This run was of {own}; the active checkpoint is {active}."))
        _link(record, active, "Use them for the active one")
        _link(record, own, "Make its checkpoint the active one")


def _link(record: RunRecord, checkpoint: str, label: str) -> None:
    query = {ASKED: record.id} | ({"model": checkpoint} if checkpoint else {})
    icon = ":material/tune:" if label == LABEL else None
    st.page_link(_page_of(record), label=plain(label), icon=icon, query_params=query)


def _is_of(record: RunRecord, own: str, active: str) -> bool:
    """Whether a run's settings fit the active checkpoint without asking."""
    if own == active:
        return True
    where = state.workspace()
    one, other = (store.dense_of(name, where) for name in (own, active))
    if record.command in _NAMED:
        return store.file_of(one, where) == store.file_of(other, where)
    return store.file_of(own, where) == store.file_of(active, where)


def take() -> None:
    """Fill in the form for the run that the address asks for (``?again=``), once.

    The browser goes to the page itself, as it does for every link, and not because a script tells
    it to: then it stops the timers of the page that it leaves. One that ticks meanwhile would run
    for the old page after the new one was drawn, and the browser clears what it shows.
    """
    asked = st.query_params.get(ASKED, "")
    if not asked:
        return
    del st.query_params[ASKED]
    before, when = st.session_state.get(_TAKEN, ("", 0.0))
    if asked == before and time.monotonic() - when < ECHO_S:
        return  # sent by a browser that has not received its new address yet
    st.session_state[_TAKEN] = (asked, time.monotonic())
    record = next((r for r in state.workspace().runs() if r.id == asked), None)
    if record is None or record.command not in PAGES:
        return
    checkpoint = state.current_checkpoint()
    if checkpoint:
        state.set_checkpoint(checkpoint)
    values, command = _values(record, checkpoint), record.command
    if command == "recipe":
        command, name = f"recipe {record.spec.get('name')}", str(record.spec.get("name"))
        key = "retrain_recipe" if name in retrain_recipes.NAMES else "recipe_choice"
        if name in (*retrain_recipes.NAMES, *recipes.OFFERED):
            st.session_state[key] = name
    forms.put(checkpoint, command, values)
    if command == "search":
        forms.put(checkpoint, "curve", {k: v for k, v in values.items() if k.startswith("protect")})
    prune_pad.adopt(record)
    state.open_form(command)


def _page_of(record: RunRecord) -> str:
    """Return the page with a run's form."""
    name = str(record.spec.get("name"))
    if record.command != "recipe" or name in recipes.OFFERED:
        return PAGES[record.command]
    return PAGES["retrain" if name in retrain_recipes.NAMES else "evaluate"]


def _values(record: RunRecord, checkpoint: str) -> dict[str, Any]:
    """Return a run's options as the fields of its form."""
    values = {k: v for k, v in record.spec.items() if k not in ("name", "out", "dry_run", "resume")}
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
