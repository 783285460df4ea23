"""What the Compare page starts: a benchmark of chosen variants, and the matched comparison."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from core import recipes
from core.benchmark import command as benchmark
from core.errors import DepthcutError, OptionError
from core.recipes.command import RecipeSpec
from core.runs import jobs, workspace
from core.runs.spec import build, parse_numbers, show
from core.study import Study
from core.ui import runs, state

RECIPE = "depth-vs-width"


def benchmark_form(known: Study) -> None:
    """Draw the choice of variants and points, the dry run, the command and the button."""
    here = {v.id: v for v in known.variants if v.folder}
    _take_settings(known)
    picked = st.multiselect(
        "Variants",
        list(here),
        default=[*list(here)[:1], *list(here)[1:][-5:]],
        key="to_benchmark",
        format_func=lambda name: here[name].label,
    )
    columns = st.columns(4)
    batches = columns[0].text_input("Batch sizes", "1,4,16", key="bench_batches")
    outputs = columns[1].text_input("Output tokens", "128", key="bench_outputs")
    limit = columns[2].number_input("Seconds at most", 1, 86400, 90, key="bench_limit")
    device = columns[3].text_input("Device", "auto", key="bench_device")
    try:
        values = {
            "checkpoints": tuple(picked),
            "batch_sizes": parse_numbers(batches, "--batch-sizes"),
            "output_tokens": parse_numbers(outputs, "--output-tokens"),
            "time_limit_s": float(limit),
            "device": device,
        }
        spec = build(benchmark.BenchmarkSpec, {**values, "out": "DIR"})
        if not (picked and spec.batch_sizes and spec.output_tokens):
            raise OptionError("No variant, batch size or output length.", "Choose one of each.")
        plan = benchmark.dry_run(spec)
    except DepthcutError as error:
        st.error(str(error))
        return
    most = max(p["total_mib"] for p in plan["points"])
    st.caption(
        f"Estimated: up to {plan['generations']} generations, timed for about {limit:.0f} s; "
        f"at most {most:,.0f} MiB."
    )
    with st.popover("Memory of every point"):
        st.dataframe(pd.DataFrame(plan["points"]), hide_index=True)
    st.code(jobs.command_line("benchmark", spec), "bash", wrap_lines=True)
    if st.button("Benchmark", type="primary", icon=":material/timer:", key="run_benchmark"):
        record = runs.launch_once("benchmark", "benchmark", values)
        st.session_state["benchmark_run"] = record.id if record else ""
    runs.show(st.session_state.get("benchmark_run", ""))


def _take_settings(known: Study) -> None:
    """Fill the form with the settings of an earlier run that the Jobs page was told to use."""
    kept = state.take_settings("benchmark")
    if not kept:
        return
    found = [known.at(str(name)) for name in kept.get("checkpoints", ())]
    st.session_state["to_benchmark"] = [v.id for v in found if v and v.folder]
    for key, name in (("bench_batches", "batch_sizes"), ("bench_outputs", "output_tokens")):
        if kept.get(name):
            st.session_state[key] = show(tuple(kept[name]))
    if kept.get("time_limit_s"):
        st.session_state["bench_limit"] = int(kept["time_limit_s"])
    st.session_state["bench_device"] = str(kept.get("device") or "auto")


def recipe_form(name: str) -> None:
    """Draw the recipe that makes depth and width variants of one size and measures them all."""
    recipe = recipes.get(RECIPE)
    st.caption(recipe.about)
    columns = st.columns(3, vertical_alignment="bottom")
    ratio = columns[0].slider("Parameters to remove", 0.05, 0.6, 0.33, 0.01, key="recipe_ratio")
    text = columns[1].text_input(
        "Text", "demo", key="recipe_text", help="Calibrates and judges: demo, a file, or hub:NAME."
    )
    same = columns[2].toggle(
        "The same blocks for all",
        key="recipe_same",
        help="Width methods cut only in the blocks that depth may drop. Otherwise each cuts where "
        "its paper does: FLAP and Wanda-sp in all, LLM-Pruner not in the first and last.",
    )
    values: dict[str, Any] = {"name": RECIPE, "checkpoint": name, "ratio": ratio, "data": text}
    values["same_layers"] = same
    try:
        spec = build(RecipeSpec, {**values, "out": "DIR"})
    except DepthcutError as error:
        st.error(str(error))
        return
    st.code(jobs.command_line("recipe", spec), "bash", wrap_lines=True)
    if st.button("Make and compare", type="primary", icon=":material/balance:", key="run_recipe"):
        record = runs.launch_once(RECIPE, "recipe", values)
        st.session_state["compare_recipe"] = record.id if record else ""
    runs.show(st.session_state.get("compare_recipe", ""))


def verdict_of(known: Study) -> tuple[str, list[str]]:
    """Return verdict and findings of the study's newest finished comparison; empty without one."""
    names = {known.dense.id, str(known.dense.folder)}
    for record in state.workspace().runs("recipe"):
        asked = record.spec.get("name") == RECIPE and record.spec.get("checkpoint") in names
        if asked and record.state == "done":
            found = workspace.read_json(record.path / "summary.json") or {}
            return str(found.get("verdict") or ""), list(found.get("findings") or [])
    return "", []
