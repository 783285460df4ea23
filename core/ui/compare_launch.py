"""Launch forms of the Compare page: a benchmark of variants, and the matched comparison."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from core import recipes, words
from core.benchmark import command as benchmark
from core.data.calibration import SOURCE_HELP
from core.errors import DepthcutError, OptionError
from core.recipes.results import RecipeSummary
from core.recipes.spec import RecipeSpec
from core.runs import jobs
from core.runs.dtypes import COMPUTED
from core.runs.spec import build, parse_numbers
from core.study import Study
from core.ui import forms, recipe_time, run_on, runs, say, state
from core.ui.say import plain

RECIPE = "depth-vs-width"


def benchmark_form(known: Study) -> None:
    """Draw the choice of variants and points, the estimate, the command and the button."""
    here = {v.id: v for v in known.variants if v.folder}
    form = forms.Form("benchmark", known.dense.id)
    picked = form.several(
        "checkpoints",
        "Variants",
        list(here),
        [*list(here)[:1], *list(here)[1:][-5:]],
        format_func=lambda name: plain(here[name].label),
    )
    columns = st.columns(5)
    batches = form.text("batch_sizes", "Batch sizes", "1,4,16", columns[0])
    outputs = form.text("output_tokens", "Output tokens", "128", columns[1])
    limit = form.number("time_limit_s", "Time limit (s)", 1, 86400, 90, columns[2])
    device = form.text("device", "Device", "auto", columns[3])
    dtype = form.select("dtype", "Precision", ("auto", *COMPUTED), "auto", columns[4])
    twice = form.switch(
        "compile",
        "Also measure compiled steps",
        help="A second series with a static cache and steps compiled by torch.compile, which a "
        "CUDA GPU replays as graphs. Compiling takes up to a minute for each variant and visit.",
    )
    form.origin()
    try:
        values = {
            "checkpoints": tuple(picked),
            "batch_sizes": parse_numbers(batches, "--batch-sizes"),
            "output_tokens": parse_numbers(outputs, "--output-tokens"),
            "time_limit_s": float(limit),
            "device": device,
            "dtype": dtype,
            "compile": twice,
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
        f"Estimated from {plan['seconds_from']}: up to {plan['generations']} generations in about "
        f"{words.duration(plan['seconds'])}; up to {most:,.0f} MiB of memory."
    )
    if plan["least_s"] > limit:
        say.warning(
            f"The time limit of {limit:.0f} s cannot be kept: even the fewest generations of every "
            f"point take about {words.duration(plan['least_s'])}. Choose fewer variants, smaller "
            "batches or shorter outputs."
        )
    with st.popover("Memory per point"):
        st.dataframe(pd.DataFrame(plan["points"]), hide_index=True)
    on = run_on.choose("benchmark", state.current_checkpoint())
    st.code(jobs.command_line("benchmark", spec, on), "bash", wrap_lines=True)
    if st.button("Benchmark", type="primary", icon=":material/timer:", key="run_benchmark"):
        record = runs.launch_once("benchmark", values, on)
        st.session_state["benchmark_run"] = record.id if record else ""
    runs.show_all(
        "benchmark",
        started=[st.session_state.get("benchmark_run", "")],
        only=lambda record: not record.spec.get("rates_only"),
    )


def recipe_form(name: str) -> None:
    """Draw the recipe that creates depth and width variants of one size and measures them all."""
    recipe = recipes.get(RECIPE)
    say.caption(recipe.about)
    form = forms.of_recipe(RECIPE, name)
    columns = st.columns(3, vertical_alignment="bottom")
    ratio = form.slider("ratio", "Parameters to remove", 0.05, 0.6, 0.33, 0.01, columns[0])
    text = form.text(
        "data",
        "Dataset",
        at=columns[1],
        help=f"For calibration and evaluation, or two, with a comma: {SOURCE_HELP}",
    )
    same = form.switch(
        "same_layers",
        "Restrict all methods to the same blocks",
        at=columns[2],
        help="Width methods prune only the blocks that depth pruning may drop. By default, each "
        "prunes the blocks its paper does: FLAP and Wanda-sp all of them, LLM-Pruner all but the "
        "first and last ones.",
    )
    values: dict[str, Any] = {"name": RECIPE, "checkpoint": name, **form.unseen(RecipeSpec)}
    form.origin()
    values |= {"ratio": ratio, "data": text}
    values["same_layers"] = same
    try:
        spec = build(RecipeSpec, {**values, "out": "DIR"})
    except DepthcutError as error:
        say.error(str(error))
        return
    on = run_on.choose(f"recipe {RECIPE}", name)
    if not on:  # times are those of this machine
        recipe_time.draw(spec)
    st.code(jobs.command_line("recipe", spec, on), "bash", wrap_lines=True)
    if st.button("Create and compare", type="primary", icon=":material/balance:", key="run_recipe"):
        record = runs.launch_once("recipe", values, on)
        st.session_state["compare_recipe"] = record.id if record else ""
    runs.show_all(
        "recipe",
        started=[st.session_state.get("compare_recipe", "")],
        only=lambda record: record.spec.get("name") == RECIPE,
    )


def verdict_of(known: Study) -> tuple[str, list[str]]:
    """Return verdict and findings of the study's newest finished comparison; empty if none."""
    names = {known.dense.id, str(known.dense.folder)}
    for record in state.workspace().runs("recipe"):
        asked = record.spec.get("name") == RECIPE and record.spec.get("checkpoint") in names
        if asked and record.state == "done":
            found = RecipeSummary.read(record.path) or RecipeSummary()
            return f"Measured on {runs.day(record)}: {found.verdict}", list(found.findings)
    return "", []
