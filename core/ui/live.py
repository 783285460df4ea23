"""True perplexities from the live model, asked in the background: a click never waits for them.

`desk()` is shared by all sessions of this dashboard: it keeps answers by checkpoint content, text
and set of blocks, and asks for those that a page wants. `panel` draws the Prune page's piece.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from core.checkpoint import CheckpointInfo
from core.errors import DepthcutError
from core.live import client
from core.prune.outlook import CurvePoint
from core.ui import prune_view, state
from core.workspace import RunRecord, Workspace, read_json

POLL_S = 0.25
HELD_OUT: dict[str, Any] = {"source": "demo", "window": 128}
KEPT = 4096
"""Answers that a dashboard remembers."""


@dataclass
class Question:
    """One set of blocks before one text, and how far its answer is."""

    checkpoint: str
    skip: frozenset[int]
    text: dict[str, Any]
    ppl: float | None = None
    windows: int = 0
    of: int = 0
    done: bool = False
    error: str = ""
    waiting: str = ""
    seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)
    """Device and precision, as the answer said."""
    stop: threading.Event = field(default_factory=threading.Event, repr=False)


Key = tuple[str, str, frozenset[int]]


def key_of(info: CheckpointInfo, text: Mapping[str, Any], skip: Iterable[int]) -> Key:
    """Return what an answer depends on: content, text and set."""
    return info.key or info.path, repr(sorted(text.items())), frozenset(skip)


class Desk:
    """Questions and answers of one dashboard process."""

    def __init__(self, ask: Callable[[Question], None] | None = None) -> None:
        """Answer with ``ask`` (default: through the workspace's live process)."""
        self._ask = ask or ask_live
        self._known: dict[Key, Question] = {}
        self._latest: dict[tuple[str, str], Key] = {}
        self._lock = threading.Lock()

    def known(self, key: Key) -> Question | None:
        """Return a finished answer without asking."""
        found = self._known.get(key)
        return found if found and found.done and not found.error else None

    def settled(self, key: Key) -> bool:
        """Whether this was asked and has ended, well or not."""
        found = self._known.get(key)
        return found is not None and found.done

    def want(self, owner: str, key: Key, question: Question) -> Question:
        """Return the question as it stands, asked in the background where nobody has yet.

        What the same ``owner`` wanted before on this text and still waits for is given up. A
        question that failed is asked again when its owner has wanted something else since.
        """
        place = (owner, key[1])
        with self._lock:
            before = self._latest.get(place)
            self._latest[place] = key
            if before and before != key and not self._known[before].done:
                self._known.pop(before).stop.set()
            found = self._known.get(key)
            if found and not (found.error and before != key):
                return found
            self._known[key] = question
            for old in list(self._known)[: max(0, len(self._known) - KEPT)]:
                if self._known[old].done and old not in self._latest.values():
                    del self._known[old]
        threading.Thread(target=self._run, args=(question,), daemon=True).start()
        return question

    def _run(self, question: Question) -> None:
        try:
            self._ask(question)
        except DepthcutError as error:
            question.error = str(error)
        except Exception as error:
            question.error = f"Unexpected {type(error).__name__}: {error}."
        question.done = True

    def answers(
        self, info: CheckpointInfo, text: Mapping[str, Any]
    ) -> list[tuple[frozenset[int], float]]:
        """Return every set that was measured on ``text``, with its perplexity."""
        place = key_of(info, text, ())[:2]
        return [
            (key[2], question.ppl)
            for key, question in list(self._known.items())
            if key[:2] == place and question.done and question.ppl and not question.error
        ]

    def forget(self, key: Key) -> None:
        """Ask again when it is wanted next."""
        with self._lock:
            self._latest = {place: k for place, k in self._latest.items() if k != key}
            self._known.pop(key, None)


class _Superseded(Exception):
    pass


def ask_live(question: Question) -> None:
    """Ask the workspace's live process, starting it where there is none."""

    def wait(why: str) -> None:
        question.waiting = why
        if question.stop.is_set():
            raise _Superseded

    try:
        record = client.ensure(Workspace(), {"checkpoint": question.checkpoint}, on_wait=wait)
    except _Superseded:
        return
    began = time.perf_counter()
    values = {
        "checkpoint": question.checkpoint,
        "skip": sorted(question.skip),
        **question.text,
    }
    for event in client.events(record, "perplexity", values, stop=question.stop):
        question.waiting = str(event.get("for", ""))
        if "ppl" in event:
            question.ppl = event["ppl"]
            question.windows, question.of = event["windows"], event["of"]
            question.seconds = time.perf_counter() - began
            question.about = {k: event.get(k) for k in ("device", "dtype")}


@st.cache_resource(show_spinner=False)
def desk() -> Desk:
    """Return this dashboard's desk."""
    return Desk()


def rows_of(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return an importance run's calibration rows as the text of a question; None without one."""
    if not all(summary.get(n) for n in ("calibration", "samples", "length")):
        return None
    return {
        "source": str(summary["calibration"]),
        "samples": int(summary["samples"]),
        "window": int(summary["length"]),
        "seed": int(summary.get("seed") or 0),
    }


def with_answers(known: prune_view.Known) -> tuple[prune_view.Known, dict[str, Any] | None]:
    """Return ``known`` with every set that the live model has measured on the scores' own rows.

    Also returns these rows as the text of a question; None where there are no scores.
    """
    if not known.run:
        return known, None
    rows = rows_of(read_json(state.workspace().root / known.run / "summary.json") or {})
    if rows is None:
        return known, None
    points = tuple(
        CurvePoint("live", len(skip), ppl, tuple(sorted(skip)), "live")
        for skip, ppl in desk().answers(known.info, rows)
    )
    return dataclasses.replace(known, points=(*known.points, *points)), rows


def is_on() -> bool:
    """Whether this session wants live perplexities: one runs, or this session started one."""
    return bool(st.session_state.get("live_on")) or client.running(state.workspace()) is not None


def panel(
    name: str, info: CheckpointInfo, drop: tuple[int, ...], rows: dict[str, Any] | None
) -> None:
    """Draw the true perplexity without ``drop``, and the live process with start and stop."""
    wanted = (name, drop, rows)
    possible = not (drop and prune_view.drop_problem(drop, info.blocks))
    waiting = is_on() and possible and not _all_settled(info, drop, rows)
    st.fragment(_panel, run_every=POLL_S if waiting else 5)(info, wanted, waiting)


def _texts(rows: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the texts to judge by: the importance run's rows first, as they are quick."""
    return ({"Calibration rows": rows} if rows else {}) | {"Held-out text": _held_out()}


def _held_out() -> dict[str, Any]:
    given = str(st.session_state.get("live_source") or "").strip()
    return {**HELD_OUT, "source": given} if given else HELD_OUT


def _all_settled(info: CheckpointInfo, drop: tuple[int, ...], rows: dict[str, Any] | None) -> bool:
    sets = ((), drop)
    return all(desk().settled(key_of(info, t, s)) for t in _texts(rows).values() for s in sets)


def _owner() -> str:
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    context = get_script_run_ctx()
    return context.session_id if context else "nobody"


def _want(
    name: str, info: CheckpointInfo, text: dict[str, Any], drop: tuple[int, ...], who: str
) -> Question:
    question = Question(name, frozenset(drop), dict(text))
    return desk().want(f"{_owner()} {who}", key_of(info, text, drop), question)


def _panel(info: CheckpointInfo, wanted: tuple[Any, ...], waiting: bool) -> None:
    name, drop, rows = wanted
    record = client.running(state.workspace())
    with st.container(border=True):
        _head(name, record)
        if not is_on():
            st.caption(
                "Off. The live model stays in memory and measures every choice you make; it gives "
                "the device to any other run that asks."
            )
            return
        problem = prune_view.drop_problem(drop, info.blocks) if drop else ""
        if problem:
            st.caption(problem)
            return
        questions = []
        columns = st.columns(len(_texts(rows)))
        for column, (title, text) in zip(columns, _texts(rows).items(), strict=True):
            dense = _want(name, info, text, (), "dense")
            asked = _want(name, info, text, drop, "plan") if drop else dense
            questions += [dense, asked]
            with column:
                _answer(title, text, dense, asked, drop)
        for error in dict.fromkeys(q.error for q in questions if q.error):
            st.warning(error)
            if st.button("Ask again", key="live_again", icon=":material/refresh:"):
                for text in _texts(rows).values():
                    for skip in ((), drop):
                        desk().forget(key_of(info, text, skip))
                st.rerun()
    if waiting and all(q.done for q in questions):
        st.rerun()  # the table and the curve take it in


def _head(name: str, record: RunRecord | None) -> None:
    """Draw the title, what the process holds, and its button."""
    text, button = st.columns([4, 1], vertical_alignment="center")
    now = _status(record) if record else None
    line = "**Live perplexity**"
    if now:
        line += (
            f" :gray[· {now['memory_mib']:,.0f} of {now['budget_mib']:,.0f} MiB used on "
            f"{now['device']}, process {now['process_mib']:,.0f} MiB]"
        )
    elif record:
        line += f" :gray[· {record.progress[2] or record.state}]"
    elif is_on() and (gone := client.last(state.workspace())) and gone.state in ("lost", "failed"):
        line += f" :orange[· its process is gone ({gone.state}); the next question starts it anew]"
    text.markdown(line)
    if record and button.button("Stop", key="live_stop", icon=":material/stop_circle:"):
        st.session_state["live_on"] = False
        client.stop(record)
        st.rerun()
    if not record and button.button("Start", key="live_start", icon=":material/bolt:"):
        st.session_state["live_on"] = True
        st.rerun()


@st.cache_data(ttl=2, show_spinner=False)
def _status_of(path: str) -> dict[str, Any] | None:
    from pathlib import Path

    from core.workspace import read_run

    record = read_run(Path(path))
    return client.status(record) if record else None


def _status(record: RunRecord) -> dict[str, Any] | None:
    return _status_of(str(record.path))


def _answer(
    title: str, text: dict[str, Any], dense: Question, asked: Question, drop: tuple[int, ...]
) -> None:
    """Draw one perplexity with its change against the dense model on the same text."""
    what = f"without {', '.join(map(str, drop))}" if drop else "dense"
    if asked.ppl is None:
        st.metric(f"{title}, {what}", "…")
        st.caption(asked.error and "No answer." or asked.waiting.capitalize() or "Asking.")
        return
    change = None
    if drop and dense.done and asked.done and dense.ppl and asked.windows == dense.windows:
        change = f"{asked.ppl / dense.ppl - 1:+.1%} against {dense.ppl:.4g} dense"
    shown = f"{asked.ppl:.5g}" + ("" if asked.done else " …")
    st.metric(f"{title}, {what}", shown, change, delta_color="off")
    part = "" if asked.done else "So far: "
    where = f", {asked.about['device']} {asked.about['dtype']}" if asked.about.get("device") else ""
    st.caption(
        f"{part}measured on {_text_name(text)}, {asked.windows} of {asked.of} windows of "
        f"{text['window']} tokens{where}, {asked.seconds:.2f} s."
    )


def _text_name(text: Mapping[str, Any]) -> str:
    name = str(text["source"]).rsplit("/", 1)[-1]
    return f"{name} (calibration, seed {text['seed']})" if "samples" in text else f"{name} held out"
