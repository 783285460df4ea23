"""What every command takes on a GPU, as tables on the Checkpoint page; arithmetic on shapes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core.checkpoint.headers import CheckpointInfo, read_config
from core.errors import DepthcutError
from core.estimate.command import EstimateSpec
from core.estimate.machines import BANDWIDTH_SHARE, DISK_BYTES_PER_S, GB, MACHINES, MATMUL_SHARE
from core.estimate.shapes import SHAPES, opened
from core.estimate.table import GROUPS, LeftOut, Row, Table
from core.runs import footprint, jobs
from core.ui import say
from core.ui.say import plain
from core.words import size

_WAYS = {
    footprint.FITS: "fits",
    footprint.WHOLE: "fits",
    footprint.STREAMS: "streams",
    footprint.CANNOT: "does not fit",
    footprint.NO_MEMORY: "does not fit",
    footprint.FILES: "on the CPU",
}
OWN = "this checkpoint"
_STYLE = """<style>
.st-key-estimate_rows td, .st-key-estimate_rows td * { white-space: nowrap !important; }
.st-key-estimate_rows td:first-of-type { min-width: 11rem; }
.st-key-estimate_rows td:first-of-type, .st-key-estimate_rows td:first-of-type * {
  white-space: normal !important;
}
</style>"""
"""Figures stay on one line; what is computed may wrap, but not at every word on a telephone."""


def draw(name: str, info: CheckpointInfo) -> None:
    """Draw the choice of model and device, the tables and the command."""
    with st.expander("What each command takes on a GPU", icon=":material/calculate:"):
        left, middle, right = st.columns((2, 2, 1))
        shape = left.selectbox(
            "Model",
            (OWN, *SHAPES),
            format_func=lambda one: one if one == OWN else f"LLaMA 3.1 {one.upper()}",
            key="estimate_model",
        )
        device = middle.selectbox(
            "GPU", list(MACHINES), format_func=lambda one: MACHINES[one].label, key="estimate_on"
        )
        processes = int(
            right.number_input(
                "Processes", 1, 64, 1, key="estimate_processes",
                help="Of the commands that can share their work (--processes), each with such a "
                "GPU. Memory and bytes are those of one process.",
            )
        )  # fmt: skip
        known = (info.path, info.key, info.parameters) if shape == OWN else (shape, "", 0)
        rows, left_out = _rows(known, info, device, processes)
        _summary(rows)
        st.html(_STYLE)
        with st.container(key="estimate_rows"):
            for group in GROUPS:
                some = [_cells(row) for row in rows if row.group == group]
                if some:
                    say.bold(group)
                    say.table(pd.DataFrame(some).set_index("command"))
        for one in left_out:
            say.caption(f"Left out: {one.command}, {one.what}. {one.why}")
        say.caption(
            f"Estimated, not measured: operations at {MATMUL_SHARE:.0%} of the GPU's peak (of "
            "healing's regressions, of its peak in float64), weights "
            f"at {BANDWIDTH_SHARE:.0%} of its bandwidth, {DISK_BYTES_PER_S / GB:.0f} GB/s from and "
            "to the disk. Commands at their defaults; time includes reading the checkpoint. "
            f"On the CPU, one core converts {footprint.CONVERTED_PER_S / 1e6:.0f} million weights "
            "a second. Processes read the same files, which come from the disk once. "
            f"Streams: the weights are read from the disk while it computes. Cards: of {_cards()}."
        )
        spec = EstimateSpec(config=name if shape == OWN else shape, on=device, processes=processes)
        st.code(jobs.command_line("estimate", spec), "bash", wrap_lines=True)


@st.cache_data(max_entries=20, show_spinner="Estimating")
def _rows(
    known: tuple[str, str, int], _info: CheckpointInfo, device: str, processes: int
) -> tuple[list[Row], list[LeftOut]]:
    """Return the rows, and what the model cannot have; ``known`` tells models apart."""
    info: CheckpointInfo = _info
    config: Mapping[str, Any] = {}
    if known[0] in SHAPES:
        info, config = opened(known[0])
    else:
        with contextlib.suppress(DepthcutError):  # the rows that need it are left out
            config = read_config(Path(info.path) / "config.json")
    made = Table(info, MACHINES[device], config=config, processes=processes)
    return made.rows(), made.left_out


def _summary(rows: Sequence[Row]) -> None:
    """Draw how many computations run on the GPU, and how."""
    found = Counter(_WAYS[row.way] for row in rows if row.way != footprint.FILES)
    total, tiles = sum(found.values()), st.columns(3)
    labels = {"fits": "Fit in its memory", "streams": "Stream from the disk"}
    for tile, (way, label) in zip(
        tiles, (*labels.items(), ("does not fit", "Need more memory")), strict=True
    ):
        tile.metric(plain(label), plain(f"{found[way]} of {total}"), border=True)


def _cells(row: Row) -> dict[str, str]:
    shared = f" ({row.processes} processes)" if row.processes > 1 else ""
    return {
        "command": row.command,
        "what": row.what + shared,
        "memory": size(row.memory_bytes),
        "how": _WAYS[row.way],
        "cards": _on_cards(row),
        "disk": size(row.read_bytes + row.written_bytes),
        "time": "-" if row.seconds is None else _time(row.seconds),
        "bound by": "-" if row.seconds is None else _bound(row),
    }


def _on_cards(row: Row) -> str:
    """Return on how many of the cards it runs, and how."""
    if row.way == footprint.FILES:
        return "-"
    found = Counter(_WAYS[way] for way in row.ways.values())
    fits, streams = found["fits"], found["streams"]
    parts = [f"{fits} fit" * bool(fits), f"{streams} stream" * bool(streams)]
    return ", ".join(part for part in parts if part) or "none"


def _cards() -> str:
    names = [machine.label.partition(",")[0] for machine in MACHINES.values()]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{seconds:,.{1 if seconds < 10 else 0}f} s"


def _bound(row: Row) -> str:
    """Return what takes most of the time."""
    computes = "CPU" if row.way == footprint.FILES else "arithmetic"
    parts = {computes: row.compute_s, "memory": row.device_s, "disk": row.disk_s}
    return max(parts, key=lambda name: parts[name])
