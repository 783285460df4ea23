"""What a recipe will take, told before its launch from what it took the last time."""

from __future__ import annotations

import streamlit as st

from core import words
from core.errors import DepthcutError
from core.recipes import earlier
from core.recipes.spec import RecipeSpec
from core.ui import say, state


def draw(spec: RecipeSpec) -> None:
    """Draw one line: how long this recipe took, and what it may take on this checkpoint."""
    try:
        parameters = state.describe(spec.checkpoint).parameters
    except DepthcutError:
        return
    found = earlier.nearest(spec, parameters)
    if found is None:
        st.caption("Time: unknown until this recipe has finished on this device.")
        return
    name = str(found.record.spec.get("checkpoint"))
    options = "" if found.is_same_work else ", with other options,"
    least = "" if found.is_whole else "at least "
    took = (
        f"The last run of this recipe{options} took {least}{words.duration(found.seconds)} on "
        f"{state.names().checkpoint(name, found.record.cwd)}"
    )
    if found.is_same_size:
        say.caption(f"{took}.")
    elif found.scaled is None:
        say.caption(f"Time: unknown for a model of this size. {took}.")
    else:
        about = least or "about "
        say.caption(
            f"Estimated time: {about}{words.duration(found.scaled)}. {took}; scaled by parameters."
        )
