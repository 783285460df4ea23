"""The home page's list of other machines and clusters: add, change, test and remove one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from typing import Any

import streamlit as st

from core.errors import DepthcutError
from core.places import place as place_file
from core.places.place import Place
from core.runs import processes
from core.ui import say, state, widgets
from core.ui.say import plain

NEW = "A new one"
_KINDS = {"ssh": "another machine over SSH", "slurm": "SLURM"}
_LABELS = {
    "host": "Host",
    "user": "User",
    "port": "Port",
    "identity": "Private key file",
    "known_hosts": "Known hosts file",
    "folder": "Folder there",
    "python": "Python there",
    "modules": "Modules",
    "partition": "Partition",
    "account": "Account",
    "qos": "Quality of service",
    "constraint": "Node features",
    "time": "Time limit",
    "gres": "Generic resources",
    "gpus": "GPUs",
    "cpus": "CPUs of each task",
    "memory": "Memory of each node",
    "at_once": "Recipe steps at once",
    "requeue": "Continue after the time limit, times",
    "signal_s": "Stop before the time limit (s)",
    "environment": "Environment variables",
}
_REACH = (("host", "user", "port"), ("identity", "known_hosts"))
_THERE = (("folder", "python", "modules"),)
_JOB = (
    ("partition", "account", "qos", "constraint"),
    ("time", "gpus", "gres", "cpus", "memory"),
    ("at_once", "requeue", "signal_s"),
)


class Test:
    """A test of a place, in a separate process."""

    def __init__(self, name: str) -> None:
        """Start it."""
        self.found: list[str] = []
        self.error = ""
        env = processes.environment(DEPTHCUT_WORKSPACE=str(state.workspace().root.absolute()))
        self._thread = threading.Thread(target=self._run, args=(name, env), daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def _run(self, name: str, env: dict[str, str]) -> None:
        words = [sys.executable, "-m", "core", "places", "test", name]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, check=False
        )
        try:
            self.found = [str(line) for line in json.loads(done.stdout)["found"]]
        except (ValueError, KeyError):
            lines = done.stderr.strip().splitlines() or ["The test ended without a result."]
            self.error = lines[-1].removeprefix("Error: ")


def panel() -> None:
    """Draw the places of this workspace, and the form that adds or changes one."""
    with st.expander("Other machines and clusters"):
        st.markdown(
            "Runs can go to another machine over SSH, or through SLURM to a cluster. Each form has "
            "a choice **Run on** as soon as a place is described here. Host keys are checked, and "
            "no password is asked for or stored: a login must work with a key."
        )
        try:
            known = place_file.read(state.workspace().root)
        except DepthcutError as error:
            say.error(str(error))
            return
        for name, place in known.items():
            _row(name, place, known)
        _form(known)


def _tests() -> dict[str, Test]:
    found: dict[str, Test] = st.session_state.setdefault("place_tests", {})
    return found


def _row(name: str, place: Place, known: dict[str, Place]) -> None:
    with st.container(border=True):
        text, buttons = st.columns([3, 2], vertical_alignment="center")
        text.markdown(f"**{plain(name)}** :gray[{plain(place.text)}]")
        with buttons.container(horizontal=True, horizontal_alignment="right"):
            widgets.action(
                "Test",
                lambda: _tests().update({name: Test(name)}),
                key=f"test_place_{name}",
                icon=":material/network_check:",
                help="Connects, copies Depthcut's code there if it is not there yet, and lets "
                "Python compute something. For SLURM, asks when such a job would start.",
            )
            widgets.action(
                "Remove",
                lambda: _keep({k: v for k, v in known.items() if k != name}),
                key=f"remove_place_{name}",
                icon=":material/delete:",
            )
        test = _tests().get(name)
        if test:
            waiting = not test.is_done
            st.fragment(_outcome, run_every=1.0 if waiting else None)(name, waiting)


def _outcome(name: str, waiting: bool) -> None:
    test = _tests().get(name)
    if test is None:
        return
    if not test.is_done:
        st.info("Testing. Importing torch there may take a minute.")
        return
    if waiting and state.is_drawn_alone():
        st.rerun()
    if test.error:
        say.error(test.error)
    else:
        say.success(" ".join(test.found))


def _keep(places: dict[str, Place]) -> None:
    place_file.save(places, state.workspace().root)


def _form(known: dict[str, Place]) -> None:
    """Draw the form; a place that exists fills it."""
    which = st.selectbox(
        "Add or change", [NEW, *known], key="place_which", format_func=plain, width=320
    )
    start = known.get(which) or Place(name="", kind="ssh")
    turn = f"{which}_{st.session_state.get('place_turn', 0)}"
    head = st.columns([1, 2], vertical_alignment="bottom")
    name = start.name or head[0].text_input("Name", key=f"place_name_{turn}", max_chars=40)
    kind = head[1].radio(
        "Kind",
        ("ssh", "slurm"),
        index=("ssh", "slurm").index(start.kind),
        key=f"place_kind_{turn}",
        format_func=lambda kind: plain(_KINDS[kind]),
        horizontal=True,
    )
    groups = [*_REACH, *_THERE, *(_JOB if kind == "slurm" else ())]
    values: dict[str, Any] = {"kind": kind}
    for row in groups:
        for field, column in zip(row, st.columns(len(row)), strict=True):
            values[field] = _field(field, start, column, turn)
    text = "\n".join(f"{key}={value}" for key, value in start.environment.items())
    given = st.text_area(
        _LABELS["environment"],
        text,
        key=f"place_environment_{turn}",
        height=80,
        help="One NAME=value in each line.",
    )

    def save() -> None:
        lines = [line.strip() for line in given.splitlines() if line.strip()]
        pairs = [line.partition("=") for line in lines]
        values["environment"] = {key.strip(): value.strip() for key, _, value in pairs}
        place = place_file.from_dict(name.strip(), values)
        _keep({**known, place.name: place})
        _tests().pop(place.name, None)
        st.session_state["place_turn"] = st.session_state.get("place_turn", 0) + 1

    if st.button("Save", key=f"place_save_{turn}", type="primary", icon=":material/save:"):
        try:
            save()
        except DepthcutError as error:
            say.error(str(error))
        else:
            st.rerun()


def _field(name: str, start: Place, at: Any, turn: str) -> Any:
    value = getattr(start, name)
    meta = {f.name: f for f in dataclasses.fields(Place)}[name].metadata
    about = {"key": f"place_{name}_{turn}", "help": plain(meta["help"])}
    if isinstance(value, int):
        return int(at.number_input(_LABELS[name], 0, 65535, value, **about))
    if isinstance(value, tuple):
        given = at.text_input(_LABELS[name], ", ".join(value), **about)
        return [part.strip() for part in given.split(",") if part.strip()]
    return at.text_input(_LABELS[name], value, **about)
