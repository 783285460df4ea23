"""Retrain: choose a variant, method and data, see the cost, and watch quality recover."""

from __future__ import annotations

from typing import Any

import streamlit as st

from core.charts import retrain as charts
from core.checkpoint import locate
from core.errors import DepthcutError
from core.retrain import history
from core.retrain.spec import WHOLE, RetrainSpec, paper, settings_of, suggested_loss
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.study.settings import Settings, seen_before
from core.ui import (
    chat_note,
    dry_runs,
    export,
    forms,
    frame,
    generate_form,
    prune_pad,
    retrain_live,
    retrain_recipes,
    run_on,
    runs,
    say,
    state,
    widgets,
)
from core.ui.say import plain

# All further options, in rows of widgets.
OPTIONS = {
    "Data": (
        ("format", "template", "layout"),
        ("cutoff", "holdout", "holdout_data"),
        ("retention", "questions", "also"),
    ),
    "Training": (
        ("epochs", "batch", "micro_batch", "warmup"),
        ("schedule", "weight_decay", "clip", "eval_every"),
        ("seed", "merge_dtype", "report_to"),
    ),
    "LoRA": (("rank", "alpha", "dropout", "quantized_base"), ("targets",)),
    "Partial fine-tuning": (("last", "seams", "keep_states"),),
    "Distillation": (("loss", "teacher_top_k"), ("kl_weight", "distil")),
    "Memory and device": (
        ("gradient_checkpointing", "fused", "retry"),
        ("device", "dtype", "dense"),
    ),
}
ONLY = {"LoRA": "lora", "Partial fine-tuning": "partial"}
"""Options that only one method has."""


def choose_variant(form: forms.Form) -> str:
    """Draw the choice of what to retrain; return its name."""
    called = state.names()
    variants = history.variants(state.workspace())
    found = {r.id: called.checkpoint(r.id) for r in variants}
    active = state.current_checkpoint()
    folder = locate.local_folder(active) if active else None
    if folder:  # a run may also be named by its path
        folders = ((r.id, locate.local_folder(str(r.path))) for r in variants)
        same = (run for run, own in folders if own and own.samefile(folder))
        active = next(same, active)
    names = dict(found)
    if active and active not in found:
        names[active] = f"active: {called.checkpoint(active)}"
    wanted = form.value("checkpoint")
    if isinstance(wanted, str) and wanted and wanted not in names:
        names = {wanted: f"folder: {called.checkpoint(wanted)}", **names}
    usual = active if active in found else next(iter(names), None)
    columns = st.columns([2, 1], vertical_alignment="bottom")
    chosen = form.select(
        "checkpoint", "Variant", list(names), usual, at=columns[0],
        format_func=lambda name: names[name],
    )  # fmt: skip
    other = form.text(
        "folder", "Or a folder or Hub id", at=columns[1], placeholder="a pruned checkpoint"
    )
    if not found:
        st.info("No pruned variant yet. Create one first, or enter the folder of one.")
        frame.link("prune", "Choose blocks to drop")
    return other.strip() or str(chosen or "")


def usual_loss(form: forms.Form, name: str, method: str) -> str:
    """Return the loss that the form starts with for this variant and method."""
    given = form.value("dense")
    known = history.has_teacher(name, given if isinstance(given, str) else None)
    usual = suggested_loss(method, has_teacher=known and not form.value("distil"))
    if st.session_state.get("retrain_usual_loss", usual) != usual:
        st.session_state.pop(form.key("loss"), None)  # drawn again from what was chosen here
    st.session_state["retrain_usual_loss"] = usual
    return usual


def take_paper(form: forms.Form, method: str) -> None:
    """Fill in the paper's loss, learning rate and batch."""
    forms.put(form.checkpoint, form.command, paper(method))


def of_several(method: str) -> tuple[str, ...]:
    """Return the fields of a run by several processes, if there can be one."""
    fields = run_on.several()
    return (*fields, "sharding") if fields and method in WHOLE else fields


def settings(form: forms.Form, name: str) -> dict[str, Any]:
    """Draw all options of retraining ``name``, and return them."""
    values = form.fields(RetrainSpec, ("method", "data"))
    form.offer("data")
    evaluation = form.kept.settings.evaluation
    if seen := seen_before(evaluation, Settings(training=values["data"])):
        say.warning(seen)
    st.caption(
        "LoRA trains small adapters and is enough after moderate pruning; continued pretraining "
        "trains all weights on packed text, for severe pruning; full fine-tuning trains all "
        "weights on individual rows, and partial fine-tuning only the last blocks."
    )
    values |= form.fields(RetrainSpec, ("steps", "lr", "merge"), {"merge": True})
    method = values["method"]
    loss = usual_loss(form, name, method)
    if loss == "kl":
        st.caption(
            "The loss is KL to the dense model unless you choose another one. Measured on a model "
            "of 113 M parameters: with LoRA, KL closed 15 to 22% of the KL to the dense model on "
            "three texts that were not trained on, while cross entropy, the paper's loss, widened "
            "it on two of them. But cross entropy left the lower perplexity on WikiText-2, 75.5 "
            "against 82.8, and more of LAMBADA's answers right, 17 against 12 of 100 "
            "(docs/results/recovering.md)."
        )
    if paper(method):
        st.button(
            "Use the paper's settings",
            icon=":material/article:",
            help="Cross entropy, and the learning rate and batch of Shortened LLaMA, which trained "
            "models of 7 billion parameters.",
            on_click=take_paper,
            args=(form, method),
        )
    with st.expander("All options"):
        for title, rows in OPTIONS.items():
            if ONLY.get(title, values["method"]) != values["method"]:
                continue
            say.bold(title)
            for row in rows:
                shown = (*row, *of_several(values["method"])) if "device" in row else row
                values |= form.fields(RetrainSpec, shown, {"loss": loss})
    form.origin()
    return values


def outlook(spec: RetrainSpec) -> str:
    """Draw the estimated cost and training examples; return what prevents a launch, if anything."""
    plan, problem = dry_runs.plan("retrain", spec, "Counting tokens and memory ...")
    if plan is None:
        return problem
    retrain_live.row(history.tiles(plan))
    say.caption(
        f"Estimated for {plan['device']}: {plan['rows']:,} rows of {plan['data']['source']} "
        f"({history.rows_in_words(plan['data']['kind'], plan['data']['template'])}), "
        f"{plan['heldout_rows']} held out, "
        f"{plan['tokens_per_sequence']:.0f} tokens per sequence, "
        f"{plan['tokens_with_loss_share']:.0%} of them in the loss. " + history.layers_note(plan)
    )
    for warning in plan["warnings"]:
        say.warning(warning)
    samples = plan["samples"]
    with st.container(border=True):
        number = 1
        if len(samples) > 1:
            number = st.segmented_control(
                "Training example", range(1, len(samples) + 1), default=1, key="retrain_row"
            )
        st.html(history.sample_html(samples[(number or 1) - 1]))
        st.caption("Grey italics: prompt (masked). Underlined: tokens the loss is computed on.")
    return ""


def launcher() -> str:
    """Draw choices, estimated cost, command and button; return the id of the run started last."""
    form = forms.Form("retrain", state.current_checkpoint())
    name = choose_variant(form)
    if not name:
        return ""
    values = {"checkpoint": name, **settings(form, name)}
    chat_note.draw(
        name,
        "This tokenizer has a chat template: instructions and messages are written with it, and "
        "the loss covers the assistant's answers alone, unless you choose another template.",
    )
    on = run_on.choose("retrain", name, shared=True)
    problem = ""
    try:
        spec = build(RetrainSpec, {**values, "out": "DIR"})
        settings_of(spec, 1)
        problem = outlook(spec)
        st.code(jobs.command_line("retrain", spec, on), "bash", wrap_lines=True)
    except DepthcutError as error:
        problem = str(error)
        say.error(problem)
    with st.container(horizontal=True):
        start = st.button(
            "Start retraining", type="primary", icon=":material/play_arrow:", disabled=bool(problem)
        )
        test = st.button(
            "Test learning rates",
            icon=":material/speed:",
            disabled=bool(problem),
            help="Takes a few steps at each of five learning rates, all from the same start, and "
            "suggests one.",
        )
    if start or test:
        record = runs.launch_once("retrain", {**values, "lr_range_test": test}, on)
        if record:
            st.session_state["retrain_started"] = record.id
            st.rerun()
    return str(st.session_state.get("retrain_started", ""))


def compare(records: list[RunRecord], record: RunRecord) -> None:
    """Draw all retraining runs of one parent side by side."""
    family = history.same_parent(records, record)
    if not family:
        st.info("No retrained variant of this checkpoint yet.")
        return
    table = history.comparison(family, state.names().run)
    st.subheader(f"Retrained from {plain(state.names().of_spec(record))}")
    if table["recovered"].notna().any():
        widgets.chart(charts.recovered_bars(table), key="recovered", alt="Recovered share.")
    st.dataframe(
        table,
        hide_index=True,
        column_config={
            "recovered": st.column_config.NumberColumn("recovered by loss", format="percent"),
            "recovered by KL": st.column_config.NumberColumn(format="percent"),
            "lr": st.column_config.NumberColumn("learning rate", format="%g"),
            "tokens_per_s": st.column_config.NumberColumn("tokens/s", format="%.0f"),
            "memory_mib": st.column_config.NumberColumn("peak MiB", format="%.0f"),
        },
    )
    retrain_live.overlaid(family)
    st.caption(
        "Losses are in nats per predicted token on held-out rows. Compare only runs that were "
        "evaluated on the same held-out rows (column heldout: their predicted tokens)."
    )
    widgets.csv_download("retrained.csv", lambda: table.to_csv(index=False))


prune_pad.adopt_run()
frame.start("Retrain")
made = state.workspace().runs("retrain")
again = state.form_is_open("retrain", first=False)
one, several, recipes = st.tabs(["Retrain", "Side by side", "Recipes"])
with one:
    with st.expander("New run", expanded=not made or again, icon=":material/tune:"):
        started = launcher()
    generate_form.show()
    record = runs.pick("retrain", made, "Run", newest=started)
    if record:
        shown = record.id
        runs.show_all("retrain", only=lambda other: other.id != shown)
        retrain_live.show(record)
        export.of_retrained(record)
with several:
    if record:
        compare(made, record)
    else:
        st.info("No retrained variant yet.")
with recipes:
    retrain_recipes.show()
