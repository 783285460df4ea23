"""What should I ship: the verdict, and its winners as cards."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from core.benchmark.results import known_rates
from core.compare import answers
from core.compare.speed import NOISY
from core.compare.verdict import SEEN, Contender, Figure, Verdict, verdict_of
from core.errors import DepthcutError
from core.study import study
from core.ui import forms, say, state
from core.ui.say import plain
from core.words import rounded


def draw(found: Verdict, choose: Callable[[str], None]) -> None:
    """Draw the verdict and a card for every winner; ``choose`` selects one on the page."""
    if not found.take:
        st.info(
            "Nothing can be said yet: evaluate the dense model and a variant on the study's "
            "evaluation text, and benchmark both."
        )
        return
    (say.success if found.pays else say.info)(found.headline)
    if found.rest:
        say.paragraph(found.rest)
    cards(found, choose)
    say.caption(found.measured_on)


def present(checkpoint: str) -> None:
    """Draw the first sentence of the present verdict on a checkpoint's study, and a link to it.

    Beside the results of a run, which later runs may have overtaken.
    """
    from core.ui import frame  # it needs this module

    where = state.workspace()
    try:
        known = study(where, checkpoint)
    except DepthcutError:
        return
    found = verdict_of(known, forms.kept(checkpoint).settings, rates=known_rates(where))
    if found.headline:
        say.paragraph(f"Verdict on the whole study, with everything measured so far: "
                      f"{found.headline}")  # fmt: skip
        frame.link("compare", "See all on the Compare page")


def cards(found: Verdict, choose: Callable[[str], None]) -> None:
    """Draw the winners, and the best option if their size does not pay, side by side."""
    named: dict[str, tuple[Contender, list[str]]] = {}
    winners = {"quality": found.quality, "speed": found.speed, "memory": found.memory,
               "tasks": found.tasks}  # fmt: skip
    winners |= {} if found.pays else {"best option": found.option}
    for name, one in winners.items():
        if one:
            named.setdefault(one.id, (one, []))[1].append(name)
    for column, (one, why) in zip(st.columns(len(named)), named.values(), strict=True):
        with column.container(border=True, height="stretch"):
            say.bold(one.label)
            with st.container(horizontal=True):
                for name in why:
                    st.badge(plain(name), icon=":material/trophy:")
            say.bullets(lines(found, one))
            st.button(
                "Show it",
                key=f"ship_{one.id}",
                icon=":material/visibility:",
                help="Its plan, its figures, and how to use it.",
                on_click=choose,
                args=(one.id,),
            )


def lines(found: Verdict, one: Contender) -> list[str]:
    """Return a variant's figures, one each line; an estimate says so."""
    said = [f"{one.ratio:.1%} of the parameters removed"]
    if one.ppl:
        said.append(f"perplexity {rounded(one.ppl.value)} ({one.ppl.times or 0:.2f} x dense)")
    if one.answers:
        said.append(f"answers {answers.in_words(one.answers)}")
    if one.written:
        said.append(f"writes the answer to {answers.in_words(one.written)}")
    if one.speed:
        noise = f" ± {one.speed.noise:.0%}" if (one.speed.noise or 0.0) >= SEEN else ""
        noisy = ", too noisy to tell" if (one.speed.noise or 0.0) > NOISY else ""
        said.append(f"speed {one.speed.value:.2f} x dense{noise}{noisy}{_mark(one.speed)}")
    if one.memory and one.memory.times:
        said.append(f"memory {one.memory.times:.0%} of dense{_mark(one.memory)}")
    said += [f"retraining recovered {share.words}" for share in one.shares]
    if any(share.is_adaptation for share in one.shares):
        said.append("part of that is adaptation to the training text")
    return said


def _mark(figure: Figure) -> str:
    return " (estimated)" if figure.how == "estimated" else ""
