"""The Width tab of the Prune page: method and amount, what would remain, and the launch.

Everything shown before the launch is arithmetic on shapes, so it follows every widget change; no
weights are loaded.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from core.checkpoint import chat
from core.checkpoint.headers import CheckpointInfo
from core.data.calibration import SOURCE_HELP
from core.errors import DepthcutError
from core.runs import jobs
from core.runs.devices import MIB
from core.runs.progress import SILENT
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.ui import chat_note, forms, heal_form, memory_note, run_on, runs, say, state
from core.width import command, extent, methods, ways
from core.width.command import WidthSpec
from core.width.plan import WidthPlan

AMOUNTS = ("ratio", "match", "params")
_LABELS = {"ratio": "The method's ratio", "match": "Match a variant", "params": "Parameters"}
COARSE = 0.01
"""Share of the target above which a deviation is explained."""


def draw(name: str, info: CheckpointInfo) -> None:
    """Draw the form for checkpoint ``name``: options, dry run, command, button and progress."""
    st.caption(
        "Width pruning removes attention heads and MLP neurons inside the blocks. It is the "
        "baseline for depth pruning, compared at the same number of parameters."
    )
    values = {
        "checkpoint": name,
        **_choices(forms.Form("width", name), info, chat_note.applies(name)),
    }
    spec, plan, problem = _checked(values, info)
    if "match" in values and not values["match"]:
        problem = "There is no variant to match yet. Create one under Blocks first, or set a ratio."
    if spec and plan:
        problem = problem or memory_note.draw(command.memory_facts(spec, plan))
    if problem:
        say.error(problem)
    if spec and plan:
        _outlook(spec, plan)
    on = run_on.choose("width", name, shared=True)
    if spec and plan and not on:  # rates are those of this machine
        say.caption(runs.expected(*command.duration(spec, plan)))
    if spec:
        st.code(jobs.command_line("width", spec, on), "bash", wrap_lines=True)
    if st.button(
        "Create the narrower variant",
        type="primary",
        icon=":material/width:",
        disabled=bool(problem),
    ):
        record = runs.launch_once("width", values, on)
        if record:
            st.session_state["width_made"] = record.id
    runs.show_all("width", started=[st.session_state.get("width_made", "")])
    heal_form.result(st.session_state.get("width_made", ""))


def _choices(form: forms.Form, info: CheckpointInfo, has_template: bool) -> dict[str, Any]:
    """Draw the widgets and return the options they set.

    ``has_template``: the tokenizer has a chat template, which calibration rows can be written with.
    """
    columns = st.columns([1, 1, 1], vertical_alignment="top")
    chosen = form.select(
        "method",
        "Method",
        methods.NAMES,
        "llm-pruner",
        at=columns[0],
        format_func=lambda m: methods.get(m).label,
        help=" ".join(f"{m.label}: {m.about}" for m in methods.METHODS.values()),
    )
    method = methods.get(chosen)
    values: dict[str, Any] = {"method": chosen}
    target = form.kept.settings.ratio
    usual = "match" if _variants(info) else "ratio"
    usual = usual if target is None else "params"
    asked = next((a for a in AMOUNTS if form.value(a) is not None), usual)
    amount = form.select(
        "amount", "How much", AMOUNTS, asked, at=columns[1], format_func=_LABELS.__getitem__
    )
    with columns[2]:
        values |= _amount(form, str(amount), info, 0.2 if target is None else target)
    columns = st.columns([1, 1, 1, 1])
    layers = form.text(
        "layers",
        "Blocks",
        at=columns[0],
        placeholder="the method's default",
        help="first:end, e.g. 4:30 for blocks 4 to 29, or a list such as 3,5,8-12. Empty: all but "
        "the protected first and last blocks (LLM-Pruner and the controls) or all blocks (FLAP, "
        "Wanda-sp).",
    )
    values["layers"] = layers.strip() or None
    values["parts"] = form.select(
        "parts",
        "What to cut",
        extent.PARTS,
        "both",
        at=columns[1],
        format_func=_PARTS.__getitem__,
        help="Heads belong to the attention, neurons to the MLP. Fewer neurons alone leave the "
        "key/value cache as it is.",
    )
    if method.samples:
        values["calibration"] = form.text(
            "calibration", "Calibration", at=columns[2], help=SOURCE_HELP
        )
        values["samples"] = form.number(
            "samples",
            "Samples",
            1,
            100000,
            at=columns[3],
            placeholder=str(method.samples),
            help=f"Calibration rows. Empty: the paper's {method.samples:d} x {method.length:d} "
            "tokens, or all available rows if fewer.",
        )
        form.offer("calibration")
        if has_template:
            columns = st.columns([1, 3], vertical_alignment="bottom")
            values["chat_template"] = form.select(
                "chat_template",
                "Chat template",
                chat.CHOICES,
                "auto",
                at=columns[0],
                help=chat.HELP,
            )
            columns[1].caption(chat_note.CALIBRATION)
    with st.expander("Variants of the method, blocks of each part, rounding"):
        values |= _variant(form, method, info, str(values["parts"]))
    with st.expander("Device, precision and seed"):
        values |= form.fields(
            WidthSpec, ("device", "dtype", "seed", "memory_limit", *run_on.several())
        )
    values |= _healing(form, bool(method.samples))
    form.origin()
    return values


def _healing(form: forms.Form, has_text: bool) -> dict[str, Any]:
    """Draw the choice of healing and its text; ``has_text``: the method's calibration is drawn."""
    columns = st.columns([1, 1, 1, 1], vertical_alignment="top")
    heal = form.select(
        "heal",
        "Heal",
        command.HEALS,
        "none",
        at=columns[0],
        format_func={"none": "No", "refit": "Refit of the MLPs"}.__getitem__,
        help="Closed form, no training: refits the down projection of every narrower block towards "
        "the dense model's stream behind it. A quarter of the rows is held out; only what lowers "
        "the KL to the dense model there is kept.",
    )
    if heal == "none":
        return {}
    values: dict[str, Any] = {"heal": heal}
    if not has_text:
        values["calibration"] = form.text(
            "calibration", "Calibration", at=columns[1], help=SOURCE_HELP
        )
    at = 1 if has_text else 2
    for column, name, label, low, usual in (
        (columns[at], "heal_samples", "Rows to heal on", 4, command.HEAL_SAMPLES),
        (columns[at + 1], "heal_length", "Tokens per row", 2, command.HEAL_LENGTH),
    ):
        values[name] = form.number(name, label, low, 100000, at=column, placeholder=str(usual))
    return values


_PARTS = {"both": "Heads and neurons", "attention": "Heads only", "mlp": "Neurons only"}
_ORDERS = {
    "first": "First order",
    "second": "Second order",
    "mixed": "First and second order",
    "vector": "Vector (sum of a channel)",
}
_RANKINGS = {"block": "Within each block", "global": "Over all blocks"}
_METRICS = {
    "wifv": "WIFV: fluctuation, weighted",
    "wifn": "WIFN: norm, weighted",
    "ifv": "IFV: fluctuation",
}
_STRUCTURES = {
    "al-am": "AL-AM: all ranked together",
    "al-mm": "AL-MM: heads given, ranked over blocks",
    "ul-mm": "UL-MM: heads given, blocks alike",
    "ul-um": "UL-UM: one ratio, blocks alike",
}
MULTIPLES = (None, 32, 64, 128, 256)
"""Multiples to round widths to that the page offers."""


def _variant(
    form: forms.Form, method: methods.Method, info: CheckpointInfo, parts: str
) -> dict[str, Any]:
    """Draw the options of the method's variants, of blocks for each part, and of rounding."""
    values: dict[str, Any] = {}
    columns = st.columns(3, vertical_alignment="top")
    if method.name == "llm-pruner":
        values["order"] = form.select(
            "order",
            "Taylor expansion",
            ways.ORDERS,
            "first",
            at=columns[0],
            format_func=_ORDERS.__getitem__,
            help="First order is the cheapest. The vector variant sums a channel's first-order "
            "terms before it takes the absolute value; the others sum absolute values.",
        )
    if method.ranks:
        values["ranking"] = form.select(
            "ranking",
            "Ranking",
            ways.RANKINGS,
            "block",
            at=columns[1],
            format_func=_RANKINGS.__getitem__,
            help="Over all blocks, every head and every neuron counts as one unit, the ratio is "
            "the share of all units, and each block gets its own shape.",
        )
    if method.name == "flap":
        values["metric"] = form.select(
            "metric",
            "Metric",
            ways.METRICS,
            "wifv",
            at=columns[0],
            format_func=_METRICS.__getitem__,
            help="Fluctuation: squared deviation of an input from its mean, over the calibration "
            "tokens. WIFV and WIFN weight it, or the norm, with the output projection.",
        )
        values["structure"] = form.select(
            "structure",
            "Structure",
            ways.STRUCTURES,
            "al-am",
            at=columns[1],
            format_func=_STRUCTURES.__getitem__,
            help="Whether the scores decide how much each block and each part loses. Where the "
            "number of heads is given, neurons make up the rest of the ratio.",
        )
        if str(values["structure"]).endswith("-mm"):
            heads = sum(int(shape["kv_heads"]) - 1 for shape in info.block_shapes)
            values["remove_heads"] = form.number(
                "remove_heads",
                "Heads to remove",
                0,
                max(heads, 0),
                info.blocks if heads >= info.blocks else 0,
                at=columns[2],
                help="Over all blocks together. With grouped-query attention a key/value head and "
                "its query heads count as one.",
            )
    columns = st.columns(3, vertical_alignment="top")
    for column, part, label in ((0, "attention", "attention"), (1, "mlp", "MLP")):
        if parts in ("both", part):
            given = form.text(
                f"{part}_layers",
                f"Blocks whose {label} is cut",
                at=columns[column],
                placeholder="as above",
                help="Written as above. Empty: the blocks above.",
            )
            values[f"{part}_layers"] = given.strip() or None
    values["round_to"] = form.select(
        "round_to",
        "Round widths to",
        MULTIPLES,
        None,
        at=columns[2],
        format_func=lambda n: "no rounding" if n is None else f"multiples of {n}",
        help="For tensor cores and quantizers: neurons, and the channels of all heads together, "
        "become a multiple of this, or stay as they are.",
    )
    return values


def _amount(form: forms.Form, amount: str, info: CheckpointInfo, share: float) -> dict[str, Any]:
    """Draw the widget for one of the three ways to set the amount; ``share`` is the usual one."""
    if amount == "ratio":
        ratio = form.slider(
            "ratio",
            "Ratio",
            0.0,
            0.9,
            0.2,
            0.01,
            help="Share of heads and neurons removed from each pruned block; for FLAP, the share "
            "of their parameters over all pruned blocks together (with UL-UM of heads and "
            "neurons); for a ranking over all blocks, the share of all heads and neurons.",
        )
        st.caption(
            "A share of heads and neurons, not of all parameters: match a variant to compare at "
            "one size."
        )
        return {"ratio": ratio}
    if amount == "params":
        start = round((1 - share) * info.parameters)
        wanted = form.number("params", "Target parameters", 1, None, start, step=1000)
        return {"params": int(wanted)}
    variants = {str(r.path): r for r in _variants(info)}
    if not variants:
        st.selectbox("Variant", (), placeholder="none yet: create one under Blocks")
        return {"match": None}
    match = form.select(
        "match",
        "Variant",
        list(variants),
        next(iter(variants)),
        format_func=lambda path: _label(variants[path]),
        help="Matches this variant's parameter count as closely as heads and neurons allow.",
    )
    return {"match": match}


def _variants(info: CheckpointInfo) -> list[RunRecord]:
    """Return the runs that cut a checkpoint of this width and vocabulary, depth first."""
    made = (*state.workspace().runs("prune"), *state.workspace().runs("width"))
    return [r for r in made if r.state == "done" and r.holds_checkpoint() and _is_like(r, info)]


def _is_like(record: RunRecord, info: CheckpointInfo) -> bool:
    try:
        found = state.describe(str(record.path))
    except DepthcutError:
        return False
    smaller = found.parameters < info.parameters
    return smaller and (found.hidden, found.vocab) == (info.hidden, info.vocab)


def _label(record: RunRecord) -> str:
    name = state.names().run(record)
    try:
        return f"{name} ({state.describe(str(record.path)).parameters:,} parameters)"
    except DepthcutError:
        return name


def _checked(
    values: dict[str, Any], info: CheckpointInfo
) -> tuple[WidthSpec | None, WidthPlan | None, str]:
    """Return the spec and the plan, or a sentence with what is wrong."""
    spec = None
    try:
        spec = build(WidthSpec, {**values, "out": "DIR"})
        plan, _ = command.make_plan(spec, info, SILENT)
        command.length_of(spec, plan)
        command.planned_healing(spec, plan)
    except DepthcutError as error:
        return spec, None, str(error)
    return spec, plan, ""


def _outlook(spec: WidthSpec, plan: WidthPlan) -> None:
    """Draw what would remain: parameters, deviation from the target, and the shapes."""
    before, after = plan.info.parameters, plan.parameters
    columns = st.columns(3)
    estimated = plan.kind == "estimated"
    columns[0].metric(
        "Parameters left (estimated)" if estimated else "Parameters left",
        f"{after:,}",
        f"{after / before - 1:.1%}",
        delta_color="off",
    )
    if plan.target is not None:
        off = after - plan.target
        columns[1].metric("Target", f"{plan.target:,}")
        columns[2].metric(
            "Off by",
            "known once scored" if estimated else f"{off:+,}",
            None if estimated else f"{off / plan.target:+.3%}",
            delta_color="off",
        )
        if not estimated and abs(off) > COARSE * plan.target:
            st.caption(
                "This is the closest achievable size, because one head is removed from every "
                "pruned block at once. A different block range, FLAP or Wanda-sp may get closer."
            )
    else:
        columns[1].metric("Weights", f"{after * _width(plan):,.1f} MiB")
    if plan.counts is None:
        say.caption(
            f"{plan.method.label} distributes the cut over the blocks by its scores: each block "
            "gets its own shape, and the exact number of parameters is known once the scores are "
            "computed."
        )
        return
    st.caption(f"The method's own ratio is {plan.ratio:.6g}. What each block keeps:")
    say.table(pd.DataFrame(_shapes(plan)).set_index("blocks"))


def _width(plan: WidthPlan) -> float:
    """Return MiB per parameter."""
    return plan.info.memory_bytes.get(plan.info.dtype, plan.info.memory_bytes["float32"]) / (
        plan.info.parameters * MIB
    )


def _shapes(plan: WidthPlan) -> list[dict[str, str]]:
    """Return one row for every range of consecutive blocks with the same shape."""
    rows: list[dict[str, Any]] = []
    for shape, unit in zip(command.shapes(plan, plan.counts), plan.units, strict=True):
        kept = {
            "heads": f"{shape['heads']} of {unit.groups * unit.queries}",
            "key/value heads": f"{shape['kv_heads']} of {unit.groups}",
            "neurons": f"{shape['neurons']:,} of {unit.neurons:,}",
        }
        if rows and {k: rows[-1][k] for k in kept} == kept:
            rows[-1]["last"] = unit.block
        else:
            rows.append({"first": unit.block, "last": unit.block, **kept})
    return [
        {
            "blocks": f"{r['first']}"
            if r["first"] == r["last"]
            else f"{r['first']} to {r['last']}",
            **{k: v for k, v in r.items() if k not in ("first", "last")},
        }
        for r in rows
    ]
