"""Texts and files to choose with one click, below a field that takes any SOURCE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import streamlit as st

from core.checkpoint.vocabulary import default_text
from core.data import generated
from core.errors import DepthcutError
from core.study import places
from core.ui import say, state
from core.ui.say import plain

TEXTS = {
    "english": "english",
    "demo": "demo",
    "c4": "C4 (needs the Hub)",
    "wikitext2": "WikiText-2 (needs the Hub)",
}
"""Sources that need no file, with their labels; demo is offered for the demo's vocabulary only."""
FILES = "files"
_OPEN, _AT, _ERROR, _DONE = "files_open", "files_at", "files_error", "files_done"


def offer(
    key: str,
    folder: Path,
    take: Callable[[str], None],
    *,
    brief: bool = False,
    more: Mapping[str, str] | None = None,
) -> None:
    """Draw the bundled and preset texts, and files, for the text field ``key``.

    A click calls ``take``. ``folder`` is the checkpoint's; ``brief`` draws a single button, whose
    dialog has all of them. ``more`` are other sources to offer, with their labels.
    """
    texts, offered = {**_texts(folder), **(more or {})}, f"{key}_offered"
    if brief:
        about = "Choose a text, a file of the server or an upload"
        if st.button("", icon=":material/folder_open:", key=offered, help=about):
            _choose(take, texts)
        return
    labels = {**texts, FILES: "Files …"}

    def taken() -> None:
        picked = st.session_state[offered]
        st.session_state[offered] = None
        if picked == FILES:
            st.session_state[_OPEN] = key
        elif picked is not None:
            take(picked)

    st.pills(
        "Texts",
        list(labels),
        format_func=lambda name: plain(labels[name]),
        key=offered,
        on_change=taken,
        label_visibility="collapsed",
    )
    if st.session_state.get(_OPEN) == key:
        del st.session_state[_OPEN]
        _choose(take, {})


def _texts(folder: Path) -> dict[str, str]:
    """Return the sources offered for the checkpoint in ``folder``, with their labels."""
    usual = default_text(folder)
    return {name: label for name, label in TEXTS.items() if name != "demo" or name == usual}


def written(most: int = 4) -> dict[str, str]:
    """Return the newest texts that models of this workspace wrote, with their labels."""
    done = [r for r in state.workspace().runs("generate") if r.state == "done"]
    found = [r for r in done if generated.is_generated(r.path)][:most]
    return {str(r.path): state.names().run(r) for r in found}


@st.dialog("Choose a text", width="medium")
def _choose(take: Callable[[str], None], texts: dict[str, str]) -> None:
    """Draw texts, files of the server and an upload; a choice closes the dialog."""
    if st.session_state.pop(_DONE, False):
        st.rerun()

    def use(source: str) -> None:
        take(source)
        st.session_state[_DONE] = True

    if texts:
        with st.container(horizontal=True):
            for name, label in texts.items():
                st.button(plain(label), key=f"files_{name}", on_click=use, args=(name,))
    _browse(use)
    _upload(use)


def _browse(use: Callable[[str], None]) -> None:
    where = state.workspace()
    roots = places.roots(where)
    if not roots:
        return
    at = Path(st.session_state.get(_AT) or roots[0])
    try:
        found = places.listing(at, where)
    except DepthcutError:
        st.session_state.pop(_AT, None)
        found = places.listing(roots[0], where)
    near = [found.folder, *found.above, *found.folders]

    def label(path: Path) -> str:
        if path == found.folder:
            return str(path)
        return f"{path.name}/" if path in found.folders else f"up to {path}"

    key = f"{_AT}_{found.folder}"

    def go() -> None:
        st.session_state[_AT] = str(st.session_state[key])

    st.selectbox(
        "Folder on the server", near, format_func=lambda p: plain(label(p)), key=key, on_change=go
    )
    columns = st.columns([3, 1], vertical_alignment="bottom")
    picked = columns[0].selectbox(
        "File",
        found.sources,
        index=None,
        format_func=lambda path: plain(path.name),
        placeholder="Choose a file" if found.sources else "no text file in this folder",
        key=f"files_in_{found.folder}",
    )
    columns[1].button(
        "Use it", disabled=picked is None, on_click=use, args=(str(picked),), key="files_use",
        width="stretch",
    )  # fmt: skip
    more = f" {found.left_out:,} entries are not listed." if found.left_out else ""
    say.caption(
        f"Listed are text, JSON, CSV and Parquet files of the workspace and of the folders named "
        f"in {places.VARIABLE}.{more}"
    )


def _upload(use: Callable[[str], None]) -> None:
    def uploaded() -> None:
        given = st.session_state.get("files_upload")
        st.session_state.pop(_ERROR, None)
        if given is None:
            return
        try:
            use(str(places.keep(given.name, given.getvalue(), state.workspace())))
        except DepthcutError as error:
            st.session_state[_ERROR] = str(error)

    st.file_uploader(
        "Or upload a file",
        key="files_upload",
        max_upload_size=places.MOST_BYTES >> 20,
        on_change=uploaded,
        help="It is stored in the workspace.",
    )
    if problem := st.session_state.get(_ERROR):
        say.error(problem)
