"""Presentation: what dropping blocks gains and what it costs, in a minute for stakeholders."""

from __future__ import annotations

import streamlit as st

from core.charts import presentation as charts
from core.compare import headline
from core.compare.scene import Scene
from core.compare.verdict import Contender, Verdict
from core.report import material
from core.report.build import tiles
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


def present(found: Verdict, scene: Scene, sizes: list[Contender]) -> None:
    """Draw the slider, the verdict, the numbers and the chart."""
    take = found.take
    names = {f"{one.ratio:.1%}": one for one in sizes}
    if take:
        names[f"{take.ratio:.1%}"] = take
    first = f"{(take or sizes[0]).ratio:.1%}"
    names = dict(sorted(names.items(), key=lambda pair: pair[1].ratio))
    if len(names) > 1:
        if st.query_params.get("removed") not in names:
            st.query_params.pop("removed", None)
        first = st.select_slider(
            "Parameters removed", list(names), first, key="removed", bind="query-params"
        )
    one = names[first]
    say.bold(found.sentence if one is take else f"{one.label}: {found.facts(one)}.")
    shown = tiles(one)
    for column, (label, (figure, how)) in zip(st.columns(len(shown)), shown.items(), strict=True):
        with column.container(border=True):
            st.metric(plain(label), plain(figure))
            say.caption(how)
    if stops := headline.stops(scene):
        st.plotly_chart(
            charts.payoff(stops, min(stops, key=lambda s: abs(s.ratio - one.ratio))),
            key="payoff",
            config={"displayModeBar": False},
            alt="Speed, memory and perplexity relative to dense, against the parameters removed.",
        )
    say.caption(f"{found.measured_on} Hollow markers are estimates; a star is after retraining.")


frame.start("Presentation")
st.set_page_config(initial_sidebar_state="collapsed")
st.html(LARGE)
name = state.active_checkpoint()
state.inspect(name)
gathered = material.gather(name, state.workspace())
sizes = gathered.verdict.sizes()
if sizes:
    present(gathered.verdict, gathered.scene, sizes)
else:
    nothing_yet()
