"""Dry runs that take a while: asked in a process of their own, and drawn once they have ended."""

from __future__ import annotations

from typing import Any

import streamlit as st

from core.runs import dry_run
from core.runs.spec import Spec
from core.ui import say, state


def plan(command: str, spec: Spec, waiting: str) -> tuple[dict[str, Any] | None, str]:
    """Return the result of a command's dry run, and what prevents a launch, if anything.

    Until it is there, ``waiting`` is drawn instead, and the page redrawn at its end; an error is
    drawn too. In both cases the result is None.
    """
    answer = _ask(command, spec)
    if not answer.poll():
        _pending(command, spec, waiting)
        return None, ""
    if answer.plan is None:
        say.error(answer.error)
    return answer.plan, answer.error


def _ask(command: str, spec: Spec) -> dry_run.DryRun:
    known: dict[str, dry_run.DryRun] = st.session_state.setdefault(f"{command}_dry", {})
    return dry_run.ask(known, command, spec, state.workspace())


@st.fragment(run_every=0.5)
def _pending(command: str, spec: Spec, waiting: str) -> None:
    """Poll the dry run until it has a result, then redraw the page."""
    if state.is_drawn_alone() and _ask(command, spec).poll():
        st.rerun()  # never while the page is drawn, which may be for a click further down
    say.info(waiting, icon=":material/hourglass_top:")
