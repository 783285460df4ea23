"""Where a form's run goes: this machine, or a place of ``places.yaml``."""

from __future__ import annotations

from typing import Any

import streamlit as st

from core.errors import DepthcutError
from core.places import place as place_file
from core.places.place import HERE, Place
from core.runs import devices
from core.ui import forms, say, state

GPUS = "Empty: as the place is described, and at least one for each process of the run."
NODES = "The processes of the run are spread evenly over them, and so are the GPUs."


def places() -> dict[str, Place]:
    """Return the places of this workspace; none if their file cannot be read."""
    try:
        return place_file.read(state.workspace().root)
    except DepthcutError:
        return {}


def several() -> tuple[str, ...]:
    """Return the name of the field of processes where a run could use several GPUs, else nothing.

    That is on a machine with more than one, and if there are places, which may have them.
    """
    known = devices.gpu_names()
    return ("processes",) if known is None or len(known) > 1 or places() else ()


def choose(what: str, checkpoint: str, *, shared: bool = False) -> dict[str, Any]:
    """Draw where the run of a form goes and return what is asked of the place.

    Nothing is drawn, and nothing asked, if this machine is the only place. ``what`` names the form;
    each form of a study keeps its own choice. ``shared`` says that several processes can share it.
    """
    known = places()
    if not known:
        return {}
    form = forms.Form(f"{what} on", checkpoint, {})
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = form.select(
            "place",
            "Run on",
            [HERE, *known],
            HERE,
            width=220,
            help="Other machines and clusters are described on the home page. What the run reads "
            "is copied there once, and its results are copied back.",
        )
        if name == HERE or name not in known:
            return {}
        place = known[name]
        asked: dict[str, Any] = {"place": name}
        if place.is_slurm:
            asked |= _job(form, place, shared)
        else:
            say.caption(place.text)
    st.caption("Times and memory estimated on this page are those of this machine.")
    return asked


def _job(form: forms.Form, place: Place, shared: bool) -> dict[str, Any]:
    """Draw what a job asks SLURM for; empty fields leave it to the place."""
    usual: dict[str, Any] = {"placeholder": "default", "width": 160}
    found: dict[str, Any] = {
        "gpus": form.number("gpus", "GPUs", 1, 4096, **usual, help=GPUS),
        **(
            {"nodes": form.number("nodes", "Nodes", 1, 4096, **usual, help=NODES)} if shared else {}
        ),
        "time": form.text("time", "Time limit", help="Such as 04:00:00.", **usual).strip(),
    }
    asked = {key: value for key, value in found.items() if value}
    try:
        place.with_ask(asked)
    except DepthcutError as error:
        say.error(str(error))
    return asked
