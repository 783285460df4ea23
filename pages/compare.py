"""Compare: quality against cost for everything made from one checkpoint, and which to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from core.benchmark.results import known_rates
from core.charts import compare as charts
from core.charts.checkpoint import parameter_bars
from core.charts.prune import block_strip
from core.compare import choice, compiled, published, writing
from core.compare import scene as compare_view
from core.compare.measured import Cell, Row, comparable
from core.compare.outcomes import Outcome
from core.compare.scene import Scene
from core.compare.verdict import ranked, verdict_of
from core.errors import DepthcutError
from core.prune.toggle import to_text
from core.study import Study, info_of, study
from core.study.settings import Settings
from core.ui import (
    budget_form,
    compare_launch,
    export,
    findings,
    forms,
    frame,
    heal_form,
    make_form,
    report,
    say,
    state,
    verdict,
    widgets,
)
from core.ui.say import plain

ASKED: Any = "query-params"
COSTS = (*choice.COSTS, "tokens_per_s", "speedup", "reserved_mib", "process_mib")
"""Columns of the table that are estimated if the cost is."""
HEADINGS = {
    "label": "variant",
    "cut_in": "cut in blocks",
    "ratio": "removed",
    "ppl": "perplexity",
    "ppl_over_dense": "perplexity, x dense",
    "latency_s": "latency (s)",
    "first_token_ms": "first token (ms)",
    "per_token_ms": "per token (ms)",
    "tokens_per_s": "tokens/s",
    "speedup": "speed, x dense",
    "memory_mib": "peak memory (MiB)",
    "reserved_mib": "reserved (MiB)",
    "process_mib": "process (MiB)",
    "kind_of_cost": "cost",
    "is_plan": "planned",
}
"""Headings of the table; the CSV files keep the names of the columns."""


def shown(figure: go.Figure, key: str, note: str, **more: Any) -> Any:
    """Draw a chart with its caption; offer its data as CSV and the chart as a web page."""
    name = key.rstrip("0123456789").rstrip("_")
    event = widgets.chart(figure, key, **more)
    with st.container(horizontal=True, vertical_alignment="center"):
        say.caption(note)
        with st.container(horizontal=True, width="content"):
            for label, kind, make in (
                ("CSV", "text/csv", lambda: csv_of(charts.data_of(figure))),
                ("HTML", "text/html", lambda: charts.standalone(figure, note)),
            ):
                st.download_button(
                    plain(label), make, f"{name}.{label.lower()}", kind,
                    key=f"{key}_{label}", on_click="ignore", type="tertiary",
                    icon=":material/download:",
                )  # fmt: skip
    return event


def csv_of(rows: list[Row]) -> str:
    """Return rows as CSV; lists of blocks are written as 3,5."""
    flat = [{k: to_text(v) if isinstance(v, tuple) else v for k, v in r.items()} for r in rows]
    return pd.DataFrame(flat).to_csv(index=False)


def finished(kind: str, newest: str) -> bool:
    """Whether ``newest`` is a run that has finished since this session last drew the page."""
    seen = st.session_state.get(f"{kind}_newest")
    st.session_state[f"{kind}_newest"] = newest
    return bool(newest) and seen is not None and newest != seen


def looked_at(known: Study, settings: Settings) -> Scene:
    """Draw the choice of protocol and benchmark runs; return the scene they select.

    It starts with what the verdict is on.
    """
    columns = st.columns(2)
    protocols = {p.label: p for p in ranked(known, settings.evaluation)}
    evaluated = [q for q in known.quality if q.variant and q.protocol.bos not in ("rows",)]
    last = max(evaluated, key=lambda q: q.started, default=None)
    if last and finished("ppl", last.run):
        st.session_state["ppl_by"] = last.protocol.label
    label = columns[0].selectbox(
        "Perplexity protocol",
        list(protocols) or ["not measured yet"],
        key="ppl_by",
        bind=ASKED,
        help="Perplexities are comparable only for the same text, window and BOS setting.",
    )
    benches = {b.id: b for b in known.benchmarks}
    newest = next(iter(benches), "")
    usual: list[str] | None = [b.id for b in comparable(known.benchmarks)]
    if finished("bench", newest):
        st.session_state["bench"] = [newest, *st.session_state.get("bench", ())]
        usual = None  # a widget whose value was just set has no default
    chosen = columns[1].multiselect(
        "Benchmark runs",
        list(benches),
        default=usual,
        key="bench",
        bind=ASKED,
        format_func=lambda run: compare_view.run_label(
            benches[run], state.names().run(benches[run].record)
        ),
        placeholder="none",
        help="The variants of one run were measured side by side. If a point was measured twice, "
        "the newer measurement counts.",
    )
    picked = [benches[b] for b in chosen]
    return compare_view.scene(known, protocols.get(label), picked, known_rates(state.workspace()))


def point_of(scene: Scene, target: float | None) -> tuple[Cell, float | None]:
    """Draw the ratio slider and the choice of batch and output; return the selected point."""
    ratio = None
    columns = st.columns([3, 1, 1] if len(scene.ratios) > 1 else 3)
    if len(scene.ratios) > 1:
        words = {f"{r:.1%}": r for r in scene.ratios}
        usual = scene.usual_ratio
        if target is not None:
            usual = min(scene.ratios, key=lambda r: abs(r - target))
        middle = next(w for w, r in words.items() if r == usual)
        picked = columns[0].select_slider(
            "Parameters removed",
            list(words),
            value=middle,
            key="ratio",
            bind=ASKED,
            help="For each method, every chart shows the variant closest to this ratio.",
        )
        ratio = words[picked]
    else:
        columns = [*columns[2:], *columns[:2]]
        ratio = scene.ratios[0] if scene.ratios else None
    batches = sorted({b for b, _, _ in scene.cells})
    batch = columns[1].selectbox("Batch size", batches, key="batch", bind=ASKED)
    outputs = sorted({(o, i) for b, i, o in scene.cells if b == batch})
    output = columns[2].selectbox("Output tokens", [o for o, _ in outputs], key="out", bind=ASKED)
    given = next((i for o, i in outputs if o == output), 12)
    return (batch, given, output), ratio


def budget_of(settings: Settings) -> choice.Budget:
    """Draw the targets, which start with the study's; empty means no limit."""
    columns = st.columns(3)
    wide: dict[str, Any] = {"min_value": 0.0, "bind": ASKED}
    wide |= {"placeholder": "any", "format": "%.4g"}
    memory = columns[0].number_input(
        "Max memory (GiB)",
        value=settings.memory_gib,
        key="gib",
        step=0.5,
        **wide,
        help="Starts with the study's target. Without a target, the variants of one size are "
        "compared: the size that most of them have.",
    )
    pace = columns[1].number_input(
        "Max ms per token", value=settings.ms_per_token, key="ms", step=1.0, **wide
    )
    ppl = columns[2].number_input(
        "Max perplexity (x dense)", value=None, key="x", step=0.05, **wide
    )
    try:
        return choice.Budget(memory, pace, ppl)
    except DepthcutError as error:
        say.error(str(error))
        return choice.Budget()


def choose(key: str) -> None:
    """Select a candidate, also in the URL."""
    st.session_state["compare_chosen"] = st.query_params["point"] = key
    st.session_state["compare_clicks"] = st.session_state.get("compare_clicks", 0) + 1


def clicked(chart: str) -> None:
    """Select the candidate whose point on ``chart`` was clicked."""
    event = st.session_state.get(chart) or {}
    for point in event.get("selection", {}).get("points", []):
        if data := point.get("customdata"):
            choose(str(data[0]))


def quality_chart(scene: Scene, ratio: float | None, chosen: str) -> None:
    """Draw perplexity against the ratio, with published figures if selected."""
    st.subheader("Quality against ratio")
    if not any(c.ppl for c in scene.found):
        st.info(
            "No perplexity has been measured yet. Measure a curve on the Prune page, or run the "
            "recipe."
        )
        return
    columns = st.columns(2, vertical_alignment="bottom")
    source = columns[0].selectbox(
        "Published figures",
        ["none", *published.sources()],
        key="published",
        bind=ASKED,
        help="Published on other models, data and hardware; compare them only relative to their "
        "own dense baseline. Perplexities appear here, speed-ups in the cost panel against ratio.",
    )
    relative = columns[1].toggle("Relative to dense", key="relative", bind=ASKED)
    overlay = published.over_dense(source) if source != "none" else []
    key = f"quality_{st.session_state.get('compare_clicks', 0)}"
    note = f"Measured: {scene.protocol.label if scene.protocol else ''}. Large: checkpoints; "
    note += f"small: plans. {compare_view.allowed(scene.at_ratio(ratio))}"
    if overlay:
        note += f" Stars: published by {source} (WikiText-2, windows of 128 tokens)."
    figure = charts.quality(
        scene.found, at=ratio, relative=relative or bool(overlay), published=overlay, chosen=chosen
    )
    shown(figure, key, note, on_select=lambda: clicked(key), selection_mode="points",
          alt="Perplexity against the share of parameters removed.")  # fmt: skip


def pareto_chart(
    scene: Scene, rows: list[Outcome], budget: choice.Budget, chosen: str, ratio: float | None
) -> None:
    """Draw quality against a cost; a click selects a candidate."""
    st.subheader("Quality against cost")
    names = {label: column for column, label in charts.AXES.items()}
    x = names[st.segmented_control("Cost", list(names), default=next(iter(names)), key="cost",
                                   bind=ASKED, required=True, format_func=plain)]  # fmt: skip
    fitting = choice.within(rows, budget)
    best = choice.best(rows, budget)
    front = choice.frontier(rows, x)
    if not front:
        st.info(
            "No candidate has both a perplexity and this cost yet. Run a benchmark at the top of "
            "the page."
        )
        return
    key = f"pareto_{x}_{st.session_state.get('compare_clicks', 0)}"
    looks = {c.id: charts.look_of(c) for c in scene.found}
    figure = charts.pareto(
        rows, looks, front, x,
        within=[r.key for r in fitting], at=[c.id for c in scene.at_ratio(ratio)],
        best=best.key if best and budget.is_set else "", chosen=chosen, limits=budget.limits,
    )  # fmt: skip
    note = (
        "Filled: measured cost; hollow: estimated. Arrows: retraining. Faint: over budget. "
        "Large: closest to the ratio above."
    )
    shown(figure, key, note, on_select=lambda: clicked(key), selection_mode="points",
          alt="Perplexity against cost; a click on a point shows its plan.")  # fmt: skip


def chosen_one(scene: Scene, rows: list[Outcome], chosen: str) -> None:
    """Draw the selected candidate: what remains of each block, its figures, how to use it."""
    if not chosen:
        st.caption("Click a point to see its plan.")
        return
    row = next((r for r in rows if r.key == chosen), None)
    found = next((c for c in scene.found if c.id == chosen), None)
    if row is None or found is None:
        say.warning(
            f"{chosen} is no longer among these candidates: it was deleted or belongs to another "
            "checkpoint. Choose another point."
        )
        return
    if found.is_plan:
        make_form.draw(scene.study.dense.id, found.removal, "compare", found.method)
    with st.container(border=True):
        st.subheader(plain(found.label))
        say.paragraph(compare_view.facts_of(row) + ".")
        dense = info_of(scene.study.dense)
        if found.kind in ("dense", "depth") and dense:
            strip = block_strip(dense.blocks, {"A": found.dropped}, named=False)
            widgets.chart(strip, key="chosen_strip", alt="Blocks kept and dropped.")
        own = None if found.is_plan else info_of(found)
        if found.kind == "width" and own:
            widgets.chart(parameter_bars(own), key="chosen_width", alt="Parameters by block.")
        if found.healed:
            heal_form.of_folder(found.folder)
        with st.container(horizontal=True):
            if found.folder:
                if st.button("Make it the active checkpoint", icon=":material/check:"):
                    state.set_checkpoint(found.id)
                    st.rerun()
            elif found.is_plan:
                where = {"drop": to_text(found.dropped), "model": scene.study.dense.id}
                frame.step("prune", "Open this plan on the Prune page", where)
            st.download_button(
                "plan.json" if found.dropped else "figures.json",
                lambda: pd.Series(row.to_dict()).to_json(indent=2),
                widgets.file_name(found.label, ending=".json"), "application/json",
                on_click="ignore",
            )  # fmt: skip
        if found.folder:
            export.of_folder(found.folder.absolute(), "chosen")


def panels(scene: Scene, cell: Cell, ratio: float | None, estimates: bool) -> None:
    """Draw cost against batch size, output length or ratio."""
    st.subheader("Cost")
    if not scene.rows and not scene.guesses:
        return
    metrics = st.pills(
        "Panels", list(charts.METRICS), selection_mode="multi", key="panels", bind=ASKED,
        default=["latency_s_p50", "tokens_per_s", "peak_memory_mib", "speedup"],
        format_func=charts.METRICS.get,
    )  # fmt: skip
    against = st.segmented_control(
        "Against", ["batch size", "output tokens", "ratio"], default="batch size",
        key="against", bind=ASKED, required=True,
    )  # fmt: skip
    rows = scene.all_rows(estimates=estimates)
    at = scene.at_ratio(ratio)
    columns = st.columns(2)
    for place, metric in enumerate(metrics):
        if against == "ratio":
            here = [r for r in rows if r.cell == cell]
            others = published.over_dense(st.session_state.get("published", ""), "speedup")
            figure = charts.against_ratio(
                here, scene.found, metric, ratio, others, legend=place == 0
            )
        else:
            x, fixed = ("batch_size", 2) if against == "batch size" else ("output_tokens", 0)
            keys = {c.id for c in at}
            here = [r for r in rows if r.cell[fixed] == cell[fixed] and r.id in keys]
            figure = charts.against(
                here, at, metric, x=x, capacity_mib=scene.capacity_mib, legend=place == 0
            )
        with columns[place % 2]:
            if not charts.data_of(figure):
                st.caption(f"{charts.METRICS[metric]}: not measured.")
                continue
            shown(
                figure,
                f"panel_{metric}",
                measured_on(scene),
                alt=charts.METRICS[metric],
            )
    say.caption(compare_view.accuracy(scene.runs))


def compiled_steps(known: Study, scene: Scene, cell: Cell) -> None:
    """Draw the series with compiled steps beside the eager one, if one was measured."""
    for sentence in compiled.failures(scene.runs):
        say.warning(sentence)
    rows = compiled.rows(known, scene.runs, cell)
    if not rows:
        return
    st.subheader("Eager and compiled")
    batch, given, made = cell
    say.caption(
        f"{compiled.HOW} Batch {batch}, {given} tokens in, {made} out. {measured_on(scene)}"
    )
    shape = {
        name: st.column_config.NumberColumn(format="%.2fx") for name in rows[0] if "over" in name
    }
    shape |= {
        name: st.column_config.NumberColumn(format="%.1f")
        for name in rows[0]
        if name.startswith(("tokens/s", "compiling"))
    }
    st.dataframe(pd.DataFrame(rows), hide_index=True, column_config=shape)


def measured_on(scene: Scene) -> str:
    """Return the caption of every cost chart."""
    if not scene.runs:
        return "Estimated from shapes; nothing was measured."
    summary = scene.runs[0].summary
    return (
        f"Measured on {summary.device} ({summary.device_name}), {', '.join(summary.dtypes)}, "
        f"{summary.input_tokens} tokens in, seed {summary.seed}."
        + (" Peak memory counts tensors only." if summary.peak_memory == "tensors" else "")
    )


def formats(table: pd.DataFrame) -> dict[str, Any]:
    """Return how the columns on written text are shown: shares in percent, words with a digit."""
    shares = {
        name: st.column_config.NumberColumn(format="percent")
        for name in table.columns
        if name.startswith(("repeated", "more than", "distinct"))
    }
    shares |= {HEADINGS["ratio"]: st.column_config.NumberColumn(format="percent")}
    words = (name for name in table.columns if name.startswith("words, "))
    return shares | {name: st.column_config.NumberColumn(format="%.1f") for name in words}


def table_of(rows: pd.DataFrame, mark: str = "") -> None:
    """Draw rows under the headings that people read; ``mark`` is added to those of costs."""
    kept = rows.loc[:, [any(cell not in ("", None) for cell in rows[n].dropna()) for n in rows]]
    names = {name: HEADINGS.get(name, name) for name in kept.columns}
    names |= {name: f"{names[name]}{mark}" for name in COSTS if name in names}
    shown = kept.rename(columns=names)
    st.dataframe(shown, hide_index=True, column_config=formats(shown), placeholder="")


def tables(scene: Scene, rows: list[Outcome]) -> None:
    """Draw the comparison as a table, and offer every table as CSV."""
    st.subheader("Table")
    wrote = writing.columns(scene.study)
    table = [r.to_dict() | wrote.get(r.key, {}) for r in rows]
    frame_ = pd.DataFrame(table).drop(columns=["key", "series", "parent"])
    frame_["dropped"] = frame_["dropped"].map(to_text)
    guessed = frame_["kind_of_cost"] == "estimated"
    if not guessed.all():
        table_of(frame_[~guessed])
    if guessed.any():
        st.caption(
            "Estimated cost, from shapes and this device's rates, scaled by what was measured of "
            "the dense model if it was:"
        )
        table_of(frame_[guessed], ", estimated")
    if wrote:
        st.caption(
            "Of the text written in a task (measured on Evaluate): words of an answer, share of "
            "4-grams that repeat an earlier one, and share of different words, pairs and triples."
        )
    large = [{"variant": v.name, **asdict(v.largest_batch)} for b in scene.runs
             for v in b.summary.variants if v.largest_batch]  # fmt: skip
    with st.container(horizontal=True):
        files: dict[str, Callable[[], list[Row]]] = {
            "comparison": lambda: table,
            "points": lambda: [r.row() for r in scene.rows],
            "published": published.figures,
        }
        files |= {"largest-batch": lambda: large} if large else {}
        for name, rows_of in files.items():
            st.download_button(
                plain(f"{name}.csv"),
                lambda rows_of=rows_of: csv_of(rows_of()),
                f"{name}.csv",
                "text/csv",
                on_click="ignore",
            )
    if large:
        st.caption("Largest batch that fits")
        st.dataframe(pd.DataFrame(large), hide_index=True)


def ship(known: Study, settings: Settings) -> tuple[choice.Budget, str]:
    """Draw the targets and the verdict under them: what to ship, which is returned as well."""
    st.subheader("What should I ship?")
    budget = budget_of(settings)
    rates = known_rates(state.workspace())
    found = verdict_of(known, settings, rates=rates, budget=budget)
    verdict.draw(found, choose)
    with st.container(horizontal=True, vertical_alignment="center"):
        report.button(known.dense.id)
        frame.link("presentation", "Present it")
        frame.link("playground", "Try it")
    return budget, found.take.id if found.take else ""


def measure_more(known: Study, cold: bool) -> None:
    """Draw the forms that measure: the recipe on depth and width, and a benchmark."""
    with st.expander(
        "Create and compare depth and width variants", expanded=cold, icon=":material/balance:"
    ):
        compare_launch.recipe_form(known.dense.id)
        sentence, details = compare_launch.verdict_of(known)
        if sentence:
            st.markdown("**Result of the last comparison**")
            say.paragraph(sentence)
            say.bullets(details)
    opened = state.form_is_open("benchmark", cold)
    with st.expander("Benchmark variants", expanded=opened, icon=":material/timer:"):
        compare_launch.benchmark_form(known)


frame.start("Compare")
name = state.active_checkpoint()
state.inspect(name)
known = study(state.workspace(), name)
chosen = st.session_state.get("compare_chosen") or st.query_params.get("point", "")
cold = not known.benchmarks and not known.protocols
if cold:
    st.info(
        "Nothing has been measured yet. Create variants of one size, or benchmark existing ones."
    )
    measure_more(known, cold)
    st.stop()
settings = forms.kept(name).settings
budget, take = ship(known, settings)
chosen = chosen or take
measure_more(known, cold)
scene = looked_at(known, settings)
for problem in scene.problems():
    say.warning(state.names().in_words(problem))
cell, ratio = point_of(scene, settings.ratio)
estimates = st.toggle("Include estimates", not scene.rows, key="estimates", bind=ASKED)
rows = scene.table(cell, estimates=estimates)
pareto_chart(scene, rows, budget, chosen, ratio)
chosen_one(scene, rows, chosen)
quality_chart(scene, ratio, chosen)
budget_form.compared(known.dense.info)
panels(scene, cell, ratio, estimates)
compiled_steps(known, scene, cell)
findings.of_scene(scene, cell, budget, settings)
tables(scene, rows)
