"""Make it and measure it: one button that makes a plan's variant and measures it beside dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from core.checkpoint.drop import Removal
from core.errors import DepthcutError
from core.heal import seams
from core.prune import toggle
from core.recipes import make
from core.recipes.results import RecipeSummary
from core.recipes.retraining import STEPS
from core.recipes.spec import RecipeSpec
from core.retrain.spec import LABELS
from core.runs import jobs
from core.runs.flags import in_words
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.ui import forms, runs, say, state, widgets

RECIPE = "make"
PLAIN = "Nothing"
HEALS = {f"Heal ({name})": name for name in seams.CHOICES if name != "none"}
REPAIRS = (PLAIN, *HEALS, *LABELS.values())
"""What may follow the cut: closed-form healing, or retraining by one of its methods."""


def draw(checkpoint: str, removal: Removal, where: str, criterion: str = "") -> None:
    """Draw the options, the command, the button, and the card or the result of its runs.

    Args:
        checkpoint: The checkpoint to prune.
        removal: What goes; empty draws nothing but a hint.
        where: Name of the place on the page, for the widgets' keys.
        criterion: What chose the blocks, for the record.
    """
    with st.container(border=True):
        st.markdown("**Make it and measure it**")
        if not removal:
            st.caption("Choose at least one block, or a part of one, to remove.")
            return
        form = forms.of_recipe(RECIPE, checkpoint)
        values = _options(form, removal, criterion, checkpoint)
        try:
            spec = build(RecipeSpec, {**values, "out": "DIR"})
            make.check(spec)
        except DepthcutError as error:
            say.error(in_words(str(error)))
            return
        form.origin()
        with st.expander("Command"):
            st.code(jobs.command_line("recipe", spec), "bash", wrap_lines=True)
        key = f"make_run_{where}"
        if st.button(
            "Make it and measure it",
            key=f"make_{where}",
            type="primary",
            icon=":material/rocket_launch:",
            help="Prunes, repairs, merges, evaluates and benchmarks in one run, beside the dense "
            "model. A run that was stopped can be resumed.",
        ):
            record = runs.launch_once("recipe", values)
            st.session_state[key] = record.id if record else ""
        _results(checkpoint, removal, values, st.session_state.get(key, ""))


def _options(form: forms.Form, removal: Removal, criterion: str, checkpoint: str) -> dict[str, Any]:
    """Draw how the cut is repaired; return the recipe's options."""
    columns = st.columns([2, 1], vertical_alignment="bottom")
    repair = form.select(
        "repair", "After the cut", REPAIRS, LABELS["lora"], columns[0],
        help="Healing is in closed form and takes seconds to minutes. Retraining takes longer and "
        "brings back more; an adapter is merged into the variant.",
    )  # fmt: skip
    methods = {label: method for method, label in LABELS.items()}
    values: dict[str, Any] = {"name": RECIPE, "checkpoint": checkpoint}
    values |= toggle.options_of(removal)
    if criterion:
        values["criterion"] = criterion
    if repair in HEALS:
        values["heal"] = HEALS[repair]
    if repair in methods:
        values["retrain"] = methods[repair]
        values["steps"] = form.number(
            "steps", "Training steps", 1, 10_000_000, STEPS, columns[1],
            help="More recovers more, until the loss no longer falls.",
        )  # fmt: skip
    else:
        form.drawn.setdefault("steps", ("Training steps", None, False))
    unseen = form.unseen(RecipeSpec)
    if repair not in HEALS:  # it is not read then
        unseen.pop("calibration", None)
        form.drawn.pop("calibration", None)
    return unseen | values


def _results(checkpoint: str, removal: Removal, values: Mapping[str, Any], started: str) -> None:
    """Draw the live runs and, for this plan, the newest that ended: its result or how to resume."""
    mine = [r for r in state.workspace().runs("recipe") if _is_of(r, checkpoint)]
    for record in mine:
        if record.is_live:
            runs.show(record.id)
    ended = [r for r in mine if not r.is_live and (r.id == started or _same(r, removal, values))]
    if not ended:
        return
    newest = ended[0]
    if newest.state != "done":
        say.error(f"{state.names().run(newest)}: {runs.how_it_ended(newest)}")
        widgets.action(
            "Resume",
            lambda: jobs.restart(newest),
            key=f"resume_{newest.id}",
            icon=":material/restart_alt:",
        )
        return
    found = RecipeSummary.read(newest.path) or RecipeSummary()
    say.success(found.verdict)
    with st.expander("More on this result"):
        say.bullets([state.names().in_words(line) for line in found.findings])


def _is_of(record: RunRecord, checkpoint: str) -> bool:
    return record.spec.get("name") == RECIPE and record.spec.get("checkpoint") == checkpoint


def _same(record: RunRecord, removal: Removal, values: Mapping[str, Any]) -> bool:
    """Whether a run made the variant of this plan with the same repair."""

    def of(name: str, default: Any = ()) -> Any:
        return record.spec.get(name) or default

    named = toggle.options_of(removal)
    lists = ("drop", "attention", "mlp", "mlp_width")
    blocks: Sequence[tuple[Any, Any]] = [
        (sorted(of(name)), sorted(named.get(name, ()))) for name in lists
    ]
    repairs = [(of(n, "none"), values.get(n, "none")) for n in ("heal", "retrain")]
    return all(one == other for one, other in (*blocks, *repairs))
