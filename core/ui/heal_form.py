"""The Heal choice of the Prune page: how the seams of a cut are repaired, and what that gained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from core import words
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.heal import command, seams
from core.heal.command import PruneSpec
from core.prune.results import Healing, Pruning
from core.runs.spec import build
from core.runs.workspace import read_run
from core.ui import forms, memory_note, say, state
from core.ui.say import plain
from core.words import rounded

ABOUT = {
    "none": "Copies the kept weights unchanged; needs no device.",
    "refit": "Refits the projection before each seam, or of a narrower MLP, by least squares.",
    "linear": "Folds one linear map into that projection (ReplaceMe).",
    "scale": "Corrects the size of the stream after each seam (Prune&Comp).",
    "auto": "Tries all three and keeps the one with the lowest held-out KL.",
}
"""What each choice does, in one line."""


def choose(name: str) -> dict[str, Any]:
    """Draw the choice and, unless it is none, the text to heal on; return the options set."""
    form = forms.Form("prune", name)
    heal = form.radio(
        "heal",
        "Heal the seams",
        seams.CHOICES,
        "none",
        captions=[ABOUT[choice] for choice in seams.CHOICES],
        help="Closed form, no training. A quarter of the rows is held out; only what lowers the KL "
        "to the dense model there is kept.",
    )
    if heal == "none":
        return {}
    values: dict[str, Any] = {"heal": heal}
    values |= form.fields(PruneSpec, ("calibration", "samples", "length", "seed"))
    form.offer("calibration")
    with st.expander("Short rows, device and precision"):
        values |= form.fields(PruneSpec, ("join", "device", "dtype", "memory_limit"))
    form.origin()
    return values


def problem_of(values: dict[str, Any], info: CheckpointInfo) -> str:
    """Return why these options cannot heal the cut, with the command's own message, else empty.

    Draws which seams would be healed on how much text.
    """
    if values.get("heal", "none") == "none":
        return ""
    try:
        spec = build(PruneSpec, {**values, "out": "DIR"})
        found = command.check_healing(spec, info, command.named(spec))
    except DepthcutError as error:
        return str(error)
    partial = command.named(spec).partial
    names = "; ".join(
        s.removed if partial else words.block_ranges(range(s.first, s.end)) for s in found
    )
    rows, length = spec.samples or command.SAMPLES, command.length_of(spec, info)
    seam = "Seam" if len(found) == 1 else "Seams"
    say.caption(
        f"{seam} at {'' if partial else 'blocks '}{names}, healed on {rows} rows of {length} "
        "tokens, a quarter of them held out."
    )
    return ""


def memory_problem(spec: PruneSpec, info: CheckpointInfo) -> str:
    """Draw a line if healing streams the model, and return what is wrong if it cannot run."""
    if spec.heal == "none":
        return ""
    return memory_note.draw(command.planned_capacity(spec, info, command.named(spec)).needs())


def result(run_id: str) -> None:
    """Draw what healing gained in a finished run; nothing if it was not asked for."""
    record = read_run(state.workspace().root / run_id) if run_id else None
    if record and record.state == "done":
        of_folder(record.path)


def of_folder(folder: Path | None) -> None:
    """Draw what healing gained for the checkpoint in ``folder``; nothing if it was not healed."""
    cut = Pruning.read(folder) if folder else None
    if cut and cut.healing:
        gain(cut.healing)


def gain(healing: Healing) -> None:
    """Draw KL and perplexity plain and healed, and what was kept."""
    with st.container(border=True):
        if healing.method == "none":
            say.bold(f"Healing by {healing.asked}: no repair lowered the KL; none was kept.")
        else:
            say.bold(f"Healed by {healing.method}.")
        columns = st.columns(2)
        _pair(columns[0], "KL to the dense model", healing.kl_before, healing.kl_after, 0.0)
        _pair(
            columns[1],
            "Perplexity",
            healing.perplexity("before"),
            healing.perplexity("after"),
            healing.perplexity("dense"),
        )
        tried = ", ".join(f"{name} {kl:.4f}" for name, kl in healing.tried.items())
        if len(healing.tried) > 1:
            say.caption(f"KL after each method: {tried} nats per token.")
        say.caption(
            f"{healing.measured_on} These tokens also chose what was kept, so the gain is slightly "
            "optimistic; evaluate the variant for text that took no part."
        )


def _pair(
    column: Any, title: str, before: float | None, after: float | None, dense: float | None
) -> None:
    if before is None or after is None:
        return
    whole = f"; dense {rounded(dense)}" if dense else ""
    change = f" ({after / before - 1:+.1%})" if before else ""
    was = f"plain {rounded(before)}{change}{whole}"
    column.metric(
        plain(f"{title}, healed"), plain(rounded(after)), plain(was),
        delta_color="off", delta_arrow="off",
    )  # fmt: skip
