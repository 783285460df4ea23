"""The Prune page's own state: two plans, which one is edited, and what ranks the blocks.

It survives page changes (plain session state, not a widget's) and lives in the address, so that
it can be shared and outlives a reload: ``?drop=3,5&b=2,4&run=RUN&criterion=ppl&plan=B&text=demo``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from core.errors import DepthcutError, OptionError
from core.prune import scores as block_scores
from core.prune import toggle
from core.runs.workspace import read_run
from core.ui import state

PLANS = ("A", "B")
_QUERY = {"A": "drop", "B": "b"}
_NAMES = ("drop", "b", "plan", "run", "criterion", "text")
_STATE = "prune_pad"
ECHO_S = 10.0
"""A browser sends the address before last for at most so long: until it has heard of the new."""


@dataclass
class Pad:
    """One session's choice on one checkpoint."""

    plans: dict[str, toggle.Blocks] = field(default_factory=lambda: {"A": (), "B": ()})
    active: str = "A"
    run: str = ""
    criterion: str = ""
    text: str = ""
    """What the live model judges by, as ``evaluate --perplexity`` takes it; empty: the usual."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of widgets that outlive a page change."""
    error: str = ""
    """What was wrong with the address or the last plan, as the command line says it."""
    clicks: int = 0
    """Number of clicks taken; part of the chart's key, so that each starts unselected."""
    clicked: toggle.Blocks = ()
    """The blocks that the last of them named."""
    made: str = ""
    """The prune run started last."""
    curve: str = ""
    """The curve run started last."""
    taken: tuple[str, toggle.Blocks] = ("", ())
    """The chart's key and the blocks of the last click."""
    seen: dict[str, str] = field(default_factory=dict)
    """The address as last read or written."""
    left: dict[tuple[str, ...], float] = field(default_factory=dict)
    """Addresses written before that one, and when each was left."""
    turns: dict[str, int] = field(default_factory=lambda: {"pills": 0, "slider": 0})
    """How often each widget's plan was changed by something else, see `key`."""

    @property
    def drop(self) -> toggle.Blocks:
        """The blocks of the plan that is edited, in removal order."""
        return self.plans[self.active]

    @drop.setter
    def drop(self, blocks: toggle.Blocks) -> None:
        self.change(blocks)

    def change(self, blocks: toggle.Blocks, by: str = "") -> None:
        """Set the plan that is edited; ``by`` names the widget that shows it already."""
        self.plans[self.active] = blocks
        for widget in self.turns:
            self.turns[widget] += widget != by

    def wrote(self, query: dict[str, str]) -> None:
        """Remember the address that the page has now."""
        if query != self.seen:
            self.left[tuple(self.seen.values())] = time.monotonic()
            self.left.pop(tuple(query.values()), None)
        self.seen = query

    def is_echo(self, query: dict[str, str]) -> bool:
        """Whether this is an address of ours that the browser still sends, not one opened."""
        left = self.left.get(tuple(query.values()))
        return left is not None and time.monotonic() - left < ECHO_S

    def key(self, widget: str) -> str:
        """Return the key of a widget that shows the plan.

        Another one after every change from elsewhere: on a fast second click the browser still
        sends what the widget showed before, which must not be taken for a choice.
        """
        return f"pad_{widget}_{self.active}{self.turns[widget]}"


def shown(key: str, value: Any, argument: str) -> dict[str, Any]:
    """Return the argument by which a widget shows ``value``.

    A new widget starts with it: one set afterwards tells its own default first, where a page that
    draws itself anew is quick enough, and that was taken for a choice. One that is there is set.
    """
    if key not in st.session_state:
        return {argument: value}
    now = st.session_state[key]
    same = set(now or ()) == set(value) if isinstance(value, list) else now == value
    if not same:
        st.session_state[key] = value
    return {}


def current() -> Pad:
    """Return this session's pad, taking in an address that was opened from outside."""
    pad: Pad = st.session_state.setdefault(_STATE, Pad())
    _take_settings(pad)
    query = {name: st.query_params.get(name, "") for name in _NAMES}
    if any(query.values()) and query != pad.seen and not pad.is_echo(query):
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
    pad.change(pad.drop)
    pad.run = query["run"] or pad.run
    pad.text = query["text"] or pad.text
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
        "text": pad.text,
    }
    pad.wrote(query)
    now = st.query_params.to_dict()
    wanted = {k: v for k, v in now.items() if k not in query} | {
        k: v for k, v in query.items() if v
    }
    if wanted != now:
        st.query_params.from_dict(wanted)  # at once: half an address would be read as another one


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
    named = toggle.clicked_blocks(dict(event) if event else None)
    taken = (key, named)
    if taken == pad.taken:
        return  # sent again by a browser that has not drawn the next chart yet
    pad.taken = taken
    before = pad.drop
    pad.clicked = toggle.newly(named, pad.clicked)
    pad.drop = toggle.click(before, pad.clicked, blocks)
    if pad.drop != before:
        pad.clicks += 1
        pad.error = ""


def picked(key: str) -> None:
    """Take the pills ``key`` into the plan that is edited."""
    pad: Pad = st.session_state[_STATE]
    if key != pad.key("pills"):
        return  # a widget that is no longer shown; the browser sends its value once more
    pad.change(toggle.follow(pad.drop, st.session_state.get(key) or ()), "pills")
    pad.error = ""


def planned(choose: Callable[[], toggle.Blocks]) -> None:
    """Put a criterion's choice into the plan that is edited; an error is kept to be shown."""
    pad: Pad = st.session_state[_STATE]
    pad.error = ""
    try:
        pad.change(choose(), "slider")
    except DepthcutError as error:
        pad.error = str(error)
