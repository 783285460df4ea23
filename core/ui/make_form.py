"""Make it and measure it: one button that makes a plan's variant and measures it beside dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from core import words
from core.checkpoint.drop import Removal
from core.compare.verdict import NEAR
from core.errors import DepthcutError
from core.heal import seams
from core.prune import toggle
from core.prune.plan import parameters_after
from core.recipes import make
from core.recipes.results import RecipeSummary
from core.recipes.retraining import STEPS
from core.recipes.spec import RecipeSpec
from core.retrain.spec import LABELS
from core.runs import jobs
from core.runs.flags import in_words
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.study import study
from core.ui import export, forms, frame, report, run_on, runs, say, state, widgets
from core.ui.say import plain
from core.width.methods import METHODS

RECIPE = "make"
PLAIN = "Nothing"
HEALS = {f"Heal ({name})": name for name in seams.CHOICES if name != "none"}
REPAIRS = (PLAIN, *HEALS, *LABELS.values())
"""What may follow the cut: closed-form healing, or retraining by one of its methods."""
WIDTH = "flap"
"""The width variant that is made too unless another is chosen: the paper's strongest baseline."""


STEPS_IN_WORDS = {
    make.PRUNED: "the cut",
    make.RETRAINED: "retraining",
    make.NARROWED: "the width variant",
    "speed": "the benchmark",
}


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
            make.check_plan(spec)
        except DepthcutError as error:
            say.error(in_words(str(error)))
            return
        _duration(spec)
        form.origin()
        on = run_on.choose(f"recipe {RECIPE} {where}", checkpoint)
        with st.expander("Command"):
            st.code(jobs.command_line("recipe", spec, on), "bash", wrap_lines=True)
        key = f"make_run_{where}"
        if st.button(
            "Make it and measure it",
            key=f"make_{where}",
            type="primary",
            icon=":material/rocket_launch:",
            help="Prunes, repairs, merges, evaluates and benchmarks in one run, beside the dense "
            "model and the width variant. A run that was stopped can be resumed.",
        ):
            record = runs.launch_once("recipe", values, on)
            st.session_state[key] = record.id if record else ""
        _results(checkpoint, removal, values, st.session_state.get(key, ""))


def _options(form: forms.Form, removal: Removal, criterion: str, checkpoint: str) -> dict[str, Any]:
    """Draw how the cut is repaired; return the recipe's options."""
    columns = st.columns([2, 1, 2], vertical_alignment="bottom")
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
    labels = {name: method.label for name, method in METHODS.items()}
    # two fields, so that a choice made for one case does not stay in the other
    known = _narrower(checkpoint, removal)
    field, usual = ("more_width", "none") if known else ("width", WIDTH)
    values["width"] = form.select(
        field, "Compare with a width variant", (*labels, "none"), usual, columns[2],
        format_func=lambda name: plain(labels.get(name, "none")),
        help="Also makes a variant of the same size from narrower blocks, not retrained, and "
        "evaluates and benchmarks it in the same run. None by default if this study has one.",
    )  # fmt: skip
    form.drawn.setdefault("width", (field, None, False))
    unseen = form.unseen(RecipeSpec)
    narrowed = METHODS.get(values["width"])
    if repair not in HEALS and not (narrowed and narrowed.samples):  # it is not read then
        unseen.pop("calibration", None)
        form.drawn.pop("calibration", None)
    return unseen | values


def _duration(spec: RecipeSpec) -> None:
    """Draw how long the whole chain will take, and its longest step."""
    found = make.expected(spec)
    if found is None:
        say.caption(runs.expected(None, None))
        return
    longest = max(found.seconds, key=lambda name: found.seconds[name])
    what = STEPS_IN_WORDS.get(longest, longest.replace("-", " of "))
    say.caption(
        f"Estimated time: about {words.duration(found.total)}, of which "
        f"{words.duration(found.seconds[longest])} for {what}; at {found.origin}."
    )


def _narrower(checkpoint: str, removal: Removal) -> bool:
    """Whether the study has a width variant of the size that the removal leaves."""
    try:
        info = state.describe(checkpoint)
        ratio = 1 - parameters_after(info, removal) / info.parameters
        known = study(state.workspace(), checkpoint).variants
    except DepthcutError:
        return False
    mine = (v for v in known if v.kind == "width" and v.folder and not v.retrained)
    return any(abs((v.ratio or 0.0) - ratio) <= NEAR for v in mine)


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
    say.success(f"Measured on {runs.day(newest)}: {found.verdict}")
    with st.expander("More on this result"):
        say.bullets([state.names().in_words(line) for line in found.findings])
    for step, why in found.failed.items():
        say.warning(f"{step} failed: {why}")
    _onwards(checkpoint, newest)


def _onwards(checkpoint: str, record: RunRecord) -> None:
    """Draw what comes after a finished run: comparing, presenting, reporting and exporting."""
    with st.container(horizontal=True, vertical_alignment="center"):
        frame.step("compare", "Next: compare")
        frame.link("presentation", "Present it")
        frame.link("playground", "Try it")
        report.button(checkpoint, "make")
    tuned = record.spec.get("retrain", "none") != "none"
    folder = Path(make.RETRAINED, "merged") if tuned else Path(make.PRUNED)
    export.of_folder((record.path / folder).absolute(), "made")


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
