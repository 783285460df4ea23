"""What a session looks at: the workspace, the active checkpoint, and settings to load again.

The active checkpoint lives in the address (``?model=``), so that it can be shared and outlives a
reload; the last one chosen is also kept in the workspace for the next visit.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from core.checkpoint import headers, locate
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.runs.workspace import RunRecord, Workspace, read_json, write_json

RECENT = 8
_ACTIVE = "active.json"
_MODEL, _SEEN, _SETTINGS = "active_model", "active_model_seen", "run_settings"


def workspace() -> Workspace:
    """Return the workspace of this dashboard."""
    return Workspace()


def _remembered() -> dict[str, Any]:
    return read_json(workspace().root / _ACTIVE) or {}


def recent() -> list[str]:
    """Return the checkpoints chosen lately, last one first."""
    return [str(name) for name in _remembered().get("recent", [])]


def current_checkpoint() -> str:
    """Return the active checkpoint's name, or nothing; takes in an address opened from outside."""
    asked = st.query_params.get("model", "")
    if asked and asked != st.session_state.get(_SEEN):
        st.session_state[_MODEL] = asked
    if _MODEL not in st.session_state:
        st.session_state[_MODEL] = str(_remembered().get("active", ""))
    name = st.session_state[_MODEL]
    st.session_state[_SEEN] = name
    if name and asked != name:
        st.query_params["model"] = name
    return name


def set_checkpoint(name: str) -> None:
    """Make ``name`` the active checkpoint of this session, and of later ones."""
    st.session_state[_MODEL] = st.session_state[_SEEN] = name
    st.query_params["model"] = name
    kept = [name, *(other for other in recent() if other != name)][:RECENT]
    write_json(workspace().root / _ACTIVE, {"active": name, "recent": kept})


def choose(name: str) -> None:
    """Take a name that the user gave: make it active, or show what is wrong with it."""
    try:
        describe(name.strip())
    except DepthcutError as error:
        st.error(str(error))
        return
    set_checkpoint(name.strip())
    st.rerun()


def picker() -> None:
    """Draw the choice of a checkpoint: the demo, recent ones, a folder or a Hub id."""
    if st.button("Load the demo", type="primary", icon=":material/rocket_launch:"):
        choose("demo")
    with st.form("checkpoint_form", border=False):
        given = st.text_input(
            "Folder or Hub id",
            placeholder="a checkpoint's folder, a run's id, or owner/name",
            help="config.json and safetensors headers are read; weights are not loaded.",
        )
        if st.form_submit_button("Load", icon=":material/folder_open:"):
            choose(given or "nothing")
    others = [name for name in recent() if name != "demo"]
    if others:
        st.caption("Recent")
        with st.container(horizontal=True):
            for name in others:
                label = name if len(name) < 40 else "…" + name[-38:]
                if st.button(label, key=f"recent_{name}"):
                    choose(name)


def active_checkpoint() -> str:
    """Return the active checkpoint's name; asks for one and ends the page where there is none."""
    name = current_checkpoint()
    if not name:
        st.info("No checkpoint is active yet. Load the demo, or one of your own.")
        picker()
        st.stop()
    return name


def inspect(name: str) -> CheckpointInfo:
    """Return what a checkpoint is; shows the error and ends the page where it cannot be used."""
    try:
        return describe(name)
    except DepthcutError as error:
        st.error(str(error))
    picker()
    st.stop()
    raise AssertionError("st.stop ends the script")


def describe(name: str) -> CheckpointInfo:
    """Return what a checkpoint is, cached by the state of its files; raises `CheckpointError`."""
    folder = locate.local_folder(name)
    return _described(name, str(headers.file_state(folder)) if folder else "")


@st.cache_data(max_entries=32, ttl=3600, show_spinner=False)
def _described(name: str, _: str) -> CheckpointInfo:
    return locate.inspect(name)


def use_settings(record: RunRecord) -> None:
    """Keep a run's settings for the page that launches such runs."""
    st.session_state[_SETTINGS] = {**settings_kept(), record.command: dict(record.spec)}
    name = record.spec.get("checkpoint")
    if name:
        set_checkpoint(str(name))


def settings_kept() -> dict[str, dict[str, Any]]:
    """Return the settings kept for later: command -> options."""
    return dict(st.session_state.get(_SETTINGS, {}))


def form_is_open(command: str, first: bool) -> bool:
    """Whether a page's form for new runs is open: for the ``first``, and for settings used again.

    Once opened for those it stays open, whatever is changed in it. To be asked before
    `take_settings`.
    """
    key = f"form_open_{command}"
    if command in settings_kept():
        st.session_state[key] = True
    return first or bool(st.session_state.get(key))


def take_settings(command: str) -> dict[str, Any]:
    """Return and forget the settings kept for ``command``."""
    kept = settings_kept()
    found = kept.pop(command, {})
    st.session_state[_SETTINGS] = kept
    return found
