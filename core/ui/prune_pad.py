"""The Prune page's own state: two plans, which one is edited, and what ranks the blocks.

It survives page changes (plain session state, not a widget's) and lives in the address, so that
it can be shared and outlives a reload: ``?drop=3,5&b=2,4&run=RUN&criterion=ppl&plan=B``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from core.errors import DepthcutError, OptionError
from core.prune import scores as block_scores
from core.ui import state, toggle
from core.workspace import read_run

PLANS = ("A", "B")
_QUERY = {"A": "drop", "B": "b"}
_STATE = "prune_pad"


@dataclass
class Pad:
    """One session's choice on one checkpoint."""

    plans: dict[str, toggle.Blocks] = field(default_factory=lambda: {"A": (), "B": ()})
    active: str = "A"
    run: str = ""
    criterion: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of widgets that outlive a page change."""
    error: str = ""
    """What was wrong with the address or the last plan, as the command line says it."""
    clicks: int = 0
    """Number of clicks taken; part of the chart's key, so that each starts unselected."""
    made: str = ""
    """The prune run started last."""
    curve: str = ""
    """The curve run started last."""
    seen: dict[str, str] = field(default_factory=dict)
    """The address as last read or written."""

    @property
    def drop(self) -> toggle.Blocks:
        """The blocks of the plan that is edited, in removal order."""
        return self.plans[self.active]

    @drop.setter
    def drop(self, blocks: toggle.Blocks) -> None:
        self.plans[self.active] = blocks


def current() -> Pad:
    """Return this session's pad, taking in an address that was opened from outside."""
    pad: Pad = st.session_state.setdefault(_STATE, Pad())
    _take_settings(pad)
    query = {name: st.query_params.get(name, "") for name in ("drop", "b", "plan", "run")}
    query["criterion"] = st.query_params.get("criterion", "")
    if any(query.values()) and query != pad.seen:
        _read(pad, query)
    return pad


def plan_elsewhere() -> Pad:
    """Return this session's pad for another page, whose address is not the pad's."""
    pad: Pad = st.session_state.setdefault(_STATE, Pad())
    return pad


def adopt_run() -> None:
    """Make the checkpoint of an address's ``?run=`` the active one where it names no model.

    To be called before the frame, which reads the active checkpoint.
    """
    run = st.query_params.get("run", "")
    record = read_run(state.workspace().root / run) if run.strip("./") else None
    if record and "model" not in st.query_params and record.spec.get("checkpoint"):
        st.query_params["model"] = str(record.spec["checkpoint"])


def _take_settings(pad: Pad) -> None:
    """Take in the settings of an earlier run that the Jobs page was told to use again."""
    prune, curve = state.take_settings("prune"), state.take_settings("curve")
    if prune.get("drop"):
        pad.drop = tuple(prune["drop"])
    if curve:
        pad.run = str(curve.get("scores") or "").rstrip("/").rsplit("/", 1)[-1]
        pad.criterion = (*curve.get("criteria", ()), pad.criterion)[0]
        for name, field_name in (("first", "protect_first"), ("last", "protect_last")):
            if curve.get(field_name) is not None:
                pad.settings[name] = curve[field_name]


def _read(pad: Pad, query: dict[str, str]) -> None:
    pad.seen, pad.error = query, ""
    for plan, name in _QUERY.items():
        try:
            pad.plans[plan] = toggle.from_text(query[name])
        except OptionError as error:
            pad.error = str(error)
    pad.active = query["plan"] if query["plan"] in PLANS else "A"
    pad.run = query["run"] or pad.run
    try:
        pad.criterion = block_scores.canonical(query["criterion"]) if query["criterion"] else ""
    except OptionError as error:
        pad.error = str(error)
    for key in ("pad_criterion", "pad_run", "pad_active"):
        st.session_state.pop(key, None)


def share(pad: Pad) -> None:
    """Write the pad into the address."""
    query = {
        "drop": toggle.to_text(pad.plans["A"]),
        "b": toggle.to_text(pad.plans["B"]),
        "plan": pad.active if pad.active != "A" else "",
        "run": pad.run,
        "criterion": pad.criterion,
    }
    pad.seen = query
    for name, value in query.items():
        if value and st.query_params.get(name) != value:
            st.query_params[name] = value
        elif not value and name in st.query_params:
            del st.query_params[name]


def kept(pad: Pad, name: str, default: Any) -> dict[str, Any]:
    """Return ``key`` and ``on_change`` of a widget whose value outlives a page change."""
    key = f"pad_{name}"
    if key not in st.session_state:
        st.session_state[key] = pad.settings.get(name, default)

    def keep() -> None:
        pad.settings[name] = st.session_state[key]

    return {"key": key, "on_change": keep}


def clicked(key: str, blocks: int) -> None:
    """Take a click on the chart ``key`` into the plan that is edited."""
    pad: Pad = st.session_state[_STATE]
    event = st.session_state.get(key)
    before = pad.drop
    pad.drop = toggle.click(before, dict(event) if event else None, blocks)
    if pad.drop != before:
        pad.clicks += 1
        pad.error = ""


def picked(key: str) -> None:
    """Take the pills ``key`` into the plan that is edited."""
    pad: Pad = st.session_state[_STATE]
    pad.drop = toggle.follow(pad.drop, st.session_state.get(key) or ())
    pad.error = ""


def planned(choose: Callable[[], toggle.Blocks]) -> None:
    """Put a criterion's choice into the plan that is edited; an error is kept to be shown."""
    pad: Pad = st.session_state[_STATE]
    pad.error = ""
    try:
        pad.drop = choose()
    except DepthcutError as error:
        pad.error = str(error)
