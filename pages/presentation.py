"""Presentation: what dropping blocks gains and what it costs, in a minute for stakeholders."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from core.charts import presentation as charts
from core.charts.checkpoint import kept_bars
from core.charts.prune import block_strip
from core.compare import chosen, headline
from core.compare.answers import examples
from core.compare.verdict import Contender, Verdict
from core.report import material
from core.report.build import PERPLEXITY, beside, tiles
from core.runs.workspace import RunRecord
from core.study import info_of
from core.ui import frame, say, state, widgets
from core.ui.say import plain
from core.words import rounded

MOST_TASKS = 8
"""Tasks whose answers are counted on the page."""
SINGLE = 3
"""Up to this many lines stand in one column."""
LARGE = """<style>
[data-testid="stMainBlockContainer"] { padding-top: 4.5rem; }
[data-testid="stMain"] h1 { font-size: 2.4rem; padding: 0 0 .6rem; }
[data-testid="stMain"] :is(p, li) { font-size: 1.4rem; line-height: 1.4; }
[data-testid="stMain"] .st-key-answer p { font-size: 1.7rem; }
[data-testid="stMain"] :is(th, td), [data-testid="stMain"] :is(th, td) p { font-size: 1.15rem; }
[data-testid="stMain"] [data-testid="stCaptionContainer"] p { font-size: 1.05rem; }
[data-testid="stMetricValue"], [data-testid="stMetricValue"] p { font-size: 3rem; }
[data-testid="stMain"] [data-testid="stMetric"],
[data-testid="stMain"] [data-testid="stMetric"] > div { padding: 0; }
[data-testid="stSlider"] label { margin-bottom: 1.2rem; }
[data-testid="stSliderThumbValue"] { font-size: 1.4rem; }
</style>"""
"""Type large enough to read from the back of a room."""


def nothing_yet() -> None:
    """Draw how to get something to present."""
    st.info(
        "There is nothing to present yet: no variant of this checkpoint has been made and measured."
    )
    frame.step("prune", "Make one and measure it")
    frame.link("compare", "Or measure variants on the Compare page")


def chosen_size(found: Verdict, sizes: list[Contender]) -> Contender:
    """Draw the slider of sizes; it starts at the variant to take, or the best option instead."""
    first = found.take or sizes[0]
    if not found.pays and found.option:
        first = found.option
    names = {f"{one.ratio:.1%}": one for one in (*sizes, first)}
    names = dict(sorted(names.items(), key=lambda pair: pair[1].ratio))
    start = f"{first.ratio:.1%}"
    if len(names) > 1:
        if st.query_params.get("removed") not in names:
            st.query_params.pop("removed", None)
        start = st.select_slider(
            "Parameters removed", list(names), start, key="removed", bind="query-params"
        )
    return names[start]


def figures(one: Contender) -> None:
    """Draw the large figures."""
    shown = tiles(one)
    for column, (label, (figure, how)) in zip(st.columns(len(shown)), shown.items(), strict=True):
        with column.container(border=True, height="stretch", gap=None):
            st.metric(plain(label), plain(figure))
            say.caption(how)


def removed(found: Verdict, one: Contender) -> None:
    """Draw what was removed: crossed-out blocks, or the size of what is left of each."""
    dense, own = info_of(found.study.dense), info_of(one.candidate)
    if one.candidate.kind == "depth" and dense:
        gone = len(one.candidate.dropped)
        parts = len(one.candidate.removal.parts)
        more = f" and {parts} parts of others" if parts else ""
        say.paragraph(f"What was removed: {gone} of {dense.blocks} blocks{more}.")
        strip = block_strip(dense.blocks, {"A": one.candidate.removal}, height=130, named=False)
        widgets.chart(strip, key="removed_blocks", alt="Blocks kept, and crossed out: removed.")
    elif dense and own and own.blocks == dense.blocks:
        say.paragraph(
            "What was removed: attention heads and MLP neurons inside the blocks; all "
            f"{own.blocks} blocks stay."
        )
        figure = kept_bars(dense, own)
        widgets.chart(figure, key="removed_parts", alt="The share left of each block.")


def origin(found: Verdict, one: Contender, runs: Sequence[RunRecord]) -> None:
    """Draw how the set was chosen, and the best known set of its size if that is another one."""
    if said := chosen.how(found, one, runs):
        say.paragraph(said)
    if known := chosen.better(found, one, runs):
        say.info(known.sentence)
        gone = known.row.removal
        lists = {"drop": gone.drop, "attention": gone.attention, "mlp": gone.mlp}
        query = {where: ",".join(map(str, blocks)) for where, blocks in lists.items() if blocks}
        query |= {"model": name, "criterion": known.row.method}
        frame.step("prune", "Make it on the Prune page", query)


def questions(found: Verdict, one: Contender) -> None:
    """Draw in plain words what it answers, and one or two questions with both answers."""
    if not (one.answers or one.written):
        return
    st.subheader("What it still knows")
    said = [f"Answers {answers.sentence}." for answers in one.answers[:MOST_TASKS]]
    said += [f"Writes the answer to {answers.sentence}." for answers in one.written[:MOST_TASKS]]
    if len(said) <= SINGLE:
        say.bullets(said)
    else:
        half = -(-len(said) // 2)
        for lines, column in zip((said[:half], said[half:]), st.columns(2), strict=True):
            with column:
                say.bullets(lines)
    for example in examples(found.study, one.answers or one.written):
        with st.container(border=True):
            say.caption(f"One of the {example.words}")
            say.paragraph(asked(example.question))
            columns = st.columns(2)
            for column, name, answer, right in (
                (columns[0], "Before", example.before, example.was_right),
                (columns[1], one.label, example.after, example.is_right),
            ):
                with column:
                    say.caption(name)
                    mark = ":green[:material/check_circle:]" if right else ":red[:material/cancel:]"
                    verdict = "right" if right else f"wrong; right is: {example.right}"
                    st.markdown(f"{mark} **{plain(answer)}** ({plain(verdict)})")


def asked(question: str) -> str:
    """Return a task's question as a person would ask it, without the words around it."""
    return question.strip().removeprefix("Question:").removesuffix("Answer:").strip()


def present(gathered: material.Material, sizes: list[Contender]) -> None:
    """Draw the verdict, then what stands behind it."""
    found = gathered.verdict
    one = chosen_size(found, sizes)
    is_verdict = one is found.take or (not found.pays and one is found.option)
    with st.container(key="answer"):
        say.bold(found.short if is_verdict else f"{one.label}: {found.facts(one)}.")
    figures(one)
    if one.ppl:
        say.caption(PERPLEXITY)
    if is_verdict:
        say.paragraph(found.rest)
    removed(found, one)
    origin(found, one, gathered.runs)
    questions(found, one)
    st.subheader("Beside the dense model, and others of its size")
    say.table(pd.DataFrame(beside(found, one)).set_index(""))
    before = found.before(one)
    if before and before.ppl and one.ppl and found.dense.ppl:
        say.paragraph(
            f"Retraining brought the perplexity from {rounded(before.ppl.value)} to "
            f"{rounded(one.ppl.value)}; the dense model has {rounded(found.dense.ppl.value)}."
        )
    if one.recovery and not is_verdict:  # else it stands above, with the verdict
        say.paragraph(one.recovery)
    stops = headline.stops(gathered.scene)
    if len(stops) > 1:
        st.subheader("More or fewer blocks removed, without retraining")
        st.plotly_chart(
            charts.payoff(stops, min(stops, key=lambda s: abs(s.ratio - one.ratio))),
            key="payoff",
            config={"displayModeBar": False},
            alt="Speed, memory and perplexity relative to dense, against the parameters removed.",
        )
        say.caption("Hollow markers are estimates; a star is after retraining.")
    say.caption(found.measured_on)


frame.start("Presentation", dense=True)
st.set_page_config(initial_sidebar_state="collapsed")
st.html(LARGE)
name = state.current_checkpoint()
about = state.names().checkpoint(name) if name else ""
st.title(f"Does pruning pay for {plain(about)}?" if about else "Presentation")
name = state.active_checkpoint()
state.inspect(name)
gathered = material.gather(name, state.workspace())
sizes = gathered.verdict.sizes()
if sizes:
    present(gathered, sizes)
else:
    nothing_yet()
