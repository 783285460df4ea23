"""Start runs from a page and follow them; everything is read from the run directory."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from core import words
from core.checkpoint import own_code
from core.errors import DepthcutError
from core.runs import jobs
from core.runs.workspace import RunRecord, read_run
from core.ui import say, state, widgets
from core.ui.say import plain

STOPPING = "Cancel requested; the run will stop at its next step."


def launch_once(
    command: str, values: dict[str, Any], on: Mapping[str, Any] | None = None
) -> RunRecord | None:
    """Start a run, or return the one that the same wish has just started; errors are shown.

    ``on`` asks for another place than this machine.

    A fast second click runs the script again with the button still pressed, and another tab may
    show the same button: see `core.runs.jobs.launch_once`.
    """
    try:
        return jobs.launch_once(command, values, state.workspace(), on=on)
    except DepthcutError as error:
        say.error(str(error))
        return None


def launcher(
    command: str,
    values: dict[str, Any],
    label: str,
    icon: str,
    problem: str,
    on: Mapping[str, Any] | None = None,
) -> str:
    """Draw the button that starts a run of a form; return the run to watch, "" if there is none.

    It is disabled by a ``problem`` and while such a run of the same checkpoint is live.
    """
    name = values["checkpoint"]
    disabled = bool(problem or _live(command, name))
    if st.button(
        plain(label), type="primary", icon=icon, key=f"{command}_start", disabled=disabled
    ) and (record := launch_once(command, values, on)):
        st.session_state[f"{command}_run"] = record.id
        st.rerun()
    return watched(command, name)


def watched(command: str, checkpoint: str) -> str:
    """Return the id of the run to watch: the live one, else the one started here last, else ""."""
    live = _live(command, checkpoint)
    return live[0].id if live else str(st.session_state.get(f"{command}_run", ""))


def _live(command: str, checkpoint: str) -> list[RunRecord]:
    found = state.workspace().runs(command)
    return [r for r in found if r.is_live and r.spec.get("checkpoint") == checkpoint]


def show(run_id: str) -> None:
    """Draw a run's progress, cancel button, log and command; nothing for an empty id.

    The fragment redraws itself while the run is live; when the run ends, the page redraws once.
    """
    record = read_run(state.workspace().root / run_id) if run_id else None
    if record:
        st.fragment(_view, run_every=1.0 if record.is_live else None)(run_id, record.is_live)


def show_all(
    *commands: str, started: Iterable[str] = (), only: Callable[[RunRecord], bool] = bool
) -> None:
    """Draw the card of every live run of these commands, and of the runs ``started`` here.

    A live run has its card whoever started it, so also after the page was reloaded. Steps of
    recipes are part of their recipe's card; ``only`` limits the runs further.
    """
    found = [
        r.id
        for r in state.workspace().runs()
        if r.command in commands and r.is_live and not r.parent and only(r)
    ]
    for run_id in dict.fromkeys([*(s for s in started if s), *found]):
        show(run_id)


def current(run_id: str, was_live: bool) -> RunRecord | None:
    """Return the run that a fragment draws as it is now; None, and said so, if its folder is gone.

    The page is redrawn once if the run has ended, or begun again, since the fragment was drawn as
    part of the page.
    """
    record = read_run(state.workspace().root / run_id)
    if record is None:
        st.info("The run's folder no longer exists.")
    elif was_live != record.is_live and state.is_drawn_alone():
        st.rerun()
    return record


def _view(run_id: str, was_live: bool) -> None:
    record = current(run_id, was_live)
    if record is None:
        return
    with st.container(border=True):
        if record.is_live:
            say.bold(state.names().run(record))
        _state(record)
        if record.is_live:
            widgets.action(
                "Cancel",
                lambda: jobs.request_cancel(record),
                key=f"cancel_{run_id}",
                told=STOPPING,
                icon=":material/stop_circle:",
            )
        with st.expander("Log and command"):
            st.code(shlex.join(record.argv), language="bash", wrap_lines=True)
            st.code(record.log_tail(15) or "nothing yet", language=None)


def day(record: RunRecord) -> str:
    """Return the date and time at which a run ended, or began if it has not."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(record.finished or record.started))


def expected(seconds: float | None, origin: str | None) -> str:
    """Return the sentence on the time that a run will take, before it starts."""
    if seconds is None:
        return "Time: unknown until a scoring or an evaluation has finished on this device."
    return f"Estimated time: about {words.duration(seconds)}, at {origin}."


def progress(record: RunRecord) -> None:
    """Draw the progress of a live run, or what it is waiting for; nothing if it has ended."""
    facts = record.place_facts() if record.is_live else {}
    if facts.get("trouble"):
        say.warning(f"{facts['trouble']} The run is not affected; trying again.")
    if record.state == "queued" and not record.waiting_for and record.place:
        say.info(str(facts.get("waiting") or f"Waiting in the queue of {record.place}."))
    elif record.state == "queued":
        say.info(f"Waiting for {record.device or 'the device'}, behind {ahead(record)}.")
    elif record.is_live:
        message = state.names().in_words(record.progress[2])
        st.progress(share(record), text=plain(f"{message or 'starting'}{left(record)}"))


def line(record: RunRecord) -> None:
    """Draw a live run in the sidebar: its name, how far it is, and the time left."""
    say.paragraph(state.names().run(record))
    if record.state == "queued":
        behind = ahead(record) or record.place
        say.caption(f"queued {'behind' if record.waiting_for else 'at'} {behind}")
        return
    done = f"{share(record):.0%}" if record.progress[1] else record.state
    st.progress(share(record), text=plain(f"{done}{left(record)}"))


def ahead(record: RunRecord) -> str:
    """Return the names of the runs ahead of a queued one."""
    return state.names().in_words(record.waiting_for)


def share(record: RunRecord) -> float:
    """Return how much of a live run is done, from 0 to 1."""
    done, total, _ = record.progress
    return min(1.0, done / total) if total else 0.0


def left(record: RunRecord) -> str:
    """Return the time that a live run has left, as the end of a sentence; empty if unknown."""
    return "" if record.eta_s is None else f", about {words.duration(record.eta_s)} left"


def _state(record: RunRecord) -> None:
    if record.is_live:
        progress(record)
    elif record.state == "done":
        _finished(record)
    else:
        say.error(f"{state.names().run(record)}: {how_it_ended(record)}")


def how_it_ended(record: RunRecord) -> str:
    """Return the end of a run that did not finish, in a sentence or two."""
    told = f"{record.error} {record.hint}".strip()
    if told.lower().startswith(record.state):
        return told
    return f"{record.state}. {told}".strip()


def trust(folder: Path) -> str:
    """Return the argument that stock loading needs if a checkpoint has Depthcut's own classes.

    Never advised for code that anyone else wrote.
    """
    return ", trust_remote_code=True" if own_code.is_trusted(folder) else ""


def trust_note(folder: Path) -> str:
    """Return what a person should know about code beside a checkpoint's weights, if anything."""
    if own_code.is_trusted(folder):
        return (
            f"trust_remote_code=True runs {own_code.MODELLING.name}, which Depthcut wrote beside "
            "the weights because its blocks differ in shape."
        )
    foreign = own_code.foreign(folder)
    return (
        f"This folder brings code that Depthcut did not write ({', '.join(foreign)}); read it "
        "before you let transformers run it."
        if foreign
        else ""
    )


def loading_code(folder: Path, adapter: Path | None = None) -> str:
    """Return the code with which stock transformers loads a checkpoint, from any folder.

    With an ``adapter``, stock peft adds it to the checkpoint.
    """
    path, code = json.dumps(str(folder.absolute())), trust(folder)
    lines = ["from peft import PeftModel"] if adapter else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({path}{code})",
    ]
    if adapter:
        beside = json.dumps(str(adapter.absolute()))
        lines.append(f"model = PeftModel.from_pretrained(model, {beside})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({path}{code})")
    return "\n".join(lines)


def _finished(record: RunRecord) -> None:
    say.success(f"{state.names().run(record)}: finished in {words.duration(record.seconds)}.")
    if record.holds_checkpoint():
        st.caption("Load it with plain transformers:")
        st.code(loading_code(record.path), language="python")
        if note := trust_note(record.path):
            say.caption(note)
        if st.button("Make it the active checkpoint", key=f"use_{record.id}"):
            state.set_checkpoint(record.id)
            st.rerun()


def pick(
    command: str,
    records: list[RunRecord],
    label: str,
    *,
    newest: str = "",
    name: Callable[[RunRecord], str] | None = None,
) -> RunRecord | None:
    """Draw a choice among ``records`` (kept in the URL as ``?run=``) and return it.

    ``newest`` is the run just started on this page: it is selected once, when it first appears.
    """
    if not records:
        return None
    by_id = {r.id: r for r in records}
    key = f"pick_{command}"
    asked = st.query_params.get("run", "")
    if newest in by_id and st.session_state.get(f"{key}_newest") != newest:
        st.session_state[key] = st.session_state[f"{key}_newest"] = newest
    elif asked in by_id and st.session_state.get(f"{key}_seen") != asked:
        st.session_state[key] = asked
    if st.session_state.get(key) not in by_id:
        st.session_state[key] = next(iter(by_id))
    named = name or state.names().run
    chosen = st.selectbox(
        plain(label), list(by_id), key=key, format_func=lambda run: named(by_id[run])
    )
    st.session_state[f"{key}_seen"] = st.query_params["run"] = chosen
    return by_id[chosen]
