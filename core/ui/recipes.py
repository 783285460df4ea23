"""Recipes as cards: what each does, its command, progress and verdict."""

from __future__ import annotations

from typing import Any

import streamlit as st

from core import recipes
from core.errors import DepthcutError
from core.recipes.results import RecipeSummary
from core.recipes.spec import RecipeSpec
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.ui import forms, recipe_time, run_on, runs, say, state, widgets
from core.ui import verdict as present
from core.ui.say import plain

OFFERED = ("importance", "best", "drop-one", "restore", "depth-vs-width", "paper-table")
"""Recipes on the home page; the retraining recipes are on the Retrain page."""


def latest(checkpoint: str, name: str) -> RunRecord | None:
    """Return the newest run of a recipe on ``checkpoint``, or None."""
    for record in state.workspace().runs("recipe"):
        if record.spec.get("name") == name and record.spec.get("checkpoint") == checkpoint:
            return record
    return None


def cards(checkpoint: str, names: tuple[str, ...] = OFFERED) -> None:
    """Draw the choice of a recipe, and the chosen one: command, button, progress and verdict."""
    titles = {name: recipes.get(name).title for name in names}
    chosen = st.pills(
        "Recipe",
        names,
        format_func=lambda name: plain(titles[name]),
        default=names[0],
        key="recipe_choice",
        required=True,
    )
    _card(checkpoint, str(chosen))


def _card(checkpoint: str, name: str) -> None:
    recipe = recipes.get(name)
    record = latest(checkpoint, name)
    form = forms.of_recipe(name, checkpoint)
    say.paragraph(recipe.about)
    values: dict[str, Any] = {"name": name, "checkpoint": checkpoint}
    if name == "best":
        values["latency"] = form.slider(
            "latency",
            "Most latency, times the dense model's",
            0.3,
            0.95,
            0.8,
            0.05,
            help="The budget. On the command line, memory or parameters can be limited instead.",
        )
    values = {**form.unseen(RecipeSpec), **values}
    try:
        spec = build(RecipeSpec, {**values, "out": "DIR"})
    except DepthcutError as error:
        say.error(str(error))
        return
    form.origin()
    on = run_on.choose(f"recipe {name}", checkpoint)
    if not on:  # times are those of this machine
        recipe_time.draw(spec)
    st.code(jobs.command_line("recipe", spec, on), language="bash", wrap_lines=True)
    again = "Run it again" if record and record.state == "done" else "Run the recipe"
    live = record is not None and record.is_live
    if st.button(
        again, key=f"recipe_{name}", icon=":material/play_arrow:", type="primary", disabled=live
    ):
        started = runs.launch_once("recipe", values, on)
        record = started or record
    if record and record.state == "done":
        verdict(record)
        _table(record)
    elif record:
        runs.show(record.id)


def verdict(record: RunRecord) -> None:
    """Draw the results of a finished recipe."""
    found = RecipeSummary.read(record.path) or RecipeSummary()
    say.success(found.verdict or "This recipe did not write a verdict.")
    if found.findings:
        say.bullets(list(found.findings))
    for step, why in found.failed.items():
        say.warning(f"{step} failed: {why}")
    say.caption(
        f"Measured by the run {state.names().run(record)} on {runs.day(record)}; the Jobs page "
        "lists every step as a run."
    )
    present.present(str(record.spec.get("checkpoint") or ""))


def _table(record: RunRecord) -> None:
    """Draw the recipe's table.csv if it has one; columns without any value are omitted."""
    path = record.path / "table.csv"
    if path.is_file():
        import pandas as pd  # half a second, which the first page of a server does not have

        table = pd.read_csv(path).dropna(axis="columns", how="all")
        words = table.select_dtypes(exclude="number").columns
        st.dataframe(table.fillna(dict.fromkeys(words, "")), hide_index=True)
        widgets.csv_download(
            widgets.file_name(record.id, ending=".csv"), path.read_bytes, label="table.csv",
            key=f"table_{record.id}", type="tertiary", icon=":material/download:",
        )  # fmt: skip
