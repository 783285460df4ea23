"""Importance: what each block is worth by every criterion, measured in one run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from core.charts import importance as charts
from core.errors import DepthcutError
from core.findings import of_run
from core.importance import command
from core.prune import known
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.ui import findings, frame, prune_pad, runs, state, widgets

TABLES = (
    "blocks.csv",
    "weights.csv",
    "samples.csv",
    "angular.csv",
    "greedy.csv",
    "sublayers.csv",
)
"""Tables that a run may have written, each offered for download."""


def launcher(name: str) -> str:
    """Draw the settings, their estimated cost, the command and the button.

    Returns the id of the run to watch; empty if there is none.
    """
    kept = state.take_settings("importance")
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
    text = widgets.fields(
        command.ImportanceSpec, ("calibration", "samples", "length", "seed"), kept
    )
    chosen = widgets.fields(command.ImportanceSpec, ("metrics",), kept)
    with st.expander("Device and precision"):
        where = widgets.fields(command.ImportanceSpec, ("device", "dtype"), kept)
    values = {"checkpoint": name, **text, **chosen, **where}
    live = [r for r in state.workspace().runs("importance") if r.is_live]
    same = [r for r in live if r.spec.get("checkpoint") == name]
    problem = ""
    try:
        spec = build(command.ImportanceSpec, {**values, "out": "DIR"})
        if not chosen["metrics"]:
            problem = "Choose at least one metric."
        else:
            estimate = command.dry_run(spec)
            seconds = estimate["seconds"]
            time = f"about {seconds:.0f} s, " if seconds else ""
            st.caption(
                f"Estimated: {time}{estimate['flops'] / 1e9:,.0f} GFLOP, "
                f"{estimate['memory_mib']:,.0f} MiB of memory for weights and hidden states."
            )
            st.code(jobs.command_line("importance", spec), "bash", wrap_lines=True)
    except DepthcutError as error:
        problem = str(error)
    if problem:
        st.error(problem)
    pressed = st.button(
        "Score the blocks",
        type="primary",
        icon=":material/play_arrow:",
        disabled=bool(problem or same),
    )
    if pressed:
        record = runs.launch_once("importance", "importance", values)
        if record:
            st.session_state["importance_run"] = record.id
            st.rerun()
    return same[0].id if same else st.session_state.get("importance_run", "")


@st.cache_data(max_entries=64, show_spinner=False)
def table(path: str, _stamp: int) -> pd.DataFrame:
    """Return the CSV file at ``path``; cached until the file changes."""
    return pd.read_csv(path)


def read(record: RunRecord, name: str) -> pd.DataFrame | None:
    """Return one of the run's tables, or None if the run did not write it."""
    path: Path = record.path / name
    return table(str(path), path.stat().st_mtime_ns) if path.is_file() else None


def perplexity(blocks: pd.DataFrame, summary: dict, note: str) -> None:
    """Draw the perplexity bars with a switch that clips outliers."""
    st.subheader("Perplexity without each block")
    values, dense = blocks["ppl"].tolist(), summary.get("dense_ppl")
    top = charts.useful_top(values, dense)
    zoom = bool(top) and st.toggle(
        "Clip outliers", key="zoom_bars", help="Cuts off the tallest bars."
    )
    figure = charts.perplexity_bars(values, dense, log=not zoom, top=top if zoom else None)
    st.plotly_chart(figure, key="ppl_bars", alt="Perplexity without each block.")
    st.caption(f"{note} A bar near the dashed line is a block that hardly matters.")


def by_row(samples: pd.DataFrame, note: str) -> None:
    """Draw each calibration row's perplexity without each block."""
    st.subheader("Perplexity by calibration row")
    table = charts.row_perplexity(samples)
    top = charts.useful_top(table.to_numpy().ravel().tolist(), None)
    zoom = bool(top) and st.toggle(
        "Clip the colour scale",
        value=True,
        key="zoom_rows",
        help="Blocks that the model cannot do without share the last colour of the scale.",
    )
    figure = charts.sample_heatmap(samples, top=top if zoom else None)
    st.plotly_chart(figure, key="samples", alt="Perplexity of each row without each block.")
    st.caption(
        f"{note} Compare with the dense row at the top: a cell of the same colour means that this "
        "text hardly needs the block."
    )


def module_heatmap(weights: pd.DataFrame, column: str, title: str, blocks: int) -> None:
    """Draw one criterion by module; clicking a column drops its block in the Prune page's plan.

    A click redraws the figure, which clears the chart's own selection; the pad keeps the choice.
    """
    pad = prune_pad.plan_elsewhere()
    even = st.toggle("Compare within each module", key=f"rows_{column}")
    figure = charts.taylor_heatmap(weights, column, rows=even, dropped=pad.drop)
    key = f"heat_{column}_{pad.clicks}"
    st.plotly_chart(
        figure,
        key=key,
        on_select=lambda: prune_pad.clicked(key, blocks),
        selection_mode="points",
        alt=f"{title}: module x block; click a column to drop or keep its block.",
    )
    chosen = ", ".join(map(str, pad.drop)) or "none"
    st.caption(f"Click a column to drop its block in plan {pad.active}. Chosen: {chosen}.")


def searched(record: RunRecord, summary: dict, note: str) -> None:
    """Draw greedy removal and the sublayer scores, if the run has them."""
    greedy, parts = read(record, "greedy.csv"), read(record, "sublayers.csv")
    dense = summary.get("dense_ppl")
    if greedy is not None:
        st.subheader("Greedy removal (SLEB)")
        figure = charts.greedy_line(greedy, dense)
        st.plotly_chart(figure, key="greedy", alt="Perplexity after every removal round.")
        st.caption(f"{note} Each round removes the block whose removal increases perplexity least.")
    if parts is not None:
        st.subheader("Perplexity without attention or MLP")
        figure = charts.sublayer_bars(parts, dense)
        st.plotly_chart(figure, key="parts", alt="Perplexity without each sublayer.")
        st.caption(f"{note} Sublayers are only ranked here; pruning removes whole blocks.")


def downloads(record: RunRecord, blocks: pd.DataFrame) -> None:
    """Draw a download button for every table; a file is read only when it is downloaded."""
    st.caption("Download")
    with st.container(horizontal=True):
        for file in TABLES:
            path = record.path / file
            if path.is_file():
                st.download_button(file, path.read_bytes, file, "text/csv", on_click="ignore")
        if len(charts.scored_columns(blocks)) > 1:
            st.download_button(
                "agreement.csv",
                lambda: charts.rank_agreement(blocks).to_csv(index_label="criterion"),
                "agreement.csv",
                "text/csv",
                on_click="ignore",
            )


def results(record: RunRecord) -> None:
    """Draw everything that the run measured."""
    summary, blocks = known.summary_of(record), read(record, "blocks.csv")
    if blocks is None or not summary:
        st.info("This run did not write any results.")
        return
    note = known.measured_on(summary)
    tiles = st.columns(4)
    if summary.get("dense_ppl"):
        tiles[0].metric("Dense perplexity", f"{summary['dense_ppl']:.4g}", border=True)
    tiles[1].metric("Predictions", f"{summary['tokens']:,}", border=True)
    tiles[2].metric("Time", f"{sum(summary['seconds'].values()):.1f} s", border=True)
    tiles[3].metric("Peak memory", f"{summary['peak_memory_mib']:,.0f} MiB", border=True)
    findings.show(of_run(record.path))
    if blocks["ppl"].notna().all():
        perplexity(blocks, summary, note)
    samples, weights = read(record, "samples.csv"), read(record, "weights.csv")
    angular = read(record, "angular.csv")
    if samples is not None:
        by_row(samples, note)
    for column, title in (("taylor", "Taylor importance"), ("magnitude", "Magnitude")):
        if weights is not None and weights[column].notna().all():
            st.subheader(f"{title} by module")
            module_heatmap(weights, column, title, len(blocks))
            st.caption(note)
    if angular is not None:
        st.subheader("Angular distance")
        st.plotly_chart(charts.angular_triangle(angular), key="angular", alt="Start x length.")
        st.caption(
            f"{note} Circled: the start block with the smallest angular change for that cut length."
        )
    searched(record, summary, note)
    for column, title in (
        ("block_influence", "Block Influence"),
        ("relative_update", "Relative update"),
    ):
        if blocks[column].notna().all():
            st.subheader(title)
            st.plotly_chart(charts.score_bars(blocks, column), key=f"bars_{column}", alt=title)
            st.caption(note)
    st.subheader("All scores")
    if len(charts.scored_columns(blocks)) > 1:
        st.plotly_chart(
            charts.agreement_heatmap(blocks),
            key="agreement",
            alt="Rank agreement of the criteria.",
        )
        st.caption(f"{note} Spearman's rank correlation; 1 means the same order of blocks.")
    st.dataframe(blocks, hide_index=True, height=min(500, 38 + 35 * len(blocks)))
    downloads(record, blocks)
    frame.step("prune", "Next: choose blocks to drop")


frame.start("Importance")
name = state.active_checkpoint()
info = state.inspect(name)
found = known.scored_runs(state.workspace(), info)
opened = state.form_is_open("importance", not found)
with st.expander("New run", expanded=opened, icon=":material/tune:"):
    watched = launcher(name)
runs.show(watched)
if found:
    record = runs.pick("importance", found, "Results of", newest=watched, name=known.label_of)
    if record:
        results(record)
else:
    st.info(
        "This checkpoint has not been scored yet. Start a run above; it takes seconds on the demo."
    )
