"""Home page: what Depthcut is, which checkpoint is active, and what to do next."""

from __future__ import annotations

import streamlit as st

from core.prune import known
from core.study import lineage
from core.ui import doctor, frame, places_form, recipes, state, study_form
from core.ui.say import plain
from core.words import parameters, size

frame.start("Home")
st.title("Depthcut")
st.markdown(
    "A language model is a stack of identically built blocks, and some of them hardly matter.  \n"
    "Depthcut measures what each block is worth, drops the ones you choose, and writes a smaller "
    "checkpoint that any tool can load.  \n"
    "Blocks run one after another, so every block dropped makes generation faster, even for a "
    "single user."
)

name = state.current_checkpoint()
if not name:
    st.subheader("Start here")
    state.picker()
    doctor.panel()
    places_form.panel()
    st.stop()

info = state.inspect(name)
state.warnings(info)
done = [r for r in state.workspace().runs() if r.state == "done"]
scored = known.scored_runs(state.workspace(), info)
pruned = lineage.made_from(done, name)

st.subheader("Active checkpoint")
tiles = st.columns(4)
short = plain(name.rstrip("/").rsplit("/", 1)[-1])
tiles[0].metric("Checkpoint", short, border=True, help=plain(name))
tiles[1].metric("Blocks", f"{info.blocks:d}", border=True)
tiles[2].metric(
    "Parameters", parameters(info.parameters, exact=True), border=True, help=f"{info.parameters:,}"
)
weights = size(info.stored_bytes)
tiles[3].metric(f"Weights, {plain(info.dtype)}", weights, border=True)

study_form.panel(name)

st.subheader("Next step")
if not info.has_weights:
    st.markdown(
        "There are no weights here, so nothing can be measured. See what each step would take on a "
        "GPU, or choose blocks by hand and see what is left."
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        frame.step("checkpoint", "See what each step takes")
        frame.link("prune", "Choose blocks to drop")
elif not scored:
    st.markdown("Measure what every block is worth. This takes seconds on a small model.")
    frame.step("importance", "Score the blocks")
elif not pruned:
    st.markdown("The blocks are scored. Choose which ones to drop and see what that costs.")
    frame.step("prune", "Choose blocks to drop")
else:
    st.markdown(
        f"{len(pruned):d} pruned {'variant' if len(pruned) == 1 else 'variants'} so far; "
        f"the latest is **{plain(state.names().run(pruned[0]))}**. See which one is worth shipping."
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        frame.step("compare", "Compare the variants")
        frame.link("retrain", "Retrain one")
        frame.link("evaluate", "Evaluate one")
        frame.link("presentation", "Present the result")
        frame.link("prune", "Try another cut")

st.subheader("Recipes")
st.caption("Each recipe is a chain of runs on the active checkpoint that ends in one verdict.")
recipes.cards(name)

with st.expander("Another checkpoint"):
    state.picker()

doctor.panel()
places_form.panel()
