"""One run as a card: state, progress, log and actions."""

from __future__ import annotations

import json
import shlex
import time

import streamlit as st

from core import words
from core.runs import jobs
from core.runs.workspace import BOOKKEEPING, RunRecord
from core.ui import again, runs, say, state, widgets
from core.ui.say import plain

LOOKS = {
    "starting": (":material/hourglass_top:", "blue"),
    "queued": (":material/schedule:", "orange"),
    "running": (":material/play_circle:", "blue"),
    "done": (":material/check_circle:", "green"),
    "failed": (":material/error:", "red"),
    "cancelled": (":material/cancel:", "gray"),
    "lost": (":material/link_off:", "violet"),
}
"""Icon and colour of each state; the state's name is always shown too."""


def card(record: RunRecord, among: list[RunRecord], *, opened: bool = False) -> None:
    """Draw one run; ``among`` is the list of all runs."""
    icon, colour = LOOKS.get(record.state, (":material/help:", "gray"))
    remarks = record.remarks
    with st.container(border=True):
        head, buttons = st.columns([4, 5], vertical_alignment="center")
        head.markdown(
            f":{colour}-badge[{icon} {plain(record.state)}] "
            f"**{plain(state.names().run(record))}** "
            f":gray[{plain(record.command or 'unknown command')}]"
        )
        head.caption(plain(_when(record)))
        for tag in remarks.tags:
            head.badge(plain(tag), icon=":material/sell:")
        if remarks.note:
            head.text(remarks.note)
        with buttons.container(
            horizontal=True, horizontal_alignment="right", vertical_alignment="center"
        ):
            _actions(record, among)
        runs.progress(record)
        if record.damage[0] or record.state == "lost" and record.place:
            say.warning(f"{record.error} {record.hint}")
        elif record.state == "lost":
            st.warning(
                "This run's process exited without recording a result; it was probably killed or "
                "the machine rebooted. The device has been released. Restart the run or delete it."
            )
        elif record.error and record.state == "failed":
            say.error(f"{record.error} {record.hint}".strip())
        elif record.error:
            say.caption(record.error)
        details = st.expander(
            "Log, command and settings", opened, key=f"details_{record.id}", on_change="rerun"
        )
        if details.open:
            with details:
                _details(record)


def _when(record: RunRecord) -> str:
    parts = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started))]
    if record.finished:
        parts.append(f"took {words.duration(record.seconds)}")
    elif record.is_live:
        parts.append(f"for {words.duration(record.seconds)}")
    if record.device:
        parts.append(f"on {record.device}")
    if record.place:
        parts.append(_where(record))
    return " · ".join(parts)


def _where(record: RunRecord) -> str:
    """Return at which place, machine and job a run is or was."""
    facts = record.place_facts()
    more = [str(facts.get("nodes") or facts.get("node") or "")]
    more += [f"job {facts['job']}"] if facts.get("job") else []
    text = ", ".join(part for part in more if part)
    return f"at {record.place}" + (f" ({text})" if text else "")


def _actions(record: RunRecord, among: list[RunRecord]) -> None:
    """Draw the buttons for the run's state."""
    starred = record.remarks.starred
    widgets.action(
        "Unstar" if starred else "Star",
        lambda: state.workspace().remark(record, starred=not starred),
        key=f"star_{record.id}",
        icon=":material/star:" if starred else ":material/star_border:",
        type="tertiary",
        help="Starred runs can be listed alone.",
    )
    if record.is_live:
        if (record.path / BOOKKEEPING / "cancel").exists():
            widgets.action(
                "Kill now",
                lambda: jobs.kill_now(record),
                key=f"kill_{record.id}",
                icon=":material/dangerous:",
            )
        else:
            widgets.action(
                "Cancel",
                lambda: jobs.request_cancel(record),
                key=f"cancel_{record.id}",
                icon=":material/stop:",
            )
        return
    if record.command and record.state in ("failed", "lost", "cancelled"):
        widgets.action(
            "Restart",
            lambda: jobs.restart(record),
            key=f"restart_{record.id}",
            icon=":material/restart_alt:",
        )
    if record.command in again.PAGES:
        again.offer(record)
    manage(record, "run", among)


def manage(record: RunRecord, where: str, among: list[RunRecord]) -> None:
    """Draw name, tags, note and deletion in a popover; a run in use cannot be deleted.

    What is in it is drawn once it is open: it took more than half of the time of a page of runs.
    """
    key = f"manage_{where}_{record.id}"
    opened = st.popover("Manage", icon=":material/more_horiz:", key=key, on_change="rerun")
    if not opened.open:
        return
    with opened:
        st.text_input(
            "Name",
            record.given,
            key=f"name_{where}_{record.id}",
            max_chars=80,
            placeholder=state.names().run(record),
        )
        known = sorted({tag for one in among for tag in one.remarks.tags})
        st.multiselect(
            "Tags",
            known,
            record.remarks.tags,
            key=f"tags_{where}_{record.id}",
            accept_new_options=True,
            format_func=plain,
        )
        st.text_area("Note", record.remarks.note, key=f"note_{where}_{record.id}")
        widgets.action(
            "Save", lambda: _save(record, f"{where}_{record.id}"), key=f"rename_{where}_{record.id}"
        )
        st.divider()
        children = state.workspace().children(record, among)
        if children:
            names = ", ".join(state.names().run(r) for r in children[:5])
            others = f"{len(children)} other {'run' if len(children) == 1 else 'runs'}"
            say.caption(f"Used by {others}: {names}. Delete those first.")
        sure = st.checkbox(
            "Permanently delete the run and its files",
            key=f"sure_{where}_{record.id}",
            disabled=bool(children),
        )
        widgets.action(
            "Delete",
            lambda: state.workspace().delete(record),
            key=f"delete_{where}_{record.id}",
            disabled=bool(children) or not sure,
            icon=":material/delete:",
        )


def _save(record: RunRecord, widget: str) -> None:
    """Keep what was typed into the fields whose keys end with ``widget``."""
    name, tags, note = (st.session_state[f"{one}_{widget}"] for one in ("name", "tags", "note"))
    if name != record.given:
        state.workspace().rename(record, name)
    if (tuple(tags), note) != (record.remarks.tags, record.remarks.note):
        state.workspace().remark(record, tags=tags, note=note)


def _details(record: RunRecord) -> None:
    if record.argv:
        st.code(shlex.join(record.argv), language="bash", wrap_lines=True)
    tail = record.log_tail(40)
    long = tail.count("\n") > 12
    st.code(tail or "The log is empty.", language="log", height=300 if long else "content")
    log = record.path / BOOKKEEPING / "log.txt"
    with st.container(horizontal=True):
        st.download_button(
            "Download log",
            data=lambda: log.read_bytes() if log.is_file() else b"",
            file_name=widgets.file_name(record.id, ending=".log"),
            mime="text/plain",
            on_click="ignore",
            key=f"log_{record.id}",
        )
        st.download_button(
            "Download settings",
            data=lambda: json.dumps({"command": record.command, "spec": record.spec}, indent=2),
            file_name=widgets.file_name(record.id, ending=".json"),
            mime="application/json",
            on_click="ignore",
            key=f"spec_{record.id}",
        )
    say.caption(f"Run {record.id}, in the folder {record.path}")
