"""The Prune page's outcome cards: what the plan being edited leaves, updated with every click."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from core.benchmark import analytic
from core.benchmark.results import known_rates
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.compare import plan as measured
from core.compare.measured import estimate
from core.errors import DepthcutError
from core.prune.known import Known
from core.prune.outlook import Outlook, outlook
from core.runs.dtypes import COMPUTED
from core.study import Study, study
from core.ui import forms, live_panel, prune_cost, prune_pad, say, state
from core.ui.live import Question
from core.ui.live_panel import Live
from core.ui.say import plain
from core.words import parameters, rounded, size

SHOWN = 170
"""Characters of the pruned model's text: two lines and a little."""
UNKNOWN = "unknown"
FIRST_S = 0.3
"""How long the rest of a page waits for the first live figure. Chosen: below what a reader notices
on what is out of view."""


@dataclass(frozen=True)
class Card:
    """One figure of the plan."""

    title: str
    """What it is, and whether it is measured, estimated or computed."""
    value: str
    beside: str
    """What to compare it with: the dense model's."""
    note: str = ""
    """What it was measured on, for the tooltip."""


@dataclass
class Places:
    """Where the live figure stands."""

    card: Any = None
    line: Any = None


@dataclass(frozen=True)
class Facts:
    """What the cards of one plan are made of; all but the live figures."""

    dense: Outlook
    plan: Outlook
    known: Known
    removal: Removal
    study: Study | None
    asked: Mapping[str, Any]
    """Batch, context and dtype."""
    rates: analytic.Rates | None


def sizes(form: forms.Form, info: CheckpointInfo) -> dict[str, Any]:
    """Draw the fields for batch, context and precision; return them."""
    columns = st.columns(3)
    batch = form.number("batch", "Batch", 1, 4096, 1, at=columns[0])
    usual = min(info.context, 4096)
    context = form.number("context", "Context (tokens)", 1, 10_000_000, usual, at=columns[1])
    dtype = form.select("precision", "Precision", COMPUTED, info.compute_dtype, at=columns[2])
    return {"batch": int(batch), "context": int(context), "dtype": dtype}


def facts(name: str, known: Known, pad: prune_pad.Pad, asked: Mapping[str, Any]) -> Facts:
    """Collect what is known of the plan being edited."""
    info, removal = known.info, pad.removal.below(known.info.blocks)
    try:
        found = study(state.workspace(), name)
    except DepthcutError:
        found = None
    return Facts(
        outlook(info, Removal(), **asked),
        outlook(info, removal, **asked),
        known,
        removal,
        found,
        asked,
        known_rates(state.workspace(), prune_cost.device_of(name), asked["dtype"]),
    )


def cards(found: Facts, live: Live) -> list[Card]:
    """Return the plan's figures in the order in which they are shown."""
    dense, plan = found.dense, found.plan
    return [
        Card(
            "Parameters",
            parameters(plan.parameters),
            f"{-plan.ratio:.1%} of {parameters(dense.parameters)}" if plan.ratio else "dense",
            f"{plan.parameters:,} of {dense.parameters:,} parameters, {plan.blocks} blocks.",
        ),
        perplexity(found, live),
        accuracy(found),
        speed(found),
        Card(
            "Weights + cache",
            size(plan.total_bytes),
            f"{size(dense.total_bytes)} dense, computed",
            "Computed from the shapes: weights plus the key/value cache of all sequences at full "
            "context, without activations.",
        ),
        Card(
            "Key/value cache",
            size(plan.kv_bytes),
            f"{size(dense.kv_bytes)} dense, computed",
            f"Batch {found.asked['batch']} at {found.asked['context']:,} tokens.",
        ),
    ]


def perplexity(found: Facts, live: Live) -> Card:
    """Return the one perplexity of the plan: live if there is one, else what the scores tell."""
    best = live.best
    if best and best.ppl and best.dense_ppl:
        return Card(
            "Perplexity, measured",
            times(best.ppl / best.dense_ppl),
            f"{rounded(best.ppl)}, dense {rounded(best.dense_ppl)}",
            line_of(found, live),
        )
    quality = found.known.quality(found.removal)
    base = found.known.dense_ppl
    if quality is None or not base:
        waiting = live.quick and not live.quick.done
        return Card("Perplexity", "…" if waiting else UNKNOWN, "score or measure live")
    return Card(
        f"Perplexity, {quality.kind}",
        times(quality.ppl / base),
        f"{rounded(quality.ppl)}, dense {rounded(base)}",
        line_of(found, live),
    )


def line_of(found: Facts, live: Live) -> str:
    """Return the one line that says which text the perplexity is over, and how much of it."""
    best = live.best
    if best and best.dense_ppl:
        return live_panel.measured_on(best)
    if live.quick and not live.quick.done:
        return f"{(live.quick.waiting or 'measuring live').capitalize()} ..."
    quality = found.known.quality(found.removal)
    if quality is None or not found.known.dense_ppl:
        return ""
    note = found.known.note.removeprefix("Measured: ")
    if quality.kind == "measured":
        return f"Measured on the calibration rows: {note}"
    return f"Estimated from the scores of single blocks ({note.rstrip('.')}); usually too low."


def times(ratio: float) -> str:
    """Return a ratio to the dense model: 1.24 x dense."""
    return f"{ratio:,.0f} x dense" if ratio >= 100 else f"{ratio:.2f} x dense"


def accuracy(found: Facts) -> Card:
    """Return the accuracy on tasks that a variant of this plan has, with the dense model's."""
    known = found.study and measured.accuracy_of(found.study, found.removal)
    if not known:
        return Card("Task accuracy", "not measured", "no tasks evaluated yet")
    count = f"{len(known.tasks)} tasks" if len(known.tasks) > 1 else known.tasks[0]
    questions = f", {known.samples:,} questions" if known.samples else ""
    note = f"Mean over {', '.join(known.tasks)}{questions}."
    if known.value is None:
        return Card("Task accuracy", "not measured", f"{known.dense:.1%} dense, {count}", note)
    beside = f"{known.dense:.1%} dense, {count}" if found.removal else count
    return Card("Accuracy, measured", f"{known.value:.1%}", beside, note)


def speed(found: Facts) -> Card:
    """Return the speed-up over dense: of a benchmark run, else estimated from measured rates."""
    batch, dtype = found.asked["batch"], found.asked["dtype"]
    real = found.study and found.removal and measured.speed_of(
        found.study, found.removal, batch, dtype
    )  # fmt: skip
    if real and real.speed.is_known:
        both = (real.tokens_per_s, real.dense_tokens_per_s)
        return Card(
            "Speed, measured",
            times(real.speed.factor),
            f"{rounded(both[0])}, dense {rounded(both[1])} tokens/s" if all(both) else "",
            f"Measured on {real.device} in {real.dtype}: batch {batch}, {real.input_tokens} tokens "
            f"in, {real.output_tokens} out; {real.speed}.",
        )
    if real and not found.rates:
        return Card("Speed", "unclear", "measured, but too noisy", f"{real.speed}.")
    if not found.rates:
        return Card("Speed", UNKNOWN, "device not measured yet", "Measure this device below.")
    cell = (batch, prune_cost.INPUT, prune_cost.OUTPUT)
    info = found.known.info
    own, base = (
        estimate(analytic.without(info, removal), found.rates, cell, dtype)
        for removal in (found.removal, Removal())
    )
    if not (own.latency_s_mean and base.latency_s_mean):
        return Card("Speed", UNKNOWN, "not estimated for quantized models")
    return Card(
        "Speed, estimated",
        times(base.latency_s_mean / own.latency_s_mean),
        f"{rounded(own.tokens_per_s)}, dense {rounded(base.tokens_per_s)} tokens/s",
        f"Estimated from shapes and this device's measured rates: batch {batch}, {cell[1]} tokens "
        f"in, {cell[2]} out, {dtype}.",
    )


def draw(
    name: str,
    pad: prune_pad.Pad,
    known: Known,
    asked: Mapping[str, Any],
    rows: dict[str, Any] | None,
) -> Callable[[], None]:
    """Draw the cards of the plan being edited; they are redrawn as live answers come.

    What it returns fills in the first live figure if that comes within `FIRST_S`: to be called once
    all that is in view is drawn, and before the rest, which would keep the browser busy meanwhile.
    """
    found = facts(name, known, pad, asked)
    live = live_panel.ask(name, known.info, pad, rows)
    every = live_panel.POLL_S if not live.done else None
    places = Places()
    st.fragment(_cards, run_every=every)(name, pad, found, rows, not live.done, places)

    def fill_in() -> None:
        quick, until = live.quick, time.monotonic() + FIRST_S
        if quick is None or live.best or quick.waiting:
            return
        while not (quick.done or quick.ppl or quick.waiting) and time.monotonic() < until:
            time.sleep(0.01)
            st.session_state.get("live_on")  # here a newer click ends this script
        if quick.ppl:
            now = live_panel.ask(name, known.info, pad, rows)
            _draw_card(places.card, perplexity(found, now))
            places.line.caption(plain(line_of(found, now)))

    return fill_in


def _cards(
    name: str,
    pad: prune_pad.Pad,
    found: Facts,
    rows: dict[str, Any] | None,
    waiting: bool,
    places: Places,
) -> None:
    live = live_panel.ask(name, found.known.info, pad, rows)
    with st.container(
        horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"
    ):
        say.bold(f"Outcome of plan {pad.active}")
        live_panel.switch()
    drawn = cards(found, live)
    for first in range(0, len(drawn), 2):
        for column, card in zip(st.columns(2), drawn[first : first + 2], strict=False):
            place = column.empty()
            _draw_card(place, card)
            if card.title.startswith("Perplexity"):
                places.card = place
    places.line = st.empty()
    places.line.caption(plain(line_of(found, live) or "No perplexity is known yet."))
    live_panel.errors(found.known.info, live)
    _words(live.words, pad)
    if waiting and live.done and state.is_drawn_alone():
        st.rerun()  # so that the table and the curve include the answers


def _draw_card(place: Any, card: Card) -> None:
    place.metric(
        plain(card.title),
        plain(card.value),
        plain(card.beside) or None,
        delta_color="off",
        delta_arrow="off",
        border=True,
        help=plain(card.note) or None,
    )


def _words(words: Question | None, pad: prune_pad.Pad) -> None:
    """Draw what the pruned model writes."""
    with st.container(border=True, key="words"):
        if words is None:
            st.caption(
                "What the pruned model writes appears here once live figures are on."
                if not live_panel.is_on()
                else "The text follows the figures."
            )
            return
        text = words.written.strip()[:SHOWN]
        written = plain(text) or "…"
        st.markdown(f":gray[{plain(words.text['prompt'])}] {written}")
