"""Prune: choose blocks, see at once what remains, and write the smaller checkpoint."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from core.charts import importance as importance_charts
from core.charts import prune as charts
from core.checkpoint import headers
from core.checkpoint.drop import PARTS, Removal
from core.errors import DepthcutError
from core.heal import command as heal_command
from core.heal.command import PruneSpec
from core.importance import curve_command
from core.importance.curve_command import CurveSpec
from core.prune import known as prune_view
from core.prune import target, toggle
from core.prune.known import Known
from core.prune.outlook import outlook
from core.prune.plan import default_protection
from core.runs import jobs
from core.ui import (
    budget_form,
    cockpit,
    export,
    forms,
    frame,
    heal_form,
    live_panel,
    make_form,
    prune_cost,
    prune_pad,
    run_on,
    runs,
    say,
    score_import,
    search_form,
    state,
    widgets,
    width_form,
)
from core.ui.prune_pad import PLANS, Pad
from core.ui.say import plain

WAYS = ("Blocks", "Width")
PAD_PX = 266
"""Height of the bars, so that the whole cockpit fits a screen of 1440 x 900."""


def scores_picker(name: str, pad: Pad, info: headers.CheckpointInfo) -> Known:
    """Draw the choice of scores: importance runs, then imported files; return the chosen one's."""
    found = {r.id: r for r in prune_view.scored_runs(state.workspace(), info)}
    files = score_import.files(name)
    labels = {r.id: prune_view.label_of(r, state.names().run(r)) for r in found.values()}
    labels |= {run: f"imported: {path.name}" for run, path in files.items()}
    if not labels:
        frame.link("importance", "Score the blocks")
        return Known(info)
    if st.session_state.get("pad_run") not in labels:
        st.session_state["pad_run"] = pad.run if pad.run in labels else next(iter(labels))
    pad.run = st.selectbox(
        "Scores",
        list(labels),
        key="pad_run",
        format_func=lambda run: plain(labels[run]),
        help="Importance run, or imported file, whose scores rank the blocks.",
    )
    if pad.run in files:
        return score_import.known(info, pad.run, files[pad.run])
    return prune_view.known(state.workspace(), info, found[pad.run])


def header(pad: Pad) -> str:
    """Draw the title, what to remove and which plan is edited, in one row; return the first."""
    st.session_state["pad_active"] = pad.active

    def switch() -> None:
        pad.active = st.session_state["pad_active"] or pad.active

    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Prune", width="content")
        way = st.segmented_control(
            "What to remove",
            WAYS,
            default=WAYS[0],
            key="prune_way",
            bind="query-params",
            required=True,
            label_visibility="collapsed",
            help="Removing blocks makes the model shallower; removing heads and neurons makes it "
            "narrower (baselines).",
        )
        if way == WAYS[0]:
            st.segmented_control(
                "Plan",
                PLANS,
                key="pad_active",
                on_change=switch,
                format_func=lambda name: f"Plan {plain(name)}",
                label_visibility="collapsed",
                help="The plan that your clicks edit.",
            )
    return str(way)


def planner(form: forms.Form, pad: Pad, known: Known, columns: Any) -> tuple[int, int]:
    """Draw criterion, amount and protection; return the first and last blocks protected."""
    blocks = known.info.blocks
    most = default_protection(blocks)
    if st.session_state.get("pad_criterion") not in known.criteria:
        wanted = pad.criterion if pad.criterion in known.criteria else known.criteria[0]
        st.session_state["pad_criterion"] = wanted
    protect = (("protect_first", "Protect first"), ("protect_last", "Protect last"))
    helps = ("Leading blocks never removed.", "Trailing blocks never removed.")
    first, last = (
        form.number(field, label, 0, blocks, most[at], at=columns[2 + at], help=helps[at])
        for at, (field, label) in enumerate(protect)
    )
    slider = pad.key("slider")

    def plan() -> None:
        if slider != pad.key("slider"):
            return  # the browser resends the last value of a widget that is no longer shown
        criterion, count = st.session_state["pad_criterion"], st.session_state.get(slider, 0)
        prune_pad.planned(lambda: known.choose(criterion, count, first, last))

    pad.criterion = columns[1].selectbox(
        "Criterion",
        known.criteria,
        key="pad_criterion",
        on_change=plan,
        format_func=lambda criterion: plain(prune_view.called(criterion)),
        help="Score that ranks the blocks; the lowest is removed first.",
    )
    ratios = known.ratios(pad.criterion, first, last)
    of_parts = known.ranks_parts(pad.criterion)
    total = f"{2 * blocks} parts" if of_parts else f"{blocks}"
    if len(ratios) < 2:
        say.warning(
            known.problem(pad.criterion, first, last)
            or f"With the first {first} and last {last} of {blocks} blocks protected, none is "
            "left to choose from. Protect fewer blocks, or choose by hand."
        )
        return first, last
    st.select_slider(
        f"Remove by {plain(prune_view.called(pad.criterion))}",
        range(len(ratios)),
        **prune_pad.shown(
            slider, min(known.count(pad.criterion, pad.removal), len(ratios) - 1), "value"
        ),
        key=slider,
        on_change=plan,
        format_func=lambda k: f"{k} of {total} ({ratios[k]:.1%})",
        help=f"{'Parts of blocks' if of_parts else 'Blocks'} to remove, and their share of all "
        "parameters.",
    )
    target_row(form, pad, known, (first, last), ratios)
    return first, last


def target_row(
    form: forms.Form, pad: Pad, known: Known, protect: tuple[int, int], ratios: list[float]
) -> None:
    """Draw the wanted share of parameters, and the nearest counts on both sides to take."""
    usual = 100 * (form.kept.settings.ratio or 0.2)
    criterion = pad.criterion

    def take(count: int) -> None:
        prune_pad.planned(lambda: known.choose(criterion, count, *protect), by="")

    with st.container(horizontal=True, vertical_alignment="bottom"):
        wanted = form.number(
            "target",
            "Smaller by (%)",
            0.1,
            95.0,
            round(usual, 1),
            whole=False,
            step=1.0,
            format="%.4g",
            width=130,
            help="Share of all parameters to remove; the buttons take the nearest counts below and "
            "above it.",
        )
        unit = "parts" if known.ranks_parts(criterion) else "blocks"
        for count in target.around(ratios, wanted / 100):
            few = unit[:-1] if count == 1 else unit
            st.button(
                f"{count:d} {plain(few)}: {ratios[count]:.1%}",
                key=f"pad_take_{count}",
                on_click=take,
                args=(count,),
                type="primary"
                if known.chosen_by(criterion, pad.removal, *protect)
                and known.count(criterion, pad.removal) == count
                else "secondary",
            )
        if known.has_ppl:
            form.switch("zoom", "Clip outliers", True)


def toggle_pad(form: forms.Form, pad: Pad, known: Known, protected: tuple[int, ...]) -> None:
    """Draw the clickable blocks, with their attention and MLP beneath."""
    blocks = known.info.blocks
    chosen = [b for b in pad.drop if b < blocks]
    if known.has_ppl:
        values = [float(v) for v in known.without if v is not None]
        top = importance_charts.useful_top(values, known.dense_ppl)
        zoom = top and form.value("zoom", True)
        figure = importance_charts.perplexity_bars(
            values,
            known.dense_ppl,
            dropped=chosen,
            protected=protected,
            top=top if zoom else None,
            height=PAD_PX,
        )
    else:
        figure = charts.block_strip(blocks, {pad.active: chosen}, protected, height=150)
    removal = pad.removal.below(blocks)
    figure = charts.with_part_rows(figure, removal, protected, lacking_parts(known.info))
    key = f"pad_chart_{pad.clicks}"
    widgets.chart(
        figure,
        key=key,
        on_select=lambda: prune_pad.clicked(key, blocks),
        selection_mode="points",
        alt=f"Blocks of plan {pad.active}, and their attention and MLP beneath; click a block or a "
        "part to remove or keep it.",
    )
    if known.has_ppl:
        say.caption(f"Bars: perplexity without each block. {known.note}")
    elif known.note:
        say.caption(known.note)


def keyboard_pad(pad: Pad, known: Known) -> None:
    """Draw the same choice as pills for keyboard use, and the parts of single blocks."""
    blocks = known.info.blocks
    chosen = [b for b in pad.drop if b < blocks]
    pills = pad.key("pills")
    st.pills(
        f"Blocks that plan {plain(pad.active)} drops (click here or on the chart)",
        range(blocks),
        selection_mode="multi",
        **prune_pad.shown(pills, chosen, "default"),
        key=pills,
        help="Keyboard: Tab to the blocks, arrow keys to move, space to drop or keep a block.",
        on_change=prune_pad.picked,
        args=(pills,),
    )
    parts = widgets.form(
        "parts", "Attention or MLP of single blocks", opened=bool(pad.removal.partial)
    )
    if not parts.open:
        return
    with parts:
        st.caption(
            "Of a block that stays. A block without attention keeps no key/value cache. Such a "
            "variant carries its own modelling code and loads with trust_remote_code=True."
        )
        for part, label in PARTS.items():
            part_pills(pad, known.info, part, label)


def part_pills(pad: Pad, info: headers.CheckpointInfo, part: str, label: str) -> None:
    """Draw one part of every block that can lose it as pills for keyboard use."""
    gone = lacking_parts(info)
    offered = [b for b in range(info.blocks) if b not in pad.drop and b not in getattr(gone, part)]
    key = pad.key(part)
    st.pills(
        f"Blocks that lose their {plain(label)} in plan {plain(pad.active)}",
        offered,
        selection_mode="multi",
        format_func=plain,
        **prune_pad.shown(key, [b for b in getattr(pad.removal, part) if b in offered], "default"),
        key=key,
        on_change=prune_pad.part_picked,
        args=(key, part),
    )


def lacking_parts(info: headers.CheckpointInfo) -> Removal:
    """Return the parts that blocks of the checkpoint do not have."""
    shapes = list(enumerate(info.block_shapes))
    return Removal(
        attention=tuple(b for b, shape in shapes if not shape["heads"]),
        mlp=tuple(b for b, shape in shapes if not shape["intermediate"]),
    )


def curve_launcher(pad: Pad, known: Known, name: str, first: int, last: int) -> None:
    """Offer to measure the curve, which is only estimated so far."""
    if known.scores is None or known.ranks_parts(pad.criterion):
        return
    values: dict[str, Any] = {
        "checkpoint": name,
        "scores": str(state.workspace().root / known.run),
        "criteria": (pad.criterion,),
        "protect_first": first,
        "protect_last": last,
        **forms.Form("curve", name).base,
    }
    spec = CurveSpec(**values, out="DIR")
    form = widgets.form("curve", "Measure this curve")
    if form.open:
        with form:
            st.caption("Removes the blocks one by one and measures after each removal, in one run.")
            on = run_on.choose("curve", name)
            if not on and (time := curve_time(spec)):  # rates are those of this machine
                say.caption(time)
            st.code(jobs.command_line("curve", spec, on), language="bash", wrap_lines=True)
            if st.button("Measure the curve", icon=":material/play_arrow:"):
                record = runs.launch_once("curve", values, on)
                pad.curve = record.id if record else pad.curve
    runs.show_all("curve", started=[pad.curve])


@st.cache_data(ttl=20, max_entries=50, show_spinner=False)
def curve_time(spec: CurveSpec) -> str:
    """Return how long a curve will take; empty if its plans cannot be made.

    Kept for a few seconds only: it depends on the rate of the last run, too.
    """
    try:
        found = curve_command.dry_run(spec)
    except DepthcutError:
        return ""
    return runs.expected(found["seconds"], found["seconds_from"])


def comparison(
    pad: Pad, known: Known, name: str, protected: tuple[int, ...], asked: dict[str, Any]
) -> None:
    """Draw both plans side by side: their blocks, sizes and known quality."""
    info = known.info
    st.subheader("Two plans side by side")
    widgets.chart(
        charts.block_strip(info.blocks, pad.plans, protected),
        key="pad_strip",
        alt="Blocks kept and dropped by plan A and plan B.",
    )
    table = prune_view.rows(
        outlook(info, (), **asked),
        {
            name: (
                outlook(info, removal.below(info.blocks), **asked),
                known.quality(removal),
                removal,
            )
            for name, removal in pad.plans.items()
        },
        known.quality(Removal()),
    )
    healed = prune_view.healings(state.workspace(), info)
    table += prune_view.healing_rows(pad.plans, healed)
    say.table(pd.DataFrame(table).set_index(""))
    for plan, removal in pad.plans.items():
        if removal and (found := healed.get(prune_view.cut_of(removal))):
            say.caption(f"Plan {plan}, plain and healed: {found.measured_on}")
    st.caption(
        "Memory is computed from the shapes: weights plus the key/value cache of all sequences, "
        "without activations. Perplexity is that on the calibration rows of the scores, as in the "
        "curve; a live figure above is on held-out text. An estimated perplexity adds up the "
        "increase each block or part causes alone; actual perplexity is usually higher."
    )
    if asked["context"] > info.context:
        st.warning(f"The model supports a context of {info.context:,} tokens.")
    other = PLANS[1 - PLANS.index(pad.active)]
    with st.container(horizontal=True):
        if st.button(f"Copy {plain(pad.active)} to {plain(other)}", icon=":material/content_copy:"):
            pad.plans[other] = pad.removal
            st.rerun()
        if st.button(
            f"Clear {plain(pad.active)}", icon=":material/clear:", disabled=not pad.removal
        ):
            pad.change(Removal())
            st.rerun()
    prune_cost.draw(name, info, pad.plans, asked["batch"], asked["dtype"], asked["context"])


def creator(pad: Pad, known: Known, name: str, first: int, last: int) -> None:
    """Draw the command, its button and progress, and how to load the result."""
    st.subheader(f"Create the variant of plan {plain(pad.active)}")
    removal = pad.removal
    problem = prune_view.problem_of(removal, known.info)
    if problem:
        (say.error if removal else say.info)(problem)
    values: dict[str, Any] = {"checkpoint": name, "drop": removal.drop}
    values |= toggle.options_of(removal)
    if not problem and known.chosen_by(pad.criterion, removal, first, last):
        values["criterion"] = pad.criterion
    elif not problem and pad.found[0] and pad.found[1] == removal.ordered:
        values["criterion"] = pad.found[0]
    values |= heal_form.choose(name)
    if not problem and (problem := heal_form.problem_of(values, known.info)):
        say.error(problem)
    on = run_on.choose("prune", name)
    spec = PruneSpec(**values, out="DIR")
    if not problem and not on:  # rates and memory are those of this machine
        say.caption(runs.expected(*heal_command.duration(spec, known.info, removal)))
        if problem := heal_form.memory_problem(spec, known.info):
            say.error(problem)
    st.code(jobs.command_line("prune", spec, on), "bash", wrap_lines=True)
    if st.button(
        "Create the variant", type="primary", icon=":material/content_cut:", disabled=bool(problem)
    ):
        record = runs.launch_once("prune", values, on)
        pad.made = record.id if record else pad.made
    runs.show_all("prune", started=[pad.made])
    heal_form.result(pad.made)


prune_pad.adopt_run()
frame.start("Prune", dense=True)
if not state.current_checkpoint():
    st.title("Prune")
name = state.active_checkpoint()
pad = prune_pad.current()
info = state.inspect(name)
way = header(pad)
if way == WAYS[1]:
    width_form.draw(name, info)
    export.of_study(name, st.session_state.get("width_made", ""))
    st.stop()
form = forms.Form("curve", name)
left, right = st.columns([13, 10], gap="medium")
with left:
    columns = st.columns([1.7, 1.3, 1.1, 1.1], vertical_alignment="bottom")
    with columns[0]:
        known, rows = live_panel.with_answers(name, scores_picker(name, pad, info))
    live_panel.ask(name, info, pad, rows)  # the sooner it is asked, the sooner it is there
    first, last = planner(form, pad, known, columns)
    protected = (*range(first), *range(max(first, info.blocks - last), info.blocks))
    if pad.error:
        say.error(pad.error)
    if not known.run:
        st.info(
            "The blocks of this checkpoint have not been scored. Choose them by hand or with the "
            "control criteria (last, random); bars and other criteria need an importance run."
        )
    toggle_pad(form, pad, known, protected)
with right:
    outcome = st.container()
    asked = cockpit.sizes(form, info)
with outcome:
    fill_in = cockpit.draw(name, pad, known, asked, rows)
keyboard_pad(pad, known)
fill_in()
chosen = known.chosen_by(pad.criterion, pad.removal, first, last)
make_form.draw(name, pad.removal.below(info.blocks), "prune", pad.criterion if chosen else "")
kept_blocks = {
    plan: (removal.units / 2, known.quality(removal))
    for plan, removal in pad.plans.items()
    if removal or plan == pad.active
}
by = prune_view.called(pad.criterion)
st.subheader("Perplexity against blocks removed")
lines = known.lines(pad.criterion, first, last)
if lines:
    widgets.chart(
        charts.curve(lines, kept_blocks, known.dense_ppl),
        key="pad_curve",
        alt=f"Perplexity against blocks removed by {by}, with both plans marked.",
    )
    say.caption(
        "Filled: measured. Hollow and dotted: estimated from single blocks and parts. A part of a "
        f"block counts as half of one. {known.note}"
    )
else:
    st.caption("No perplexity is known yet. Score the blocks by perplexity on the Importance page.")
curve_launcher(pad, known, name, first, last)
comparison(pad, known, name, protected, asked)
creator(pad, known, name, first, last)
export.of_study(name, pad.made)
live_panel.details(name, info, pad, rows)
search_form.draw(name, info, pad, first, last)
budget_form.draw(name, info, pad, first, last)
prune_pad.share(pad)
