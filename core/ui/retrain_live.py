"""One retraining run, live and finished: progress, curves, findings and results."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core import words
from core.charts import retrain as charts
from core.checkpoint import locate
from core.retrain import extrapolation, history
from core.retrain.log import MetricLog
from core.retrain.results import Rate, Step, Summary, measures_file, read_measures
from core.runs import jobs
from core.runs.workspace import BOOKKEEPING, RunRecord, read_run
from core.ui import forms, frame, merging, runs, say, state, widgets
from core.ui.say import plain

SERIOUS = ("nan", "exploding", "rising", "out-of-memory")
"""Findings that stop a run."""


PROGRESS_S, CURVES_S = 1.0, 3.0
"""How often progress and curves are drawn. Drawing five charts keeps a core of the reader's machine
busy for up to a second, and it may be the machine that trains."""


WANTED = 0.9
"""Recovered share that the needed tokens are estimated for."""
FITTED = (
    "Estimated with a power law through the evaluations so far, with its 90% interval, as if the "
    "learning rate fell as slowly. Some of the gap may never come back. In three trainings of the "
    "demo the interval from the first half held what was measured at the end, and the estimate was "
    "off by up to 6 points (docs/results/extrapolation.md)."
)


def show(record: RunRecord) -> None:
    """Draw a run; while it is live, two fragments redraw themselves, and the page at its end."""
    live = record.is_live
    if record.spec.get("lr_range_test"):
        st.fragment(_rates, run_every=PROGRESS_S if live else None)(record.id, live)
        return
    st.fragment(_progress, run_every=PROGRESS_S if live else None)(record.id, live)
    st.fragment(_details, run_every=CURVES_S if live else None)(record.id)


def overlaid(records: list[RunRecord]) -> None:
    """Draw one quantity of several runs over one another, and the settings that they differ in."""
    by_id = {r.id: r for r in records}
    if len(by_id) < 2:
        return
    called = state.names().run
    st.subheader("Runs over one another")
    columns = st.columns([3, 2], vertical_alignment="bottom")
    chosen = columns[0].multiselect(
        "Runs",
        list(by_id),
        list(by_id)[-3:],
        key="overlaid_runs",
        format_func=lambda run: plain(called(by_id[run])),
    )
    what = columns[1].selectbox("Quantity", list(charts.FIELDS), 1, key="overlaid_what")
    picked = [by_id[run] for run in chosen]
    if not picked:
        return
    drawn = {}
    for record in picked:
        log = _log(record)
        log.update()
        drawn[called(record)] = log.steps if what == "training loss" else log.evaluations
    widgets.chart(charts.overlay(drawn, what), key="overlay", alt=f"{what} of these runs by step.")
    differ = history.differing(picked, called)
    if len(differ):
        st.caption("Settings that differ")
        say.table(differ)


def _progress(run_id: str, was_live: bool) -> None:
    record = runs.current(run_id, was_live)
    if record is None:
        return
    log = _log(record)
    log.update()
    _head(record)
    _tiles(record, log)
    for finding in log.findings:
        stopped = finding.kind in SERIOUS
        (say.error if stopped else say.warning)(finding.message)


def _rates(run_id: str, was_live: bool) -> None:
    """Draw a test of learning rates: its state, the chart and the button that takes one."""
    record = runs.current(run_id, was_live)
    if record is None:
        return
    _head(record)
    rows, summary = Rate.read(record.path), Summary.read(record.path)
    if record.is_live or not rows or summary is None:
        return
    widgets.chart(
        charts.rates(rows, summary.settings.lr),
        key=f"rates_{run_id}",
        alt="Shares recovered after a few steps, by learning rate.",
    )
    say.caption(
        f"{summary.settings.steps} steps of {summary.settings.batch} sequences at each rate, from "
        f"the same start. {history.measured_on(summary)} A longer training usually takes this rate "
        "or a lower one."
    )
    if summary.settings.lr is not None:
        st.button(
            f"Use {summary.settings.lr:g}",
            key=f"take_{run_id}",
            icon=":material/check:",
            on_click=forms.put,
            args=(state.current_checkpoint(), "retrain", {"lr": summary.settings.lr}),
        )
    st.dataframe(pd.DataFrame(rows), hide_index=True)
    widgets.csv_download("rates.csv", lambda: (record.path / Rate.FILE).read_text())


def _details(run_id: str) -> None:
    record = read_run(state.workspace().root / run_id)
    if record is None:
        return
    log = _log(record)
    log.update()
    _verdict(record)
    _curves(record, log)
    _results(record)
    with st.expander("Log and command"):
        st.code(shlex.join(record.argv), language="bash", wrap_lines=True)
        st.code(record.log_tail(25) or "nothing yet", language=None, height=260)


def _log(record: RunRecord) -> MetricLog:
    """Return this session's reader of the run's metrics."""
    kept: dict[str, MetricLog] = st.session_state.setdefault("retrain_logs", {})
    if record.id not in kept:
        while len(kept) >= 4:
            del kept[next(iter(kept))]
        kept[record.id] = MetricLog(record.path / BOOKKEEPING / "metrics.jsonl")
    return kept[record.id]


def _head(record: RunRecord) -> None:
    """Draw the run's state and the buttons for it."""
    _, _, message = record.progress
    with st.container(horizontal=True, vertical_alignment="center"):
        if record.state == "queued":
            say.warning(f"Queued for {record.device}, behind {runs.ahead(record)}.")
        elif record.is_live:
            text = f"{message or 'starting'}{runs.left(record)}"
            st.progress(runs.share(record), text=plain(text))
        elif record.state == "done":
            summary = Summary.read(record.path)  # the record's own time is that of the merging
            trained = summary.seconds if summary and summary.seconds else record.seconds
            st.success(f"Done after {words.duration(trained)}.")
        else:
            told = runs.how_it_ended(record)
            say.error(told[:1].upper() + told[1:])
        _buttons(record)


def _buttons(record: RunRecord) -> None:
    asked = (record.path / BOOKKEEPING / "cancel").exists()
    if record.is_live:
        widgets.action(
            "Cancel",
            lambda: jobs.request_cancel(record),
            key=f"stop_{record.id}",
            told=runs.STOPPING,
            icon=":material/stop_circle:",
            disabled=asked,
            help="Finishes the current step and saves the adapter; the run can be resumed.",
        )
    if record.state not in ("cancelled", "failed", "lost"):
        return
    widgets.action(
        "Resume",
        lambda: jobs.restart(record),
        key=f"resume_{record.id}",
        icon=":material/play_arrow:",
        type="primary",
    )
    if record.error.startswith("Out of memory"):
        widgets.action(
            "Retry with a smaller micro-batch",
            lambda: jobs.restart(record, retry=True),
            key=f"retry_{record.id}",
            icon=":material/memory:",
            help="Resumes with the largest micro-batch that fits.",
        )


def _tiles(record: RunRecord, log: MetricLog) -> None:
    """Draw the row of metrics."""
    last = log.evaluations[-1] if log.evaluations else None
    share, loss = (last.recovered, last.heldout_loss) if last else (None, None)
    by_kl = last.recovered_kl if last else None
    now = log.steps[-1] if log.steps else Step(step=0)
    speed, memory, rate = now.tokens_per_s, now.memory_mib, now.lr
    total = record.progress[1] or "?"
    figures = {
        "Step": f"{now.step:,} of {total}",
        "Recovered": "not reported" if share is None else words.percent(share),
        **({} if by_kl is None else {"Recovered by KL": words.percent(by_kl)}),
        "Held-out loss": "-" if loss is None else f"{loss:.4f}",
        "Tokens/s": "-" if speed is None else f"{speed:,.0f}",
        "Peak memory": "-" if memory is None else f"{memory:,.0f} MiB",
    }
    if record.is_live:  # at the end it has fallen to nearly nothing
        figures["Learning rate"] = "-" if rate is None else f"{rate:.2g}"
    row(figures)


def row(figures: dict[str, str]) -> None:
    """Draw labelled figures side by side, wrapping to the width of the window."""
    with st.container(horizontal=True):
        for label, text in figures.items():
            st.metric(plain(label), plain(text), border=True, width="content")


def _curves(record: RunRecord, log: MetricLog) -> None:
    """Draw the curves; they are rebuilt only if the log grew, so that zooming is not disturbed."""
    kept: dict[str, Any] = st.session_state.setdefault("retrain_figures", {})
    key = (record.id, log.version, record.progress[1])
    if kept.get("key") != key:
        kept.update(key=key, figures=_figures(record, log), estimates=[])
        points = history.by_tokens(log.steps, log.evaluations)
        fits = {n: found for n, rows in points.items() if (found := extrapolation.fit(rows))}
        if fits:
            kept["figures"]["tokens"] = charts.by_tokens(points, fits)
            told = [extrapolation.in_words(fit, WANTED, name) for name, fit in fits.items()]
            kept["estimates"] = [*filter(None, told), FITTED]
    figures = kept["figures"]
    if not figures:
        st.caption("The curves appear after the first step.")
        return
    widgets.chart(figures["loss"], key="retrain_loss", alt="Training and held-out loss by step.")
    for pair in (("recovery", "lr"), ("grad_norm", "tokens_per_s")):
        for name, column in zip(pair, st.columns(2), strict=True):
            with column:
                widgets.chart(figures[name], key=f"retrain_{name}", alt=f"{name} by step.")
    if "tokens" in figures:
        widgets.chart(
            figures["tokens"], key="retrain_tokens", alt="Recovered share by tokens, extrapolated."
        )
        for line in kept["estimates"]:
            say.caption(line)


def _figures(record: RunRecord, log: MetricLog) -> dict[str, Any]:
    if not log.steps and not log.evaluations:
        return {}
    how: dict[str, Any] = {"total": record.progress[1], "run": record.id}
    steps = [s.step for s in log.steps]
    norms = [s.grad_norm for s in log.steps]
    speeds = [s.tokens_per_s for s in log.steps]
    return {
        "loss": charts.loss(steps, [s.loss for s in log.steps], log.evaluations, **how),
        "recovery": charts.recovery(log.evaluations, total=how["total"]),
        "lr": charts.curve(steps, [s.lr for s in log.steps], "learning rate", **how),
        "grad_norm": charts.curve(steps, norms, "gradient norm", log=True, **how),
        "tokens_per_s": charts.curve(steps, speeds, "tokens per second", **how),
    }


def _verdict(record: RunRecord) -> None:
    """Draw what the finished run brought back, on what that was measured, and the next step."""
    summary = Summary.read(record.path)
    if not summary or record.is_live:
        return
    say.bold(history.verdict(summary))
    if more := history.elsewhere(record.path, summary):
        say.paragraph(more)
    say.caption(history.measured_on(summary))
    if record.state == "done":
        with st.container(horizontal=True, vertical_alignment="center"):
            frame.step("compare", "Next: compare")
            frame.link("evaluate", "Evaluate it")
            frame.link("playground", "Try it")


def _results(record: RunRecord) -> None:
    """Draw how else the finished run was measured, and how to load its checkpoint."""
    summary = Summary.read(record.path)
    if not summary or record.is_live:
        return
    table = measures_file(record.path)
    if table:
        st.caption("Further evaluation: loss and KL(dense || model) in nats per token, accuracy.")
        st.dataframe(pd.DataFrame(read_measures(record.path)), hide_index=True)
    merging.offer(record, summary)
    _loading(record, summary)
    with st.container(horizontal=True):
        files = [record.path / name for name in ("metrics.jsonl", "summary.json")]
        for path in (*files, *([table] if table else [])):
            if path.is_file():
                st.download_button(
                    plain(path.name),
                    path.read_bytes,
                    path.name,
                    key=f"get_{path.name}",
                    on_click="ignore",
                )
        if history.holder(record) and st.button(
            "Make it the active checkpoint", key=f"use_{record.id}"
        ):
            state.set_checkpoint(record.id)
            st.rerun()


def _loading(record: RunRecord, summary: Summary) -> None:
    """Draw the code with which stock libraries load the result, from any folder."""
    holder, adapter = history.holder(record), record.path / "adapter"
    with st.expander("Load it with stock libraries"):
        if holder:
            code, folder = runs.loading_code(holder), holder
        elif adapter.is_dir() and (found := locate.local_folder(_base(record, summary))):
            code, folder = runs.loading_code(found, adapter), found
        elif adapter.is_dir():
            say.info(
                f"The adapter belongs to {summary.checkpoint}, which is not on this machine: load "
                f"that checkpoint first, then add the adapter in {adapter.absolute()}."
            )
            return
        else:
            say.info("This run left neither an adapter nor a checkpoint.")
            return
        st.code(code, language="python", wrap_lines=True)
        if note := runs.trust_note(folder):
            say.caption(note)


def _base(record: RunRecord, summary: Summary) -> str:
    """Return the name of the checkpoint that was retrained, also if it was started elsewhere."""
    elsewhere = Path(record.cwd) / summary.checkpoint
    return str(elsewhere) if locate.local_folder(str(elsewhere)) else summary.checkpoint
