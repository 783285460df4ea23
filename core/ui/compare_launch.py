"""Launch forms of the Compare page: a benchmark of variants, and the matched comparison."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from core import recipes
from core.benchmark import command as benchmark
from core.data.calibration import SOURCE_HELP
from core.errors import DepthcutError, OptionError
from core.recipes.results import RecipeSummary
from core.recipes.spec import RecipeSpec
from core.runs import jobs
from core.runs.spec import build, parse_numbers, show
from core.study import Study
from core.ui import runs, say, state

RECIPE = "depth-vs-width"


def benchmark_form(known: Study) -> None:
    """Draw the choice of variants and points, the estimate, the command and the button."""
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
    limit = columns[2].number_input("Time limit (s)", 1, 86400, 90, key="bench_limit")
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
            raise OptionError(
                "A variant, a batch size and an output length are required.",
                "Choose at least one of each.",
            )
        plan = benchmark.dry_run(spec)
    except DepthcutError as error:
        say.error(str(error))
        return
    most = max(p["total_mib"] for p in plan["points"])
    say.caption(
        f"Estimated: up to {plan['generations']} generations in about {limit:.0f} s; "
        f"up to {most:,.0f} MiB of memory."
    )
    with st.popover("Memory per point"):
        st.dataframe(pd.DataFrame(plan["points"]), hide_index=True)
    st.code(jobs.command_line("benchmark", spec), "bash", wrap_lines=True)
    if st.button("Benchmark", type="primary", icon=":material/timer:", key="run_benchmark"):
        record = runs.launch_once("benchmark", values)
        st.session_state["benchmark_run"] = record.id if record else ""
    runs.show(st.session_state.get("benchmark_run", ""))


def _take_settings(known: Study) -> None:
    """Fill the form with the settings of an earlier run chosen on the Jobs page."""
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
    """Draw the recipe that creates depth and width variants of one size and measures them all."""
    recipe = recipes.get(RECIPE)
    say.caption(recipe.about)
    columns = st.columns(3, vertical_alignment="bottom")
    ratio = columns[0].slider("Parameters to remove", 0.05, 0.6, 0.33, 0.01, key="recipe_ratio")
    text = columns[1].text_input(
        "Dataset", "auto", key="recipe_text", help=f"For calibration and evaluation: {SOURCE_HELP}"
    )
    same = columns[2].toggle(
        "Restrict all methods to the same blocks",
        key="recipe_same",
        help="Width methods prune only the blocks that depth pruning may drop. By default, each "
        "prunes the blocks its paper does: FLAP and Wanda-sp all of them, LLM-Pruner all but the "
        "first and last ones.",
    )
    values: dict[str, Any] = {"name": RECIPE, "checkpoint": name, "ratio": ratio, "data": text}
    values["same_layers"] = same
    try:
        spec = build(RecipeSpec, {**values, "out": "DIR"})
    except DepthcutError as error:
        say.error(str(error))
        return
    st.code(jobs.command_line("recipe", spec), "bash", wrap_lines=True)
    if st.button("Create and compare", type="primary", icon=":material/balance:", key="run_recipe"):
        record = runs.launch_once("recipe", values)
        st.session_state["compare_recipe"] = record.id if record else ""
    runs.show(st.session_state.get("compare_recipe", ""))


def verdict_of(known: Study) -> tuple[str, list[str]]:
    """Return verdict and findings of the study's newest finished comparison; empty if none."""
    names = {known.dense.id, str(known.dense.folder)}
    for record in state.workspace().runs("recipe"):
        asked = record.spec.get("name") == RECIPE and record.spec.get("checkpoint") in names
        if asked and record.state == "done":
            found = RecipeSummary.read(record.path) or RecipeSummary()
            return found.verdict, list(found.findings)
    return "", []
