"""Scores from elsewhere on the Importance and Prune pages: upload, what they look like, removal."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from core.charts import importance as charts
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.prune import imported
from core.prune import known as prune_view
from core.ui import forms, frame, say, state, widgets
from core.ui.say import plain

BY_NAME = "from the file's name"
_TURN, _ERROR, _DONE = "scores_turn", "scores_error", "scores_kept"


def files(name: str) -> dict[str, Path]:
    """Return the files imported for the study of a checkpoint, by their path in the workspace."""
    where = state.workspace()
    found = imported.listed(where, forms.kept(name).key)
    return {str(path.relative_to(where.root)): path for path in found}


def note(path: Path) -> str:
    """Return the line under a chart of imported scores."""
    return f"Imported from {path.name}: measured elsewhere, by others or earlier; not checked here."


def known(info: CheckpointInfo, run: str, path: Path) -> prune_view.Known:
    """Return what an imported file tells of removing blocks; ``run`` is its path as a choice."""
    return prune_view.Known(info, imported.scores.load(path), run, note=note(path))


def draw(name: str, info: CheckpointInfo) -> None:
    """Draw the upload, and every imported file as bars."""
    found = files(name)
    title = f"Scores from elsewhere ({len(found)})" if found else "Scores from elsewhere"
    with st.expander(title, icon=":material/upload_file:"):
        st.caption(
            "A CSV of scores that were published, or measured with other code: one row for each "
            "block (block and score, block_name and block_score, or removed_block and perplexity), "
            "or one line with all blocks in removal order. They can then rank blocks on the Prune "
            "page; the lowest score is removed first."
        )
        _upload(name, info)
        for run, path in found.items():
            _one(run, path, info)
        if found:
            frame.link("prune", "Choose blocks by them")


def _upload(name: str, info: CheckpointInfo) -> None:
    columns = st.columns([1, 3], vertical_alignment="bottom")
    kind = columns[0].selectbox(
        "Criterion, if the file names none",
        (BY_NAME, *imported.CRITERIA),
        format_func=plain,
        key="scores_kind",
        help="For files with a plain score or an order: the criterion that the file's name "
        "contains, or the one chosen here.",
    )
    turn = st.session_state.setdefault(_TURN, 0)
    key = f"scores_upload_{turn}"

    def uploaded() -> None:
        given = st.session_state.get(key)
        if given is None:
            return
        st.session_state[_TURN] += 1
        st.session_state.pop(_ERROR, None)
        chosen = imported.guessed(given.name) if kind == BY_NAME else str(kind)
        try:
            path = imported.keep(
                given.name, given.getvalue(), chosen, info.blocks, state.workspace(),
                forms.kept(name).key,
            )  # fmt: skip
        except DepthcutError as error:
            st.session_state[_ERROR] = str(error)
        else:
            st.toast(plain(f"Imported {path.name}."))

    columns[1].file_uploader(
        "Scores (CSV)",
        type=("csv", "txt"),
        key=key,
        on_change=uploaded,
        max_upload_size=imported.MOST_BYTES >> 20,
    )
    if problem := st.session_state.get(_ERROR):
        say.error(problem)


def _one(run: str, path: Path, info: CheckpointInfo) -> None:
    try:
        found = imported.columns_of(path)
    except DepthcutError as error:
        say.error(str(error))
        found = {}
    for criterion, values in found.items():
        if criterion == "ppl" and all(v is not None for v in values):
            top = charts.useful_top([v for v in values if v is not None], None)
            figure = charts.perplexity_bars(list(values), None, log=not top, top=top, height=260)
        else:
            column = criterion.replace("-", "_")
            table = pd.DataFrame({"block": range(info.blocks), column: values})
            figure = charts.score_bars(table, column)
        widgets.chart(figure, key=f"{run}_{criterion}", alt=f"{criterion} of every block.")
    say.caption(note(path))
    with st.container(horizontal=True):
        widgets.csv_download(path.name, path.read_bytes, key=f"get_{run}")
        widgets.action("Remove", lambda: path.unlink(missing_ok=True), key=f"remove_{run}")
