"""The Search section of the Prune page: launch a search, follow it, take a set it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core import words
from core.charts import search as charts
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.findings import Finding, of_search, of_texts
from core.prune import target
from core.runs import jobs
from core.runs.spec import build, parse_numbers
from core.runs.workspace import RunRecord, read_run
from core.search import command, known
from core.search.command import SearchSpec
from core.search.results import HeldoutRow, Search, SetRow, found_so_far
from core.search.units import BLOCK, SUBLAYER, Units
from core.ui import findings, forms, memory_note, prune_pad, run_on, runs, say, state, widgets
from core.ui.prune_pad import Pad
from core.ui.say import plain

METHODS = (
    "one-shot: the blocks that cost least alone. greedy: the cheapest block after those already "
    "removed, round by round. beam: as greedy, with several sets of every size. pairs: measures "
    "all pairs and predicts sets from them. evolve: improves the best set known by exchanging "
    "blocks."
)
OBJECTIVES = {
    "kl": "KL from the dense model",
    "nll": "loss on the text (perplexity)",
}

OTHERS = 20
"""Newest other searches that one is compared with."""
UNITS = {
    BLOCK: "whole blocks",
    SUBLAYER: "attention or MLP of blocks",
}
HEALS = {
    "none": "no: sets as they are",
    "refit": "refit",
    "linear": "linear (ReplaceMe)",
    "scale": "scale (Prune&Comp)",
}


def draw(name: str, info: CheckpointInfo, pad: Pad, first: int, last: int) -> None:
    """Draw the section for checkpoint ``name``; ``first`` and ``last`` blocks are protected."""
    st.subheader("Search for the best sets")
    st.caption(
        "Blocks that are cheap alone can be dear together. A search measures whole sets on "
        "calibration text, and every set that it finds on held-out text too."
    )
    found = known.searches(state.workspace(), info)
    opened = state.form_is_open("search", first=False)
    form = widgets.form("search", "New search", ":material/search:", opened=opened)
    if form.open:
        with form:
            _launcher(name, info, first, last)
    watched = runs.watched("search", name)
    _watch(watched)
    record = _picker(found, watched)
    if record:
        _results(record, pad, found)


def _launcher(name: str, info: CheckpointInfo, first: int, last: int) -> None:
    """Draw the settings, their estimated cost, the command and the button."""
    form = forms.Form("search", name)
    say.caption(METHODS)
    values: dict[str, Any] = {"checkpoint": name}
    values |= form.fields(SearchSpec, ("methods",))
    problem = ""
    far_left, left, middle, right = st.columns(4)
    values["units"] = form.select(
        "units",
        "Remove",
        list(UNITS),
        BLOCK,
        at=far_left,
        format_func=UNITS.__getitem__,
        help="What goes one at a time. Without its attention, a block has no key/value cache.",
    )
    units = Units.of_model(values["units"], info)
    given = form.text(
        "counts" if units.kind == BLOCK else "part_counts",
        f"Numbers of {units.noun}s to remove",
        _around(form.kept.settings.ratio, info) if units.kind == BLOCK else "",
        at=left,
        placeholder=f"1-{max(1, units.total // 4)}",
        help="e.g. 1-8 or 2,4,6. Starts around the study's target. Empty: up to a quarter of the "
        f"{units.noun}s.",
    )
    values["objective"] = form.select(
        "objective",
        "Objective",
        list(OBJECTIVES),
        "kl",
        at=middle,
        format_func=OBJECTIVES.__getitem__,
        help="What a set should cost least of. KL needs no labels and is less noisy on few tokens.",
    )
    values["heal"] = form.select(
        "heal",
        "Heal before comparing",
        list(HEALS),
        "none",
        at=right,
        format_func=HEALS.__getitem__,
        help="Sets are compared by what they cost after their seams were healed. Far slower: of "
        "the sets that a method compares, only the cheapest few are healed. Of parts, refit alone.",
    )
    values |= form.fields(SearchSpec, ("calibration", "samples", "length", "seed"))
    form.offer("calibration")
    with st.expander("Short rows, time limit, device and precision"):
        names: tuple[str, ...] = ("join", "time_limit_s", "device", "dtype", "memory_limit")
        names = ("heal_best", *names) if values["heal"] != "none" else (*names, *run_on.several())
        values |= form.fields(SearchSpec, names)
    form.origin()
    values |= {"protect_first": first, "protect_last": last}
    on = run_on.choose("search", str(values["checkpoint"]), shared=values["heal"] == "none")
    try:
        values["counts"] = parse_numbers(given, "--counts") if given.strip() else ()
        spec = build(SearchSpec, {**values, "out": "DIR"})
        found = _rehearsed(spec)
        say.caption(_estimate(found))
        problem = "" if on else memory_note.draw(found)
        if problem:
            say.error(problem)
        st.code(jobs.command_line("search", spec, on), "bash", wrap_lines=True)
    except DepthcutError as error:
        problem = str(error)
        say.error(problem)
    runs.launcher("search", values, "Search", ":material/search:", problem, on)


def _around(ratio: float | None, info: CheckpointInfo) -> str:
    """Return the numbers of blocks around the study's target; empty without one."""
    if not ratio:
        return ""
    low, high = target.counts_for(info.block_parameters, info.parameters, ratio)
    return f"{low}-{high}" if high > low else str(low)


@st.cache_data(ttl=20, max_entries=50, show_spinner=False)
def _rehearsed(spec: SearchSpec) -> dict[str, Any]:
    """Return the dry run, which runs all methods on made-up costs.

    Kept for a few seconds only: it depends on free memory and on the rate of the last run, too.
    """
    return command.dry_run(spec)


def _estimate(found: dict[str, Any]) -> str:
    """Show what a search would take, from its dry run."""
    seconds = found["seconds"]
    time = "Time: unknown until a search or an importance run has finished on this device."
    if seconds:
        time = f"Estimated time: about {words.duration(seconds)}, at the rate of the last run."
    healed = f", {found['sets_healed']:,} of them healed," if found["sets_healed"] else ""
    return (
        f"{time} About {found['sets']:,} sets{healed} in {found['total_passes']:,} block passes; "
        f"measuring one set after another would take {found['plain_passes']:,}. Calibration: "
        f"{found['samples']:,} rows of {found['length']:,} tokens. Each set found is then measured "
        "on held-out text."
    )


def _watch(run_id: str) -> None:
    """Draw a search that this page started: its card, and its curve while it is live."""
    runs.show(run_id)
    record = read_run(state.workspace().root / run_id) if run_id else None
    if record and record.is_live:
        st.fragment(_live, run_every=2.0)(run_id)


def _live(run_id: str) -> None:
    record = read_run(state.workspace().root / run_id)
    if record is None or not record.is_live:
        return
    objective = str(record.spec.get("objective") or "kl")
    _curve(record, objective, "search_live")


def _curve(record: RunRecord, objective: str, key: str) -> None:
    """Draw the best cost so far against block passes; redrawn only when there is news."""
    found = found_so_far(record.path)
    if not found:
        st.caption("The curve appears with the first set.")
        return
    kept: dict[str, Any] = st.session_state.setdefault(f"{key}_figure", {})
    now = (record.id, len(found), found[-1].passes)
    if kept.get("key") != now:
        kept.update(key=now, figure=charts.best_curve(found, objective))
    widgets.chart(
        kept["figure"],
        key=key,
        alt="Best cost so far against block passes, for every number of blocks removed.",
    )


def _picker(found: list[RunRecord], watched: str) -> RunRecord | None:
    """Draw the choice among finished searches; the one started here is selected once."""
    by_id = {r.id: r for r in found}
    if not by_id:
        return None
    if watched in by_id and st.session_state.get("search_newest") != watched:
        st.session_state["search_shown"] = st.session_state["search_newest"] = watched
    if st.session_state.get("search_shown") not in by_id:
        st.session_state["search_shown"] = next(iter(by_id))
    chosen = st.selectbox(
        "Sets of",
        list(by_id),
        key="search_shown",
        format_func=lambda run: known.label_of(by_id[run], state.names().run(by_id[run])),
        help="A finished search of these weights.",
    )
    return by_id[chosen]


def _results(record: RunRecord, pad: Pad, searches: list[RunRecord]) -> None:
    """Draw the sets that a search found; a click takes one into the plan being edited."""
    summary, rows = Search.read(record.path), known.in_order(SetRow.read(record.path))
    if summary is None or not rows:
        st.info("This search did not write any sets.")
        return
    if summary.text.warning:
        say.warning(summary.text.warning)
    if summary.stopped:
        say.warning(summary.stopped)
    finding = _finding(record.path, _changed(record.path / HeldoutRow.FILE))
    if finding:
        findings.show([finding])
    elif len(summary.methods) > 1:
        say.caption(
            "Whether the methods differ beyond noise is unknown: this search has fewer than two "
            "held-out rows."
        )
    others = [other.path for other in searches if other.id != record.id][:OTHERS]
    text = _text_finding(record.path, others, [_changed(f / SetRow.FILE) for f in others])
    if text:
        findings.show([text])
    turn = int(st.session_state.setdefault("search_turn", 0))
    key = f"search_sets_{record.id}_{turn}"
    st.dataframe(
        pd.DataFrame(known.cells(rows, summary)),
        hide_index=True,
        key=key,
        height=min(560, 38 + 35 * len(rows)),
        on_select=lambda: take(key, rows),
        selection_mode=["single-row", "single-cell"],
        column_config=_columns(),
    )
    say.caption(f"Click a row to take its set into plan {pad.active}. {known.measured_on(summary)}")
    with st.expander("How the search went"):
        _curve(record, summary.objective, "search_curve")
        say.caption(
            f"{summary.sets_measured:,} sets"
            + (f", {summary.sets_healed:,} of them healed," if summary.sets_healed else "")
            + f" in {summary.passes:,} block passes; measuring one set after another would have "
            f"taken {summary.plain_passes:,}. "
            f"{words.duration(summary.seconds)} of measuring, peak memory "
            f"{summary.peak_memory_mib:,.0f} MiB."
        )


@st.cache_data(max_entries=20, show_spinner=False)
def _finding(folder: Path, changed: int) -> Finding | None:
    """Return what a search's held-out rows say; the resampling is done again once they change."""
    return of_search(folder)


@st.cache_data(max_entries=20, show_spinner=False)
def _text_finding(folder: Path, others: list[Path], changed: list[int]) -> Finding | None:
    """Return whether the text decides more than the method, by the other searches."""
    return of_texts(folder, others)


def _changed(file: Path) -> int:
    """Return when a file changed, in nanoseconds; 0 if it is not there."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _columns() -> dict[str, Any]:
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    return {
        "blocks dropped": text(width="medium"),
        "dropped": text(width="large"),
        "KL, calibration": number(format="%.4f", help="KL(dense || pruned), nats per token."),
        "KL, not healed": number(format="%.4f", help="On the same tokens as KL, calibration."),
        "KL, held-out": number(format="%.4f", help="The same on text that chose nothing."),
        "perplexity, calibration": number(format="%.3f"),
        "perplexity, held-out": number(format="%.3f"),
        "parameters removed": number(format="percent"),
        "block passes": number(format="localized"),
        "seconds": number(format="%.1f"),
    }


def take(key: str, rows: tuple[SetRow, ...]) -> None:
    """Put the set that was clicked in the table ``key`` into the plan being edited."""
    event = st.session_state.get(key)
    selection = dict(event)["selection"] if event else {}
    lines = [*selection.get("rows", ()), *(row for row, _ in selection.get("cells", ()))]
    if not lines or not 0 <= lines[0] < len(rows):
        return
    row = rows[lines[0]]
    prune_pad.take_set(row.removal, row.method, row.heal)
    st.session_state["search_turn"] = int(st.session_state.get("search_turn", 0)) + 1
    gone = row.removal
    what = gone.text if gone.partial else f"blocks {words.block_ranges(gone.drop)}"
    st.toast(plain(f"The plan now drops {what}."))
