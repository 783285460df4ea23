"""Importance: what each block is worth by every criterion, measured in one run."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from core import words
from core.charts import importance as charts
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.findings import of_run
from core.importance import command
from core.prune import known
from core.prune.score_results import (
    AngularRow,
    BlockRow,
    DivergenceRow,
    GreedyRow,
    Importance,
    SampleRow,
    SublayerRow,
    WeightRow,
)
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.ui import (
    chat_note,
    findings,
    forms,
    frame,
    memory_note,
    pair_matrix,
    prune_pad,
    run_on,
    runs,
    say,
    score_import,
    state,
    widgets,
)
from core.ui.say import plain
from core.words import rounded

TABLES = tuple(
    kind.FILE
    for kind in (BlockRow, WeightRow, SampleRow, DivergenceRow, AngularRow, GreedyRow, SublayerRow)
)
"""Tables that a run may have written, each offered for download."""


def launcher(name: str, info: CheckpointInfo) -> str:
    """Draw the settings, their estimated cost, the command and the button.

    Returns the id of the run to watch; empty if there is none.
    """
    form = forms.Form("importance", name)
    text = form.fields(command.ImportanceSpec, ("calibration", "samples", "length", "seed"))
    form.offer("calibration")
    if chat_note.applies(name):
        text |= form.fields(command.ImportanceSpec, ("chat_template",))
        st.caption(chat_note.CALIBRATION)
    chosen = form.fields(command.ImportanceSpec, ("metrics",))
    with st.expander("Short rows, device and precision"):
        where = form.fields(
            command.ImportanceSpec, ("join", "device", "dtype", "memory_limit", *run_on.several())
        )
    form.origin()
    values = {"checkpoint": name, **text, **chosen, **where}
    on = run_on.choose("importance", name, shared=True)
    problem = ""
    try:
        spec = build(command.ImportanceSpec, {**values, "out": "DIR"})
        if not chosen["metrics"]:
            problem = "Choose at least one metric."
        else:
            estimate = command.dry_run(spec)
            seconds = estimate["seconds"]
            time = f"about {words.duration(seconds)}, " if seconds else ""
            say.caption(
                f"Estimated: {time}{estimate['flops'] / 1e9:,.0f} GFLOP, "
                f"{estimate['memory_mib']:,.0f} MiB of memory for weights and hidden states."
                + (f" Time at {estimate['seconds_from']}." if seconds else "")
            )
            problem = "" if on else memory_note.draw(estimate)
            st.code(jobs.command_line("importance", spec, on), "bash", wrap_lines=True)
    except DepthcutError as error:
        problem = str(error)
    if problem:
        say.error(problem)
    icon = ":material/play_arrow:"
    return runs.launcher("importance", values, "Score the blocks", icon, problem, on)


def _bars_end(title: str, top: float | None, key: str) -> float | None:
    """Draw a title, beside it a switch if there are outliers; return where the bars are cut off."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader(plain(title), width="content")
        clipped = bool(top) and st.toggle(
            "Clip outliers",
            True,
            key=key,
            help="Cuts off the tallest bars, which then carry their value.",
        )
    return top if clipped else None


def _scale_end(top: float | None, key: str) -> float | None:
    """Draw a switch if there are outliers; return where the scale of colours ends."""
    clipped = bool(top) and st.toggle(
        "Clip the colour scale",
        value=True,
        key=key,
        help="Blocks that the model cannot do without share the last colour of the scale.",
    )
    return top if clipped else None


def perplexity(values: list[float], dense: float | None, note: str) -> None:
    """Draw the perplexity bars with a switch that clips outliers."""
    title = "Perplexity without each block"
    top = _bars_end(title, charts.useful_top(values, dense), "zoom_bars")
    figure = charts.perplexity_bars(values, dense, log=not top, top=top)
    widgets.chart(figure, key="ppl_bars", alt="Perplexity without each block.")
    say.caption(f"{note} A bar near the dashed line is a block that hardly matters.")


def by_row(samples: Sequence[SampleRow], note: str) -> None:
    """Draw each calibration row's perplexity without each block."""
    st.subheader("Perplexity by calibration row")
    table = charts.table(samples)
    ratios = charts.row_ratios(table).to_numpy().ravel().tolist()
    top = _scale_end(charts.useful_top(ratios, None), "zoom_rows")
    figure = charts.sample_heatmap(table, top=top)
    widgets.chart(
        figure, key="samples", alt="Perplexity of each row without each block, over its dense one."
    )
    say.caption(f"{note} 1 means that this row of text does not need the block.")


def divergence(rows: Sequence[BlockRow], by_sample: Sequence[DivergenceRow], note: str) -> None:
    """Draw the KL from the dense model without each block, of all rows and row by row."""
    title = "KL from the dense model without each block"
    top = _bars_end(title, charts.useful_top([row.kl or 0.0 for row in rows], None), "zoom_kl")
    figure = charts.score_bars(charts.table(rows), "kl", top)
    widgets.chart(figure, key="kl_bars", alt="KL from the dense model without each block.")
    say.caption(f"{note} In nats per token; 0 means the same predictions.")
    if not by_sample:
        return
    table = charts.table(by_sample)
    top = _scale_end(charts.useful_top(table["kl"].tolist(), None), "zoom_kl_rows")
    figure = charts.divergence_heatmap(table, top=top)
    widgets.chart(figure, key="divergences", alt="KL of each row without each block.")
    say.caption(f"{note} By calibration row, in nats per token.")


def module_heatmap(weights: Sequence[WeightRow], column: str, title: str, blocks: int) -> None:
    """Draw one criterion by module; clicking a column drops its block in the Prune page's plan.

    A click redraws the figure, which clears the chart's own selection; the pad keeps the choice.
    """
    pad = prune_pad.plan_elsewhere()
    even = st.toggle("Compare within each module", key=f"rows_{column}")
    figure = charts.taylor_heatmap(charts.table(weights), column, rows=even, dropped=pad.drop)
    key = f"heat_{column}_{pad.clicks}"
    widgets.chart(
        figure,
        key=key,
        on_select=lambda: prune_pad.clicked(key, blocks),
        selection_mode="points",
        alt=f"{title}: module x block; click a column to drop or keep its block.",
    )
    chosen = ", ".join(map(str, pad.drop)) or "none"
    say.caption(f"Click a column to drop its block in plan {pad.active}. Chosen: {chosen}.")


def searched(record: RunRecord, dense: float | None, note: str) -> None:
    """Draw greedy removal and the sublayer scores, if the run has them."""
    greedy, parts = GreedyRow.read(record.path), SublayerRow.read(record.path)
    if greedy:
        st.subheader("Greedy removal (SLEB)")
        figure = charts.greedy_line(charts.table(greedy), dense)
        widgets.chart(figure, key="greedy", alt="Perplexity after every removal round.")
        say.caption(
            f"{note} Each round removes the block whose removal increases perplexity least."
        )
    if parts:
        st.subheader("Perplexity without attention or MLP")
        top = charts.useful_top([row.ppl for row in parts], dense)
        figure = charts.sublayer_bars(charts.table(parts), dense, top)
        widgets.chart(figure, key="parts", alt="Perplexity without each sublayer.")
        clipped = f" Bars above {rounded(top)} are cut off." if top else ""
        say.caption(
            f"{note} The criterion sublayers of the Prune page removes the cheapest.{clipped}"
        )


def downloads(record: RunRecord, blocks: pd.DataFrame) -> None:
    """Draw a download button for every table; a file is read only when it is downloaded."""
    st.caption("Download")
    with st.container(horizontal=True):
        for file in TABLES:
            path = record.path / file
            if path.is_file():
                widgets.csv_download(file, path.read_bytes)
        if len(charts.scored_columns(blocks)) > 1:
            widgets.csv_download(
                "agreement.csv",
                lambda: charts.rank_agreement(blocks).to_csv(index_label="criterion"),
            )


def results(record: RunRecord) -> None:
    """Draw everything that the run measured."""
    run, rows = Importance.read(record.path), BlockRow.read(record.path)
    if run is None or not rows:
        st.info("This run did not write any results.")
        return
    note, blocks = known.measured_on(run), charts.table(rows)
    values = [row.ppl for row in rows if row.ppl is not None]
    if len(values) == len(rows):
        perplexity(values, run.dense_ppl, note)
    tiles = st.columns(4)
    if run.dense_ppl:
        tiles[0].metric("Dense perplexity", rounded(run.dense_ppl), border=True)
    tiles[1].metric("Predictions", f"{run.tokens:,}", border=True)
    tiles[2].metric("Time", f"{sum(run.seconds.values()):.1f} s", border=True)
    tiles[3].metric("Peak memory", f"{run.peak_memory_mib:,.0f} MiB", border=True)
    frame.step("prune", "Next: choose blocks to drop")
    if run.text.warning:
        say.warning(run.text.warning)
    findings.show(of_run(record.path))
    samples, weights = SampleRow.read(record.path), WeightRow.read(record.path)
    angular = AngularRow.read(record.path)
    if samples:
        by_row(samples, note)
    if all(row.kl is not None for row in rows):
        divergence(rows, DivergenceRow.read(record.path), note)
    for column, title in (("taylor", "Taylor importance"), ("magnitude", "Magnitude")):
        if weights and all(getattr(row, column) is not None for row in weights):
            st.subheader(f"{plain(title)} by module")
            module_heatmap(weights, column, title, len(blocks))
            say.caption(note)
    if angular:
        st.subheader("Angular distance")
        widgets.chart(
            charts.angular_triangle(charts.table(angular)), key="angular", alt="Start x length."
        )
        say.caption(
            f"{note} Circled: the start block with the smallest angular change for that cut length."
        )
    searched(record, run.dense_ppl, note)
    for column, title in (
        ("block_influence", "Block Influence"),
        ("relative_update", "Relative update"),
    ):
        if all(getattr(row, column) is not None for row in rows):
            st.subheader(plain(title))
            widgets.chart(charts.score_bars(blocks, column), key=f"bars_{column}", alt=title)
            say.caption(note)
    st.subheader("All scores")
    if len(charts.scored_columns(blocks)) > 1:
        widgets.chart(
            charts.agreement_heatmap(blocks),
            key="agreement",
            alt="Rank agreement of the criteria.",
        )
        say.caption(f"{note} Spearman's rank correlation; 1 means the same order of blocks.")
    shown = blocks.dropna(axis=1, how="all").rename(columns=charts.LABELS)
    figures = {name: st.column_config.NumberColumn(format="localized") for name in shown.columns}
    height = min(500, 38 + 35 * len(shown))
    st.dataframe(shown, hide_index=True, height=height, column_config=figures)
    downloads(record, blocks)


def so_far(record: RunRecord) -> None:
    """Draw the criteria that a running run has finished; the others follow as they are computed."""
    run, rows = Importance.read(record.path), BlockRow.read(record.path)
    if run is None or not rows:
        return
    blocks, note = charts.table(rows), known.measured_on(run)
    done = charts.scored_columns(blocks)
    st.subheader("Results so far")
    wanted = [m.replace("-", "_") for m in run.metrics]
    rest = [charts.LABELS[c] for c in wanted if c in charts.LABELS and c not in done]
    finished = ", ".join(charts.LABELS[c] for c in done)
    say.caption(f"Finished: {finished}. Still to come: {', '.join(rest) or 'others'}. {note}")
    for column in sorted(done, key=lambda c: c != "ppl"):
        if column == "ppl":
            values = blocks["ppl"].tolist()
            top = charts.useful_top(values, run.dense_ppl)
            figure = charts.perplexity_bars(values, run.dense_ppl, log=not top, top=top)
        else:
            top = charts.useful_top(blocks["kl"].tolist(), None) if column == "kl" else None
            figure = charts.score_bars(blocks, column, top)
        widgets.chart(figure, key=f"so_far_{column}", alt=f"{charts.LABELS[column]} of each block.")


def label(record: RunRecord) -> str:
    """Return the label of an importance run in a list."""
    return known.label_of(record, state.names().run(record))


frame.start("Importance", dense=True)
st.title("Importance")
name = state.active_checkpoint()
info = state.inspect(name)
found = known.scored_runs(state.workspace(), info)
opened = state.form_is_open("importance", not found)
with st.expander("New run", expanded=opened, icon=":material/tune:"):
    watched = launcher(name, info)
runs.show_all("importance", started=[watched])
running = next((r for r in state.workspace().runs("importance") if r.id == watched), None)
if running and running.is_live:
    st.fragment(so_far, run_every=2)(running)
if found:
    record = runs.pick("importance", found, "Results of", newest=watched, name=label)
    if record:
        results(record)
else:
    st.info(
        "This checkpoint has not been scored yet. Start a run above; it takes seconds on the demo."
    )
score_import.draw(name, info)
pair_matrix.draw(info)
