"""Presentation: what dropping blocks gains and what it costs, in a minute for stakeholders."""

from __future__ import annotations

import streamlit as st

from core.charts import presentation as charts
from core.compare import headline
from core.compare.scene import Scene
from core.report import material
from core.report.build import sentence, tiles
from core.ui import frame, say, state
from core.ui.say import plain

LARGE = """<style>
[data-testid="stMainBlockContainer"] { padding-top: 4.5rem; }
[data-testid="stMain"] h1 { font-size: 1.3rem; padding: 0; }
[data-testid="stMain"] p { font-size: 1.45rem; line-height: 1.4; }
[data-testid="stMain"] [data-testid="stCaptionContainer"] p { font-size: 1.05rem; }
[data-testid="stMetricValue"], [data-testid="stMetricValue"] p { font-size: 3.2rem; }
[data-testid="stSlider"] label { margin-bottom: 1.2rem; }
[data-testid="stSliderThumbValue"] { font-size: 1.4rem; }
</style>"""
"""Type large enough to read from the back of a room."""


def nothing_yet() -> None:
    """Draw the commands that produce something to present."""
    st.info(
        "There is nothing to present yet. Run the recipe depth-vs-width (or drop-one) on this "
        "checkpoint: it drops blocks, evaluates the result and measures speed and memory."
    )
    for recipe in ("drop-one", "depth-vs-width"):
        st.code(f"python -m core recipe {recipe} {name} --out {state.workspace().root / recipe}")
    frame.link("compare", "Or measure variants on the Compare page")


def present(scene: Scene, stops: list[headline.Stop]) -> None:
    """Draw the slider, the headline, the numbers and the chart."""
    names = {s.name: s for s in stops}
    first = headline.start(stops)
    if len(names) > 1:
        if st.query_params.get("removed") not in names:
            st.query_params.pop("removed", None)
        chosen = st.select_slider(
            "Parameters removed", list(names), first.name, key="removed", bind="query-params"
        )
        first = names[chosen]
    say.bold(sentence(first))
    shown = tiles(first)
    for column, (label, (figure, how)) in zip(st.columns(len(shown)), shown.items(), strict=True):
        with column.container(border=True):
            st.metric(plain(label), plain(figure))
            say.caption(how)
    st.plotly_chart(
        charts.payoff(stops, first),
        key="payoff",
        config={"displayModeBar": False},
        alt="Speed, memory and perplexity relative to dense, against the parameters removed.",
    )
    say.caption(note(scene))


def note(scene: Scene) -> str:
    """Return what the figures were measured on, and what the markers mean."""
    batch, given, made = headline.cell_of(scene)
    text = f"All figures are relative to the dense model, {scene.study.dense.label}."
    if scene.protocol:
        text += f" Perplexity (lower is better) measured: {scene.protocol.label}."
    text += f" Speed and memory at batch {batch}, {given} tokens in, {made} out"
    if scene.runs:
        summary = scene.runs[0].summary
        text += f", on {summary.device} ({summary.device_name})"
    return text + ". Hollow markers are estimates; a star is after retraining."


frame.start("Presentation")
st.set_page_config(initial_sidebar_state="collapsed")
st.html(LARGE)
name = state.active_checkpoint()
state.inspect(name)
gathered = material.gather(name, state.workspace())
seen = headline.widest(gathered.study, gathered.scene.runs)
sizes = headline.stops(seen)
if sizes:
    present(seen, sizes)
else:
    nothing_yet()
