"""The Budget section of the Prune page: measure versions, move a budget, take its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from core import words
from core.budget import command, known
from core.budget.command import BudgetSpec
from core.charts import budget as charts
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.findings import of_plan
from core.prune import budgets
from core.prune.budgets import GIB, Library, Limits, Solution
from core.prune.plan import default_protection
from core.prune.plan_command import PlanSpec
from core.prune.version_results import OUTPUT_TOKENS, PlanCheck, VersionRow
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.ui import (
    findings,
    forms,
    frame,
    live_panel,
    memory_note,
    prune_pad,
    run_on,
    runs,
    say,
    state,
    widgets,
)
from core.ui.prune_pad import Pad
from core.ui.say import plain

LIMITED = {"latency": "Latency", "memory_gib": "Memory", "params": "Parameters"}
"""Budgets with a slider; throughput is latency's reciprocal."""
PERCENT = 100
WHO = "budget"
"""Asks the live model on this section's behalf."""
POINTS = 12
"""Solutions along the frontier."""


def draw(name: str, info: CheckpointInfo, pad: Pad, first: int, last: int) -> None:
    """Draw the section for checkpoint ``name``; ``first`` and ``last`` blocks are protected."""
    st.subheader("Stay within a budget")
    st.caption(
        "Measures once what every version of every block costs: dropped, without attention, "
        "without MLP, or with some of its MLP's neurons. Then the best plan for any budget is "
        "solved as you move it."
    )
    found = known.budget_runs(state.workspace(), info)
    opened = state.form_is_open("budget", first=False)
    form = widgets.form("budget", "Measure versions of blocks", ":material/tune:", opened=opened)
    if form.open:
        with form:
            _launcher(name, info)
    watched = runs.watched("budget", name)
    runs.show(watched)
    record = _picker(found, watched)
    if record:
        st.fragment(_solved)(name, info, pad, record, first, last)


def compared(info: CheckpointInfo | None) -> None:
    """Draw the frontier of the newest budget run of a dense model; nothing without one."""
    found = known.budget_runs(state.workspace(), info) if info else []
    if not found or info is None:
        return
    record, protect = found[0], default_protection(info.blocks)
    st.subheader("Plans that a budget would give")
    try:
        changed = (record.path / VersionRow.FILE).stat().st_mtime_ns
        library = _library(record.path, record.id, None, changed)
        key = (str(record.path), "", changed)
        _frontier(library, key, record.path, None, OUTPUT_TOKENS, protect)
    except (DepthcutError, OSError) as error:
        say.warning(str(error))
        return
    say.caption(known.measured_on(library.summary))
    frame.link("prune", "Choose a budget")


def _launcher(name: str, info: CheckpointInfo) -> None:
    """Draw the settings, their estimated cost, the command and the button."""
    form = forms.Form("budget", name)
    values: dict[str, Any] = {"checkpoint": name}
    values |= form.fields(BudgetSpec, ("versions", "batch", "context"))
    values |= form.fields(BudgetSpec, ("calibration", "samples", "length", "seed"))
    form.offer("calibration")
    with st.expander("Timings, short rows, device and precision"):
        values |= form.fields(BudgetSpec, ("runs", "join", "device", "dtype", "memory_limit"))
    form.origin()
    on = run_on.choose("budget", name)
    problem = ""
    try:
        spec = build(BudgetSpec, {**values, "out": "DIR"})
        found = _rehearsed(spec)
        say.caption(_estimate(found))
        problem = "" if on else memory_note.draw(found)
        if problem:
            say.error(problem)
        st.code(jobs.command_line("budget", spec, on), "bash", wrap_lines=True)
    except DepthcutError as error:
        problem = str(error)
        say.error(problem)
    runs.launcher("budget", values, "Measure", ":material/tune:", problem, on)


@st.cache_data(ttl=20, max_entries=50, show_spinner=False)
def _rehearsed(spec: BudgetSpec) -> dict[str, Any]:
    """Return the dry run, kept for a few seconds: it depends on free memory and the last run."""
    return command.dry_run(spec)


def _estimate(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    time = "Time: unknown until such a run or an importance run has finished on this device."
    if seconds:
        time = f"Estimated time: about {words.duration(seconds)}, at the rate of the last run."
    return (
        f"{time} KL of {found['sets']:,} versions in {found['passes']:,} block passes (one after "
        f"another: {found['plain_passes']:,}), then {found['timings']:,} timed generations with "
        f"{found['context']:,} tokens of prompt."
    )


def _picker(found: list[RunRecord], watched: str) -> RunRecord | None:
    """Draw the choice among finished runs; the one started here is selected once."""
    by_id = {r.id: r for r in found}
    if not by_id:
        return None
    if watched in by_id and st.session_state.get("budget_newest") != watched:
        st.session_state["budget_shown"] = st.session_state["budget_newest"] = watched
    if st.session_state.get("budget_shown") not in by_id:
        st.session_state["budget_shown"] = next(iter(by_id))
    if len(by_id) == 1:
        return next(iter(by_id.values()))
    chosen = st.selectbox(
        "Versions of",
        list(by_id),
        key="budget_shown",
        format_func=lambda run: known.label_of(by_id[run], state.names().run(by_id[run])),
        help="A finished budget run of these weights.",
    )
    return by_id[chosen]


@st.cache_resource(max_entries=20, show_spinner=False)
def _library(folder: Path, name: str, pairs: Path | None, changed: int) -> Library:
    return budgets.load(folder, name, pairs)


@st.cache_resource(max_entries=2000, show_spinner=False)
def _solution(
    _library: Library,
    key: tuple[Any, ...],
    limits: Limits,
    output_tokens: int,
    protect: tuple[int, int],
) -> Solution:
    return budgets.solve(_library, limits, output_tokens=output_tokens, protect=protect)


@st.cache_resource(max_entries=500, show_spinner=False)
def _least(
    _library: Library, key: tuple[Any, ...], name: str, output_tokens: int, protect: tuple[int, int]
) -> float:
    return budgets.least(_library, name, output_tokens=output_tokens, protect=protect)


def _solved(
    name: str, info: CheckpointInfo, pad: Pad, record: RunRecord, first: int, last: int
) -> None:
    """Draw the sliders, and what the best plan within them makes of every block."""
    search = known.with_pairs(state.workspace(), known.summary_of(record))
    columns = st.columns([1, 2], vertical_alignment="bottom")
    tokens = int(
        columns[0].number_input(
            "Output tokens", 1, 100_000, OUTPUT_TOKENS, key="budget_tokens",
            help="Tokens generated after the prompt, for latency and throughput.",
        )
    )  # fmt: skip
    counted = bool(search) and columns[1].toggle(
        "Count pairs of dropped blocks",
        True,
        key="budget_pairs",
        help="What two dropped blocks cost beyond the sum of both alone, as the newest search by "
        "KL on the same text measured it.",
    )
    pairs = search.path if search and counted else None
    try:
        changed = (record.path / VersionRow.FILE).stat().st_mtime_ns
        library = _library(record.path, record.id, pairs, changed)
        key = (str(record.path), str(pairs), changed)
        limits = _sliders(library, key, tokens, (first, last))
        solved = _solution(library, key, limits, tokens, (first, last)) if limits.given else None
    except (DepthcutError, OSError) as error:
        say.warning(str(error))
        return
    choice = solved.choice if solved else ("whole",) * library.blocks
    protected = (*range(first), *range(max(first, library.blocks - last), library.blocks))
    widgets.chart(
        charts.versions(library, choice, protected),
        key="budget_versions",
        alt="What every block becomes: attention and MLP, filled as far as they are left.",
    )
    _figures(library, choice, tokens)
    if solved and (found := of_plan(solved.removal, library.blocks, library.summary.calibration)):
        findings.show([found])
    if solved and not solved.optimal:
        say.warning(f"A better plan may exist: the solver stopped after {budgets.SOLVE_S:g} s.")
    if noisy := known.noise_in_words(library.summary):
        say.warning(noisy)
    say.caption(known.measured_on(library.summary))
    _frontier(library, key, record.path, solved, tokens, (first, last))
    if not solved:
        return
    _measured(name, info, pad, solved.removal)
    spec = PlanSpec(
        scores=record.id,
        latency=limits.latency,
        memory_gib=limits.memory_gib,
        params=limits.params,
        output_tokens=tokens,
        pairs=search.id if search and counted else None,
        protect_first=first,
        protect_last=last,
    )
    st.code(jobs.command_line("plan", spec), "bash", wrap_lines=True)
    widgets.action(
        f"Take this plan into {pad.active}",
        lambda: prune_pad.take_removal(solved.removal, "budget"),
        key="budget_take",
        type="primary",
        icon=":material/check:",
    )


@st.cache_resource(max_entries=100, show_spinner=False)
def _line(
    _library: Library, key: tuple[Any, ...], tokens: int, protect: tuple[int, int]
) -> list[tuple[float, float]]:
    """Return (share of the dense latency, KL) of plans along the frontier, all predicted."""
    solved = budgets.frontier(_library, POINTS, output_tokens=tokens, protect=protect)
    dense = _library.dense(tokens).latency_s
    return [(one.figures.latency_s / dense, one.figures.kl) for _, one in solved]


def _frontier(
    library: Library,
    key: tuple[Any, ...],
    folder: Path,
    solved: Solution | None,
    tokens: int,
    protect: tuple[int, int],
) -> None:
    """Draw KL against latency: every budget's plan as predicted, and those measured whole."""
    checked = PlanCheck.read(folder)
    now = None
    if solved:
        share = solved.figures.latency_s / library.dense(tokens).latency_s
        now = (share, solved.figures.kl)
    widgets.chart(
        charts.frontier(_line(library, key, tokens, protect), checked, now, tokens),
        key="budget_frontier",
        alt="KL against latency of the solved plans, predicted and measured.",
    )
    if told := known.checked_in_words(checked, tokens):
        say.caption(told)
    else:
        st.caption(
            "No plan of this run was measured whole, so how far predictions are off is unknown."
        )


def _sliders(
    library: Library, key: tuple[Any, ...], tokens: int, protect: tuple[int, int]
) -> Limits:
    """Draw a slider for every budget, in percent of the dense model; at 100 there is none."""
    found: dict[str, float | None] = {}
    whole = ("whole",) * library.blocks
    for column, (name, label) in zip(st.columns(len(LIMITED)), LIMITED.items(), strict=True):
        dense = budgets.value_of(library, name, whole, tokens)
        low = _least(library, key, name, tokens, protect) / dense
        lowest = min(PERCENT - 1, int(100 * low) + 1)
        widget = f"budget_{name}_{lowest}"
        start = max(lowest, 80) if name == "latency" else PERCENT
        share = column.slider(
            plain(label),
            lowest,
            PERCENT,
            start,
            format="%d%%",
            key=widget,
            help=plain(
                f"Most {label.lower()}, in percent of the dense model's. The least possible is "
                f"{lowest}; at 100 there is no such budget."
            ),
        )
        limit = share / PERCENT * dense
        found[name] = None if share >= PERCENT else limit
        column.caption(plain(_limit(name, limit)) if share < PERCENT else "no budget")
    params = found["params"]
    return Limits(
        latency=round(found["latency"], 4) if found["latency"] else None,
        memory_gib=found["memory_gib"],
        params=int(params) if params else None,
    )


def _limit(name: str, value: float) -> str:
    if name == "latency":
        return f"at most {value:.2f} times the dense latency"
    return f"at most {words.size(value * GIB) if name == 'memory_gib' else f'{int(value):,}'}"


def _figures(library: Library, choice: tuple[str, ...], tokens: int) -> None:
    """Draw what the plan is predicted to give, beside the dense model."""
    figures, dense = library.figures(choice, tokens), library.dense(tokens)
    say.bold(known.becomes(choice))
    columns = st.columns(5)
    expected = budgets.corrected_kl(library, figures.kl)
    by_plans = f"{expected:.4f} by measured plans" if expected is not None else "nats per token"
    shown = (
        ("KL, predicted", f"{figures.kl:.4f}", by_plans),
        ("Latency, predicted", words.brief(figures.latency_s),
         f"{figures.latency_s / dense.latency_s:.2f} x dense"),
        ("Tokens/s, predicted", words.rounded(figures.tokens_per_s),
         f"{figures.tokens_per_s / dense.tokens_per_s:.2f} x dense"),
        ("Weights and cache", words.size(figures.memory_bytes),
         f"{figures.memory_bytes / dense.memory_bytes:.2f} x dense"),
        ("Parameters", f"{figures.params:,}", f"{figures.params / dense.params:.2f} x dense"),
    )  # fmt: skip
    for column, (label, value, beside) in zip(columns, shown, strict=True):
        column.metric(
            plain(label), plain(value), plain(beside), delta_color="off", delta_arrow="off"
        )
    error = budgets.correction_error(library)
    if error is not None:
        say.caption(
            "The predicted KL adds up blocks that were changed alone, which is too low where much "
            "goes. Beside it: corrected by the plans of this run that were measured whole, on the "
            f"same rows; for each of these plans, the others correct it with a median error of "
            f"{error:.0%}."
        )


def _measured(name: str, info: CheckpointInfo, pad: Pad, removal: Removal) -> None:
    """Draw the perplexity that the live model measures of the plan, if it is on."""
    asked = live_panel.other(name, info, pad, removal, WHO)
    if asked is None:
        return
    waiting = not asked.done
    st.fragment(_live, run_every=live_panel.POLL_S if waiting else None)(
        name, info, pad, removal, waiting
    )


def _live(name: str, info: CheckpointInfo, pad: Pad, removal: Removal, waiting: bool) -> None:
    asked = live_panel.other(name, info, pad, removal, WHO)
    if asked is None:
        return
    if asked.error:
        say.warning(asked.error)
    elif asked.ppl is None:
        behind = state.names().in_words(asked.waiting)
        say.caption(f"{behind[:1].upper()}{behind[1:]}." if behind else "Measuring this plan live.")
    else:
        dense = f", {asked.ppl / asked.dense_ppl:.3g} x dense" if asked.dense_ppl else ""
        say.bold(f"Perplexity, measured live: {asked.ppl:.5g}{dense}")
        say.caption(live_panel.measured_on(asked))
    if waiting and asked.done and state.is_drawn_alone():
        st.rerun()
