"""The Prune page's own state: two plans, which one is edited, and what ranks the blocks.

It survives page changes (plain session state, not a widget's) and is kept in the URL, so that it
can be shared and survives a reload:
``?drop=3,5&attention=7&mlp=8&b=2,4&run=RUN&criterion=ppl&plan=B&text=demo``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from core.checkpoint.drop import Removal
from core.errors import DepthcutError, OptionError
from core.prune import scores as block_scores
from core.prune import toggle
from core.runs.workspace import RunRecord, read_run
from core.ui import forms, state

PLANS = ("A", "B")
_QUERY = {
    "A": {"drop": "drop", "attention": "attention", "mlp": "mlp"},
    "B": {"drop": "b", "attention": "b_attention", "mlp": "b_mlp"},
}
"""Plan -> list of its removal -> name in the URL."""
_WIDTH = {"A": ("width", "neurons"), "B": ("b_width", "b_neurons")}
"""Plan -> names in the URL of its narrower MLPs and of the budget run that ranked the neurons."""
_LISTS = (
    *(name for names in _QUERY.values() for name in names.values()),
    *(name for names in _WIDTH.values() for name in names),
)
_NAMES = (*_LISTS, "plan", "run", "criterion", "text")
_STATE = "prune_pad"
ECHO_S = 10.0
"""Seconds for which a browser may still send a previous URL, until it has received the new one."""


@dataclass
class Pad:
    """One session's choice on one checkpoint."""

    plans: dict[str, Removal] = field(default_factory=lambda: dict.fromkeys(PLANS, Removal()))
    active: str = "A"
    run: str = ""
    criterion: str = ""
    text: str = ""
    """Text the live model is evaluated on, as for ``evaluate --perplexity``; empty: default."""
    rows: bool = False
    """Whether the live model also evaluates on the scores' own rows, however long that takes."""
    error: str = ""
    """Error in the URL or the last plan, with the command line's message."""
    clicks: int = 0
    """Number of clicks handled; part of the chart's key, so that each chart starts unselected."""
    clicked: toggle.Blocks = ()
    """The blocks selected by the last click."""
    made: str = ""
    """Id of the prune run started last."""
    curve: str = ""
    """Id of the curve run started last."""
    found: tuple[str, Removal] = ("", Removal())
    """The method of search or the solver whose choice was taken last, and the choice in order."""
    taken: tuple[str, tuple[Any, ...]] = ("", ())
    """The chart's key and the blocks or parts of the last click."""
    seen: dict[str, str] = field(default_factory=dict)
    """The URL's parameters as last read or written."""
    left: dict[tuple[str, ...], float] = field(default_factory=dict)
    """Earlier parameters, and when each was replaced."""
    turns: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("pills", "attention", "mlp", "slider"), 0)
    )
    """How often something else changed the plan that each widget shows; see `key`."""

    @property
    def removal(self) -> Removal:
        """The plan being edited."""
        return self.plans[self.active]

    @property
    def drop(self) -> toggle.Blocks:
        """Whole blocks of the plan being edited, in removal order."""
        return self.removal.drop

    @drop.setter
    def drop(self, blocks: toggle.Blocks) -> None:
        self.change(toggle.with_drop(self.removal, blocks))

    def change(self, removal: Removal, by: str = "") -> None:
        """Set the plan being edited; ``by`` names the widget that already shows it."""
        self.plans[self.active] = removal
        for widget in self.turns:
            self.turns[widget] += widget != by

    def wrote(self, query: dict[str, str]) -> None:
        """Remember the URL parameters that the page has now."""
        if query != self.seen:
            self.left[tuple(self.seen.values())] = time.monotonic()
            self.left.pop(tuple(query.values()), None)
        self.seen = query

    def is_echo(self, query: dict[str, str]) -> bool:
        """Whether this is one of our earlier URLs that the browser still sends, not a new one."""
        left = self.left.get(tuple(query.values()))
        return left is not None and time.monotonic() - left < ECHO_S

    def key(self, widget: str) -> str:
        """Return the key of a widget that shows the plan.

        The key changes whenever something else changes the plan: on a fast second click the
        browser still sends the widget's previous value, which must not be taken for a choice.
        """
        return f"pad_{widget}_{self.active}{self.turns[widget]}"


def shown(key: str, value: Any, argument: str) -> dict[str, Any]:
    """Return the keyword argument that makes a widget show ``value``.

    A new widget starts with it: setting the value afterwards let the widget report its own default
    first if the page redrew quickly enough, and that was taken for a choice. An existing widget's
    value is set in the session state.
    """
    if key not in st.session_state:
        return {argument: value}
    now = st.session_state[key]
    same = set(now or ()) == set(value) if isinstance(value, list) else now == value
    if not same:
        st.session_state[key] = value
    return {}


def current() -> Pad:
    """Return this session's pad, after reading the URL if it was opened from outside."""
    pad: Pad = st.session_state.setdefault(_STATE, Pad())
    query = {name: st.query_params.get(name, "") for name in _NAMES}
    if any(query.values()) and query != pad.seen and not pad.is_echo(query):
        _read(pad, query)
    return pad


def plan_elsewhere() -> Pad:
    """Return this session's pad for another page, whose URL does not hold the pad."""
    pad: Pad = st.session_state.setdefault(_STATE, Pad())
    return pad


def adopt_run() -> None:
    """Make the checkpoint of the URL's ``?run=`` the active one if the URL names no model.

    Call this before `frame.start`, which reads the active checkpoint.
    """
    run = st.query_params.get("run", "")
    record = read_run(state.workspace().root / run) if run.strip("./") else None
    if record and "model" not in st.query_params and record.spec.get("checkpoint"):
        st.query_params["model"] = str(record.spec["checkpoint"])


def adopt(record: RunRecord) -> None:
    """Apply what an earlier prune or curve run was asked for to the plan being edited."""
    pad, spec = plan_elsewhere(), record.spec
    scores, criteria = spec.get("scores"), spec.get("criteria")
    given = (spec.get(name) for name in ("drop", "attention", "mlp"))
    known = (one if isinstance(one, list) else [] for one in given)
    lists = [tuple(b for b in one if type(b) is int) for one in known]
    try:
        width = toggle.width_from_text(",".join(map(str, spec.get("mlp_width") or ())))
    except (OptionError, TypeError):
        width = ()
    if record.command == "prune" and (any(lists) or width):
        drop, attention, mlp = lists
        pad.change(Removal(drop, attention, mlp, width, str(spec.get("neurons") or "")))
    if record.command == "curve":
        pad.run = str(scores or "").rstrip("/").rsplit("/", 1)[-1]
        pad.criterion = str((*(criteria or ()), pad.criterion)[0])


def _read(pad: Pad, query: dict[str, str]) -> None:
    pad.seen, pad.error = query, ""
    for plan, names in _QUERY.items():
        lists: dict[str, Any] = {}
        for kind, name in names.items():
            try:
                lists[kind] = toggle.from_text(query[name])
            except OptionError as error:
                pad.error = str(error)
        width, order = (query[name] for name in _WIDTH[plan])
        try:
            lists["width"] = toggle.width_from_text(width)
        except OptionError as error:
            pad.error = str(error)
        pad.plans[plan] = Removal(**lists, order=order)
    pad.active = query["plan"] if query["plan"] in PLANS else "A"
    pad.change(pad.removal)
    pad.run = query["run"] or pad.run
    pad.text = query["text"] or pad.text
    try:
        pad.criterion = block_scores.canonical(query["criterion"]) if query["criterion"] else ""
    except OptionError as error:
        pad.error = str(error)
    for key in ("pad_criterion", "pad_run", "pad_active"):
        st.session_state.pop(key, None)


def share(pad: Pad) -> None:
    """Write the pad into the URL."""
    query = {
        name: toggle.to_text(getattr(pad.plans[plan], kind))
        for plan, names in _QUERY.items()
        for kind, name in names.items()
    }
    for plan, (width, order) in _WIDTH.items():
        query[width] = toggle.width_to_text(pad.plans[plan].width)
        query[order] = pad.plans[plan].order if pad.plans[plan].width else ""
    query |= {
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
        st.query_params.from_dict(wanted)  # in one step: a partial URL would be read as a new one


def clicked(key: str, blocks: int) -> None:
    """Apply a click on the chart ``key`` to the plan being edited."""
    pad: Pad = st.session_state[_STATE]
    event = st.session_state.get(key)
    points = dict(event) if event else None
    parts, named = toggle.clicked_parts(points), toggle.clicked_blocks(points)
    taken = (key, parts or named)
    if taken == pad.taken:
        return  # resent by a browser that has not drawn the next chart yet
    pad.taken = taken
    before = pad.removal
    if parts:
        block, part = parts[-1]
        pad.change(toggle.toggle_part(before, block, part) if block < blocks else before)
    else:
        pad.clicked = toggle.newly(named, pad.clicked)
        pad.drop = toggle.click(before.drop, pad.clicked, blocks)
    if pad.removal != before:
        pad.clicks += 1
        pad.error = ""


def take_set(removal: Removal, method: str = "", heal: str = "none") -> None:
    """Make ``removal`` the plan being edited; ``method`` of search found it, healed by ``heal``."""
    take_removal(removal, method)
    if heal != "none":
        forms.put(state.current_checkpoint(), "prune", {"heal": heal})


def take_removal(removal: Removal, method: str = "") -> None:
    """Make ``removal`` the plan being edited; ``method``, a criterion, found it."""
    pad = plan_elsewhere()
    pad.change(removal)
    pad.error = ""
    pad.clicks += 1
    pad.found = (method, removal.ordered)


def pair_clicked(key: str) -> None:
    """Apply a click on a pair in the chart ``key``: add both blocks, or remove both if in."""
    pad = plan_elsewhere()
    event = st.session_state.get(key)
    points = dict(event)["selection"]["points"] if event else []
    pair = toggle.pair_of(points[0] if points else None)
    if pair is None or pad.taken == (key, pair):
        return
    pad.taken = (key, pair)
    pad.drop, pad.error = toggle.both(pad.drop, pair), ""
    pad.clicks += 1


def picked(key: str) -> None:
    """Apply the pills ``key`` to the plan being edited."""
    pad: Pad = st.session_state[_STATE]
    if key != pad.key("pills"):
        return  # the browser resends the last value of a widget that is no longer shown
    chosen = toggle.follow(pad.drop, st.session_state.get(key) or ())
    pad.change(toggle.with_drop(pad.removal, chosen), "pills")
    pad.error = ""


def part_picked(key: str, part: str) -> None:
    """Apply the pills ``key`` for one part of every block to the plan being edited."""
    pad: Pad = st.session_state[_STATE]
    if key != pad.key(part):
        return
    before = pad.removal
    after = toggle.follow_part(before, part, st.session_state.get(key) or ())
    # Blocks that are dropped whole are not offered: the pills are drawn again if these change.
    pad.change(after, part if set(after.drop) == set(before.drop) else "")
    pad.error = ""


def planned(choose: Callable[[], Removal], by: str = "slider") -> None:
    """Put a criterion's choice into the plan being edited; an error is kept for display.

    ``by`` names the widget that already shows it.
    """
    pad: Pad = st.session_state[_STATE]
    pad.error = ""
    try:
        pad.change(choose(), by)
    except DepthcutError as error:
        pad.error = str(error)
