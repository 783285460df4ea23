"""The Width tab of the Prune page: method and amount, what would remain, and the launch.

Everything shown before the launch is arithmetic on shapes, so it follows every widget change; no
weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
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
from core.ui import chat_note, runs, say, state, text_choice, widgets
from core.ui.say import plain
from core.width import command, methods
from core.width.command import WidthSpec
from core.width.plan import WidthPlan

AMOUNTS = ("ratio", "match", "params")
_LABELS = {"ratio": "The method's ratio", "match": "Match a variant", "params": "Parameters"}
_KEPT = "width_form"
COARSE = 0.01
"""Share of the target above which a deviation is explained."""


def draw(name: str, info: CheckpointInfo) -> None:
    """Draw the form for checkpoint ``name``: options, dry run, command, button and progress."""
    _take_settings()
    st.caption(
        "Width pruning removes attention heads and MLP neurons inside the blocks. It is the "
        "baseline for depth pruning, compared at the same number of parameters."
    )
    values = {"checkpoint": name, **_choices(info, chat_note.applies(name))}
    spec, plan, problem = _checked(values, info)
    if "match" in values and not values["match"]:
        problem = "There is no variant to match yet. Create one under Blocks first, or set a ratio."
    if problem:
        say.error(problem)
    if spec and plan:
        _outlook(spec, plan)
    if spec:
        st.code(jobs.command_line("width", spec), "bash", wrap_lines=True)
    if st.button(
        "Create the narrower variant",
        type="primary",
        icon=":material/width:",
        disabled=bool(problem),
    ):
        record = runs.launch_once("width", values)
        if record:
            st.session_state["width_made"] = record.id
    runs.show(st.session_state.get("width_made", ""))


def _take_settings() -> None:
    """Apply the settings of an earlier run chosen on the Jobs page."""
    taken = state.take_settings("width")
    if not taken:
        return
    amount = next((a for a in AMOUNTS if taken.get(a) is not None), "ratio")
    kept = st.session_state.setdefault(_KEPT, {})
    kept.update({k: v for k, v in taken.items() if v is not None} | {"amount": amount})
    for key in [k for k in st.session_state if str(k).startswith("width_in_")]:
        del st.session_state[key]


def _keep(field: str, default: Any) -> dict[str, Any]:
    """Return ``key`` and ``on_change`` for a widget whose value survives a page change."""
    kept = st.session_state.setdefault(_KEPT, {})
    key = f"width_in_{field}"
    if key not in st.session_state:
        st.session_state[key] = kept.get(field, default)

    def keep() -> None:
        kept[field] = st.session_state[key]

    return {"key": key, "on_change": keep}


def _choices(info: CheckpointInfo, has_template: bool) -> dict[str, Any]:
    """Draw the widgets and return the options they set.

    ``has_template``: the tokenizer has a chat template, which calibration rows can be written with.
    """
    columns = st.columns([1, 1, 1], vertical_alignment="top")
    chosen = columns[0].selectbox(
        "Method",
        methods.NAMES,
        format_func=lambda m: methods.get(m).label,
        help=plain(" ".join(f"{m.label}: {m.about}" for m in methods.METHODS.values())),
        **_keep("method", "llm-pruner"),
    )
    method = methods.get(chosen)
    values: dict[str, Any] = {"method": chosen}
    with columns[1]:
        amount = st.selectbox(
            "How much", AMOUNTS, format_func=_LABELS.__getitem__, **_keep("amount", "ratio")
        )
    with columns[2]:
        values |= _amount(str(amount), info)
    columns = st.columns([1, 1, 1, 1])
    layers = columns[0].text_input(
        "Blocks",
        placeholder="the method's default",
        help="first:end, e.g. 4:30 for blocks 4 to 29. Empty: all but the protected first and last "
        "blocks (LLM-Pruner and the controls) or all blocks (FLAP, Wanda-sp).",
        **_keep("layers", ""),
    )
    values["layers"] = layers.strip() or None
    if chosen == "llm-pruner":
        values["order"] = columns[1].selectbox(
            "Order",
            command.ORDERS,
            help="Order of the Taylor expansion; first is the cheapest.",
            **_keep("order", "first"),
        )
    if method.samples:
        field = _keep("calibration", "auto")
        values["calibration"] = columns[2].text_input("Calibration", help=SOURCE_HELP, **field)
        values["samples"] = columns[3].number_input(
            "Samples",
            1,
            100000,
            placeholder=str(method.samples),
            help=f"Calibration rows. Empty: the paper's {method.samples:d} x {method.length:d} "
            "tokens, or all available rows if fewer.",
            **_keep("samples", None),
        )
        text_choice.offer(field["key"], Path(info.path), then=field["on_change"])
        if has_template:
            columns = st.columns([1, 3], vertical_alignment="bottom")
            values["chat_template"] = columns[0].selectbox(
                "Chat template",
                chat.CHOICES,
                help=plain(chat.HELP),
                **_keep("chat_template", "auto"),
            )
            columns[1].caption(chat_note.CALIBRATION)
    with st.expander("Device, precision and seed"):
        values |= widgets.fields(WidthSpec, ("device", "dtype", "seed"), {})
    return values


def _amount(amount: str, info: CheckpointInfo) -> dict[str, Any]:
    """Draw the widget for one of the three ways to set the amount."""
    if amount == "ratio":
        ratio = st.slider(
            "Ratio",
            0.0,
            0.9,
            step=0.01,
            help="Share of heads and neurons removed from each pruned block; for FLAP, the share "
            "of their parameters over all pruned blocks together.",
            **_keep("ratio", 0.2),
        )
        return {"ratio": ratio}
    if amount == "params":
        start = round(0.8 * info.parameters)
        wanted = st.number_input("Target parameters", 1, step=1000, **_keep("params", start))
        return {"params": int(wanted)}
    variants = {str(r.path): r for r in _variants()}
    key = "width_in_match"
    if not variants:
        st.selectbox("Variant", (), placeholder="none yet: create one under Blocks")
        return {"match": None}
    if st.session_state.get(key) not in (None, *variants):
        del st.session_state[key]
    match = st.selectbox(
        "Variant",
        list(variants),
        format_func=lambda path: _label(variants[path]),
        help="Matches this variant's parameter count as closely as heads and neurons allow.",
        **_keep("match", next(iter(variants))),
    )
    return {"match": match}


def _variants() -> list[RunRecord]:
    made = (*state.workspace().runs("prune"), *state.workspace().runs("width"))
    return [r for r in made if r.state == "done" and r.holds_checkpoint()]


def _label(record: RunRecord) -> str:
    try:
        return f"{record.name} ({state.describe(str(record.path)).parameters:,})"
    except DepthcutError:
        return record.name


def _checked(
    values: dict[str, Any], info: CheckpointInfo
) -> tuple[WidthSpec | None, WidthPlan | None, str]:
    """Return the spec and the plan, or a sentence with what is wrong."""
    spec = None
    try:
        spec = build(WidthSpec, {**values, "out": "DIR"})
        plan, _ = command.make_plan(spec, info, SILENT)
        command.length_of(spec, plan)
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
        st.caption(
            "FLAP distributes the cut over the blocks by its scores: each block gets its own "
            "shape, and the exact number of parameters is known once the scores are computed."
        )
        return
    st.caption(f"The method's own ratio: {plan.ratio:.6g}. Kept in each block:")
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
