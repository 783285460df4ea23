"""The retraining recipes on the Retrain page: launch, progress, table and chart."""

from __future__ import annotations

from typing import Any

import streamlit as st

from core import recipes
from core.errors import DepthcutError
from core.recipes import sweep
from core.recipes.results import RecipeSummary
from core.recipes.spec import RecipeSpec
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.ui import forms, recipe_time, run_on, runs, say, state, widgets

NAMES = ("ablation", "stability", "domain", "cpt-lora", "sweep")
TITLES = {
    "recovered": "share of the gap recovered",
    "loss": "loss, nats per token",
    "kl": "KL(dense || model), nats per token",
    "accuracy": "accuracy",
}

EARLIER = {"judged_on": "evaluated_on"}
"""Columns of table.csv that had another name in earlier versions."""


def show() -> None:
    """Draw the choice of a recipe, its launch form and the results of its past runs."""
    offered = [name for name in NAMES if name in recipes.NAMES]
    if not offered:
        return
    about = {name: recipes.get(name) for name in offered}
    name = st.selectbox(
        "Recipe", offered, key="retrain_recipe", format_func=lambda name: about[name].title
    )
    say.caption(about[name].about)
    started = _launcher(name)
    done = [r for r in state.workspace().runs("recipe") if r.spec.get("name") == name]
    live = [r.id for r in done if r.is_live]
    runs.show(started if started in {r.id for r in done} else live[0] if live else "")
    file = sweep.TABLE if name == "sweep" else "table.csv"
    done = [r for r in done if (r.path / file).is_file()]
    if done:
        by_id = {r.id: r for r in done}
        chosen = st.selectbox(
            "Result",
            list(by_id),
            key=f"result_{name}",
            format_func=lambda run: state.names().run(by_id[run]),
        )
        (_sweep if name == "sweep" else _result)(by_id[chosen])


def _sweep(record: RunRecord) -> None:
    """Draw a sweep: the best combination, parallel coordinates and the table."""
    import pandas as pd  # with the charts, half a second: other pages use only this one's names

    from core.charts import retrain as charts

    found = RecipeSummary.read(record.path) or RecipeSummary()
    table = pd.read_csv(record.path / sweep.TABLE)
    say.bold(f"Measured on {runs.day(record)}: {found.verdict}")
    for line in found.findings:
        say.caption(line)
    options = [name for name in table.columns if name not in sweep.MEASURES]
    figure = charts.parallel(table, [*options, "seconds", "recovered", "recovered_kl"])
    widgets.chart(figure, key=f"sweep_{record.id}", alt="Settings and recovery of every training.")
    st.dataframe(
        table,
        hide_index=True,
        column_config={
            name: st.column_config.NumberColumn(format="percent")
            for name in ("recovered", "recovered_kl")
        },
    )
    widgets.csv_download(sweep.TABLE, lambda: table.to_csv(index=False))


def _launcher(name: str) -> str:
    """Draw the options and the button; return the id of the run started last."""
    checkpoint = state.current_checkpoint()
    if not checkpoint:
        st.info("No checkpoint is active yet. Choose one on the home page.")
        return ""
    form = forms.of_recipe(name, checkpoint)
    values: dict[str, Any] = {"name": name, "checkpoint": checkpoint}
    values |= form.fields(RecipeSpec, ("data", "steps", "seed"))
    if name == "sweep":
        given = form.text(
            "grid_text", "Grid", " ".join(sweep.USUAL),
            help="Options of retraining and their values, separated by spaces: lr=1e-3,3e-3 "
            "loss=ce,kl. Every combination is trained.",
        )  # fmt: skip
        values["grid"] = tuple(given.split())
        values |= form.fields(RecipeSpec, ("within",))
    values |= form.unseen(RecipeSpec)
    form.origin()
    try:
        spec = build(RecipeSpec, {**values, "out": "DIR"})
        if name == "sweep":
            sweep.check(spec)
    except DepthcutError as error:
        say.error(str(error))
        return ""
    on = run_on.choose(f"recipe {name}", checkpoint)
    if not on:  # times are those of this machine
        recipe_time.draw(spec)
    st.code(jobs.command_line("recipe", spec, on), "bash", wrap_lines=True)
    key = f"recipe_{name}"
    if st.button("Run the recipe", icon=":material/play_arrow:"):
        record = runs.launch_once("recipe", values, on)
        if record:
            st.session_state[key] = record.id
    return str(st.session_state.get(key, ""))


def _result(record: RunRecord) -> None:
    """Draw a recipe's verdict, its table and a chart of one measure."""
    import pandas as pd

    from core.charts import retrain as charts

    found = RecipeSummary.read(record.path) or RecipeSummary()
    table = pd.read_csv(record.path / "table.csv").rename(columns=EARLIER)
    say.bold(f"Measured on {runs.day(record)}: {found.verdict}")
    for line in found.findings:
        say.caption(line)
    measures = [m for m in TITLES if m in set(table["measure"])]
    measure = st.segmented_control(
        "Measure",
        measures,
        default=measures[0],
        key=f"measure_{record.id}",
        format_func=lambda m: TITLES[m],
    )
    rows = table[(table["measure"] == (measure or measures[0])) & table["value"].notna()]
    figure = charts.recipe(rows, "value", TITLES[measure or measures[0]])
    widgets.chart(figure, key=f"recipe_chart_{record.id}", alt="The recipe's results.")
    st.dataframe(table, hide_index=True, height=min(480, 38 + 35 * len(table)))
    st.download_button(
        "table.csv", (record.path / "table.csv").read_bytes, "table.csv", on_click="ignore"
    )
