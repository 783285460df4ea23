"""The Prune page's live perplexities: on the scores' own rows and on a held-out text.

The model is evaluated first on the beginning of the held-out text, which answers at once and shows
how much of the text that is, then on all of it. The two figures are shown separately.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.data.sources import BUNDLED
from core.live import client
from core.live.replies import Status
from core.prune import known as prune_view
from core.prune.outlook import CurvePoint
from core.prune.score_results import Importance
from core.runs.workspace import RunRecord, read_run
from core.ui import forms, prune_pad, say, state
from core.ui.live import Question, desk, key_of
from core.ui.say import plain

POLL_S = 0.25
WINDOW = 128
"""Tokens in a window of the held-out text; fewer if the model's context is shorter."""


@dataclass(frozen=True)
class Asked:
    """One text of the panel, with its answers for the dense model and for the plan."""

    title: str
    text: dict[str, Any]
    dense: Question
    plan: Question

    @property
    def done(self) -> bool:
        """Whether both have ended, successfully or not."""
        return self.dense.done and self.plan.done


def rows_of(run: Importance) -> dict[str, Any] | None:
    """Return an importance run's calibration rows as a question's text; None if it has none."""
    if not (run.calibration and run.samples and run.length):
        return None
    return {
        "source": run.calibration,
        "samples": run.samples,
        "window": run.length,
        "seed": run.seed or 0,
        "join": "on" if run.text.joined else "off",
        "chat_template": "on" if run.text.chat_template else "off",
    }


def with_answers(known: prune_view.Known) -> tuple[prune_view.Known, dict[str, Any] | None]:
    """Return ``known`` with every set that the live model has measured on the scores' own rows.

    Also returns these rows as the text of a question; None if there are no scores.
    """
    if not known.run:
        return known, None
    rows = rows_of(Importance.read(state.workspace().root / known.run) or Importance())
    if rows is None:
        return known, None
    points = tuple(
        CurvePoint("live", len(skip.drop), ppl, skip.drop, "live", skip.parts)
        for skip, ppl in desk().answers(known.info, rows)
    )
    return dataclasses.replace(known, points=(*known.points, *points)), rows


def usual_source(name: str) -> str:
    """Return the text to evaluate on if none is given: the study's evaluation text."""
    return forms.kept(name).settings.evaluation


def is_on() -> bool:
    """Whether live perplexities are on: a live model is running, or this session started one."""
    return bool(st.session_state.get("live_on")) or client.running(state.workspace()) is not None


def draw(name: str, info: CheckpointInfo, pad: prune_pad.Pad, rows: dict[str, Any] | None) -> None:
    """Draw the measured perplexity of the plan, and the live process with start and stop."""
    problem = prune_view.problem_of(pad.removal, info) if pad.removal else ""
    waiting = is_on() and not problem and not all(a.done for a in _ask(name, info, pad, rows))
    st.fragment(_panel, run_every=POLL_S if waiting else 5)(name, info, pad, rows, waiting)


def _ask(
    name: str, info: CheckpointInfo, pad: prune_pad.Pad, rows: dict[str, Any] | None
) -> list[Asked]:
    """Return every text with its current answers; missing ones are requested.

    The whole held-out text is requested once its beginning has been answered, and given up as soon
    as the plan changes: it would delay the quick answers.
    """
    source = pad.text or usual_source(name)
    whole: dict[str, Any] = {"source": source, "window": min(WINDOW, info.context or WINDOW)}
    quick = {**whole, "quick": True}
    quick_keys = [key_of(info, quick, skip) for skip in (Removal(), pad.removal)]
    texts = {"Calibration rows": rows} if rows else {}
    texts["Held-out text"] = quick
    keys = {
        key_of(info, text, skip) for text in texts.values() for skip in (Removal(), pad.removal)
    }
    begun = desk().known(quick_keys[0])
    partial = begun is not None and begun.windows < begun.of
    quick_done = all(desk().known(key) for key in quick_keys)
    if quick_done:
        keys |= {key_of(info, whole, skip) for skip in (Removal(), pad.removal)}
    for who in ("dense", "plan"):
        desk().give_up(f"{_owner()} {who}", keys)
    found = [_want(name, info, title, text, pad.removal) for title, text in texts.items()]
    if partial:
        found[-1] = dataclasses.replace(found[-1], title="Held-out start")
        if quick_done:
            found.append(_want(name, info, "Held-out text", whole, pad.removal))
        elif not found[-1].done:
            later = Question(name, pad.removal, whole)
            found.append(Asked("Held-out text", whole, later, later))
    return found


def quick(name: str, info: CheckpointInfo, pad: prune_pad.Pad, removal: Removal) -> Asked:
    """Ask for another plan than the pad's on the beginning of the held-out text."""
    text = {"source": pad.text or usual_source(name), "quick": True}
    text["window"] = min(WINDOW, info.context or WINDOW)
    return _want(name, info, "Held-out start", text, removal, "other plan")


def _want(
    name: str,
    info: CheckpointInfo,
    title: str,
    text: dict[str, Any],
    removal: Removal,
    who: str = "plan",
) -> Asked:
    def ask(skip: Removal, who: str) -> Question:
        question = Question(name, skip, dict(text))
        return desk().want(f"{_owner()} {who}", key_of(info, text, skip), question)

    dense = ask(Removal(), "dense")
    return Asked(title, text, dense, ask(removal, who) if removal else dense)


def _owner() -> str:
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    context = get_script_run_ctx()
    return context.session_id if context else "nobody"


def _panel(
    name: str,
    info: CheckpointInfo,
    pad: prune_pad.Pad,
    rows: dict[str, Any] | None,
    waiting: bool,
) -> None:
    record = client.running(state.workspace())
    with st.container(border=True):
        _head(name, record)
        if not is_on():
            st.caption(
                "Off. When on, the live model stays in memory and measures every choice you make; "
                "it releases the device whenever another run needs it."
            )
            return
        _source_field(pad, usual_source(name))
        problem = prune_view.problem_of(pad.removal, info) if pad.removal else ""
        if problem:
            say.caption(problem)
            return
        asked = _ask(name, info, pad, rows)
        for column, one in zip(st.columns(len(asked)), asked, strict=True):
            with column:
                answer(one, pad.removal, rows)
        _errors(info, pad, asked)
    if waiting and state.is_drawn_alone() and all(one.done for one in asked):
        st.rerun()  # so that the table and the curve include the answers


def _source_field(pad: prune_pad.Pad, usual: str) -> None:
    """Draw the field for the held-out text; its value goes into the URL."""
    given = st.text_input(
        "Held-out text",
        value=pad.text,
        placeholder=usual,
        help="Text to evaluate on: demo, wikitext2, a .txt, .jsonl, .csv or .parquet file, or "
        f"hub:NAME. Empty: {plain(usual)}.",
    )
    if given.strip() != pad.text:
        pad.text = given.strip()
        st.rerun()


def _errors(info: CheckpointInfo, pad: prune_pad.Pad, asked: list[Asked]) -> None:
    errors = dict.fromkeys(q.error for one in asked for q in (one.dense, one.plan) if q.error)
    for error in errors:
        say.warning(error)
    if errors and st.button("Ask again", key="live_again", icon=":material/refresh:"):
        for one in asked:
            for skip in (Removal(), pad.removal):
                desk().forget(key_of(info, one.text, skip))
        st.rerun()


def _head(name: str, record: RunRecord | None) -> None:
    """Draw the title, the process's memory use, and its button."""
    text, button = st.columns([4, 1], vertical_alignment="center")
    now = _status(record) if record else None
    line = "**Live perplexity**"
    if now:
        line += (
            f" :gray[· {now.memory_mib:,.0f} of {now.budget_mib:,.0f} MiB used on "
            f"{plain(now.device)}, process {now.process_mib:,.0f} MiB]"
        )
    elif record:
        line += f" :gray[· {plain(record.progress[2] or record.state)}]"
    elif is_on() and (gone := client.last(state.workspace())) and gone.state in ("lost", "failed"):
        line += (
            f" :orange[· process exited ({plain(gone.state)}); it restarts with the next request]"
        )
    text.markdown(line)
    if record and button.button("Stop", key="live_stop", icon=":material/stop_circle:"):
        st.session_state["live_on"] = False
        client.stop(record)
        st.rerun()
    if not record and button.button("Start", key="live_start", icon=":material/bolt:"):
        st.session_state["live_on"] = True
        st.rerun()


@st.cache_data(ttl=2, show_spinner=False)
def _status_of(path: str) -> Status | None:
    record = read_run(Path(path))
    return client.status(record) if record else None


def _status(record: RunRecord) -> Status | None:
    return _status_of(str(record.path))


def answer(one: Asked, drop: Removal, rows: Mapping[str, Any] | None = None) -> None:
    """Draw one perplexity with its change from the dense model's on the same text."""
    what = f"without {prune_view.shortly(drop)}" if drop else "dense"
    label = plain(f"{one.title}, {what}")
    asked, dense = one.plan, one.dense
    if asked.ppl is None:
        st.metric(label, "…")
        say.caption(
            asked.error and "No answer." or asked.waiting.capitalize() or "Waiting for an answer."
        )
        return
    change = None
    if drop and dense.done and asked.done and dense.ppl and asked.windows == dense.windows:
        change = f"{asked.ppl / dense.ppl - 1:+.1%} vs. {dense.ppl:.4g} dense"
    shown = f"{asked.ppl:.5g}" + ("" if asked.done else " …")
    st.metric(label, shown, change, delta_color="off")
    say.caption(measured_on(asked, one.text, rows))


def measured_on(asked: Question, text: Mapping[str, Any], rows: Mapping[str, Any] | None) -> str:
    """Return what an answer was measured on: text, amount of it, device and precision."""
    name = str(text["source"]).rsplit("/", 1)[-1]
    if "samples" in text:
        name += f" (calibration, seed {text['seed']})"
    elif rows and text["source"] == rows["source"] not in BUNDLED:
        name += " (same text as the scores)"
    else:
        name += " (held out)"
    part = "" if asked.done else "so far, "
    amount = f"{part}the first {asked.windows} of {asked.of} windows"
    if asked.windows == asked.of:
        amount = f"all {asked.of} windows"
    where = f", {asked.device} {asked.dtype}" if asked.device else ""
    return f"Measured on {name}, {amount} of {text['window']} tokens{where}, {asked.seconds:.2f} s."
