"""State of a session: the workspace, the active checkpoint, and which forms are open.

The active checkpoint is kept in the URL (``?model=``), so that it can be shared and survives a
reload; the last one chosen is also stored in the workspace for the next visit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from core.checkpoint import locate
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError, OutputError
from core.runs.workspace import Workspace, begin_draw, draw, read_json, write_json
from core.study.names import Names
from core.study.names import names as names_of
from core.ui import say
from core.ui.say import plain

RECENT = 8
_ACTIVE = "active.json"
_MODEL, _SEEN = "active_model", "active_model_seen"


def workspace() -> Workspace:
    """Return this dashboard's workspace; in a fragment that draws itself again, as it is now."""
    context = get_script_run_ctx()
    alone = context.fragment_ids_this_run if context else None
    if alone and alone is not getattr(_named, "alone", None):
        _named.alone = alone  # a list of its own for every time
        begin_draw()
    return Workspace()


def names() -> Names:
    """Return what this workspace's runs and checkpoints are called.

    A page asks dozens of times, so the names of a draw are those at its first question, unless
    this process has written something since.
    """
    now = workspace().root, draw()
    if now[1] is None or getattr(_named, "at", None) != now:
        _named.names, _named.at = names_of(workspace().runs()), now
    found: Names = _named.names
    return found


_named = threading.local()


def _remembered() -> dict[str, Any]:
    return read_json(workspace().root / _ACTIVE) or {}


def recent() -> list[str]:
    """Return the recently chosen checkpoints, latest first."""
    names = _remembered().get("recent")
    return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []


def current_checkpoint() -> str:
    """Return the active checkpoint's name, or ""; reads a URL that was opened from outside."""
    asked = st.query_params.get("model", "")
    if asked and asked != st.session_state.get(_SEEN):
        st.session_state[_MODEL] = asked
    if _MODEL not in st.session_state:
        active = _remembered().get("active")
        st.session_state[_MODEL] = active if isinstance(active, str) else ""
    name = st.session_state[_MODEL]
    st.session_state[_SEEN] = name
    if name and asked != name:
        st.query_params["model"] = name
    return name


def set_checkpoint(name: str) -> None:
    """Make ``name`` the active checkpoint of this session and of later ones.

    In a read-only workspace it is that of this session only.
    """
    st.session_state[_MODEL] = st.session_state[_SEEN] = name
    st.query_params["model"] = name
    kept = [name, *(other for other in recent() if other != name)][:RECENT]
    with contextlib.suppress(OutputError):
        write_json(workspace().root / _ACTIVE, {"active": name, "recent": kept})


def choose(name: str) -> None:
    """Make the checkpoint that the user named active, or show why it cannot be used."""
    try:
        describe(name.strip())
    except DepthcutError as error:
        _explain(name.strip(), error)
        return
    set_checkpoint(name.strip())
    st.rerun()


def _explain(name: str, error: DepthcutError) -> None:
    """Show why a checkpoint cannot be used; a GGUF file can be imported at the next drawing."""
    from core.ui import importing  # it needs this module

    say.error(str(error))
    importing.ask(name)


def picker() -> None:
    """Draw the choice of a checkpoint: the demo, SmolLM2, recent ones, a folder or a Hub id."""
    from core.ui import importing  # it needs this module

    with st.container(horizontal=True):
        if st.button("Load the demo", type="primary", icon=":material/rocket_launch:"):
            choose("demo")
        importing.smollm2_button()
    importing.progress()
    with st.form("checkpoint_form", border=False):
        given = st.text_input(
            "Folder or Hub id",
            placeholder="a checkpoint's folder, a run's id, a .gguf file, or owner/name",
            help="Reads config.json and the safetensors headers; weights are not loaded. A .gguf "
            "file can be imported.",
        )
        if st.form_submit_button("Load", icon=":material/folder_open:"):
            choose(given or "nothing")
    importing.offer()
    others = distinct(name for name in recent() if name != "demo")
    if others:
        st.caption("Recent")
        with st.container(horizontal=True):
            for name in others:
                label = names().checkpoint(name)
                if st.button(plain(label), key=f"recent_{name}", help=plain(name)):
                    choose(name)


def distinct(given: Iterable[str]) -> list[str]:
    """Return names of checkpoints, the first of every folder that they mean."""
    found: dict[object, str] = {}
    for name in given:
        folder = locate.local_folder(name)
        found.setdefault(folder.resolve() if folder else name, name)
    return list(found.values())


def active_checkpoint() -> str:
    """Return the active checkpoint's name; if there is none, ask for one and stop the page."""
    name = current_checkpoint()
    if not name:
        st.info("No checkpoint is active yet. Load the demo, or one of your own.")
        picker()
        st.stop()
    return name


def inspect(name: str) -> CheckpointInfo:
    """Return a checkpoint's description; if it is unusable, show the error and stop the page."""
    try:
        return describe(name)
    except DepthcutError as error:
        _explain(name, error)
    picker()
    st.stop()
    raise AssertionError("st.stop ends the script")


def warnings(info: CheckpointInfo) -> None:
    """Show what a checkpoint's inspection warns of."""
    for warning in info.warnings:
        say.warning(warning)


def describe(name: str) -> CheckpointInfo:
    """Return a checkpoint's description; raises `CheckpointError`."""
    return locate.open(name, need="headers", quantized=True).info


def open_form(command: str) -> None:
    """Let a page's form for new runs be open, e.g. because settings are used again."""
    st.session_state[f"form_open_{command}"] = True


def form_is_open(command: str, first: bool) -> bool:
    """Whether a page's form for new runs is open: if ``first``, or to reuse settings.

    Once opened for reused settings it stays open, whatever is changed in it.
    """
    return first or bool(st.session_state.get(f"form_open_{command}"))


def is_drawn_alone() -> bool:
    """Whether a fragment draws itself again, and not as a part of its page."""
    context = get_script_run_ctx()
    return bool(context and context.fragment_ids_this_run)
