"""The dense model writes the training text: form, cost, progress, and what it wrote."""

from __future__ import annotations

from typing import Any

import streamlit as st

from core.errors import DepthcutError
from core.generate import view
from core.generate.results import Summary, read_pairs
from core.generate.spec import GenerateSpec
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.study import study
from core.ui import dry_runs, forms, paging, retrain_live, run_on, runs, say, state
from core.ui.say import plain

TITLE = "Let the dense model write the training text"
PER_PAGE = 4
"""Prompts shown with both answers."""
PREVIEWED = 3
_OPEN, _RUN = "generate_open", "generate_shown"


def show() -> None:
    """Draw the section; nothing in it is computed while it is closed."""
    name = state.current_checkpoint()
    if not name:
        return
    live = [r for r in state.workspace().runs("generate") if r.is_live]
    if not st.toggle(TITLE, state.form_is_open("generate", bool(live)), key=_OPEN):
        return
    with st.container(border=True):
        _inside(name)


def _inside(name: str) -> None:
    st.caption(
        "The variant then learns the dense model's own answers. Published for Llama-3.1-8B-"
        "Instruct with 26 of 32 blocks: 91.2 % of the dense model's quality, against 81.7 % with "
        "the dataset's answers (arXiv 2410.09982). An answer that fails the check is replaced by "
        "the reference."
    )
    started = _launcher(name)
    done = [r for r in state.workspace().runs("generate") if r.state == "done"]
    runs.show(started)
    done = [r for r in done if Summary.read(r.path)]
    if not done:
        return
    by_id = {r.id: r for r in done}
    if started in by_id and st.session_state.get(f"{_RUN}_newest") != started:
        st.session_state[_RUN] = st.session_state[f"{_RUN}_newest"] = started
    if st.session_state.get(_RUN) not in by_id:
        st.session_state[_RUN] = done[0].id
    called = state.names()
    chosen = st.selectbox(
        "Text", list(by_id), key=_RUN, format_func=lambda run: plain(called.run(by_id[run]))
    )
    _written(name, by_id[chosen])


def _launcher(name: str) -> str:
    """Draw the options, what they cost, and the button; return the run to watch."""
    form = forms.Form("generate", name)
    try:
        dense = study(state.workspace(), name).dense
    except DepthcutError as error:
        say.error(error)
        return ""
    values: dict[str, Any] = {"checkpoint": dense.id if dense.record is None else str(dense.folder)}
    values |= form.fields(GenerateSpec, ("prompts",))
    form.offer("prompts")
    values |= form.fields(GenerateSpec, ("check", "samples", "max_tokens", "temperature"))
    with st.expander("All options"):
        values |= form.fields(GenerateSpec, ("format", "template", "prompt_tokens"))
        values |= form.fields(GenerateSpec, ("batch", "seed", "device", "dtype"))
    form.origin()
    on = run_on.choose("generate", str(values["checkpoint"]))
    problem = ""
    try:
        spec = build(GenerateSpec, {**values, "out": "DIR"})
        problem = _outlook(spec)
        st.code(jobs.command_line("generate", spec, on), "bash", wrap_lines=True)
    except DepthcutError as error:
        problem = str(error)
        say.error(problem)
    icon = ":material/play_arrow:"
    return runs.launcher("generate", values, "Write the text", icon, problem, on)


def _outlook(spec: GenerateSpec) -> str:
    """Draw the estimated cost and the first prompts; return what prevents a launch, if anything."""
    plan, problem = dry_runs.plan("generate", spec, "Reading the prompts ...")
    if plan is None:
        return problem
    retrain_live.row(view.tiles(plan))
    how = f", prompts in the layout {plan['template']}" if plan["template"] else ""
    say.caption(
        f"Estimated for {plan['device']}: {plan['format']} rows of {plan['prompts']}{how}, if "
        "every answer takes all its tokens."
    )
    for note in plan["notes"]:
        say.caption(note)
    with st.container(border=True):
        for example in plan["examples"][:PREVIEWED]:
            st.html(view.example_html(example["prompt"], example["reference"]))
        st.caption("Grey italics: the prompt as the model reads it. Below it: the reference.")
    return ""


def _written(name: str, record: RunRecord) -> None:
    """Draw what became of the prompts, both answers side by side, and the way to train on it."""
    summary = Summary.read(record.path) or Summary()
    say.bold(view.sentence(summary))
    say.caption(view.measured(summary))
    where = str(record.path)

    def train() -> None:
        forms.put(name, "retrain", {"data": where})
        state.open_form("retrain")

    st.button(
        "Train on this text",
        key=f"train_on_{record.id}",
        icon=":material/model_training:",
        on_click=train,
        help="Writes it into the data field of the form above.",
    )
    numbers = paging.page_of(range(summary.rows), "answers", "rows", PER_PAGE)
    for pair in read_pairs(record.path, numbers[0] if numbers else 0, len(numbers)):
        with st.container(border=True):
            st.html(view.pair_html(pair))
