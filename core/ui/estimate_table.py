"""What every command takes on a GPU, as a table on the Checkpoint page; arithmetic on shapes."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from core.checkpoint.headers import CheckpointInfo
from core.estimate.command import EstimateSpec
from core.estimate.machines import BANDWIDTH_SHARE, DISK_BYTES_PER_S, GB, MACHINES, MATMUL_SHARE
from core.estimate.shapes import SHAPES, info_of
from core.estimate.table import Row, Table
from core.runs import jobs
from core.ui import say
from core.words import size

_WAYS = {
    "fits": "fits",
    "whole": "fits",
    "streams": "streams from the disk",
    "cannot": "too little memory",
    "no memory": "too little memory",
}
OWN = "this checkpoint"


def draw(name: str, info: CheckpointInfo) -> None:
    """Draw the choice of model and device, the table and the command."""
    with st.expander("What each command takes on a GPU", icon=":material/calculate:"):
        left, right = st.columns(2)
        shape = left.selectbox(
            "Model",
            (OWN, *SHAPES),
            format_func=lambda one: one if one == OWN else f"LLaMA 3.1 {one.upper()}",
            key="estimate_model",
        )
        device = right.selectbox(
            "GPU", list(MACHINES), format_func=lambda one: MACHINES[one].label, key="estimate_on"
        )
        found = info if shape == OWN else info_of(shape)
        made = Table(found, MACHINES[device])
        say.table(pd.DataFrame([_cells(row) for row in made.rows()]).set_index("command"))
        say.caption(
            f"Estimated, not measured: operations at {MATMUL_SHARE:.0%} of the GPU's peak (of "
            "healing's regressions, of its peak in float64), weights "
            f"at {BANDWIDTH_SHARE:.0%} of its bandwidth, {DISK_BYTES_PER_S / GB:.0f} GB/s from the "
            "disk. Commands at their defaults; time includes reading the checkpoint."
        )
        spec = EstimateSpec(config=name if shape == OWN else shape, on=device)
        st.code(jobs.command_line("estimate", spec), "bash", wrap_lines=True)


def _cells(row: Row) -> dict[str, str]:
    return {
        "command": row.command,
        "what": row.what,
        "memory": size(row.memory_bytes) if row.memory_bytes else "-",
        "how": _WAYS[row.way],
        "read": size(row.read_bytes),
        "time": "-" if row.seconds is None else _time(row.seconds),
        "bound by": "-" if row.seconds is None else _bound(row),
    }


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def _bound(row: Row) -> str:
    """Return what takes most of the time."""
    parts = {"arithmetic": row.compute_s, "memory": row.device_s, "disk": row.disk_s}
    return max(parts, key=lambda name: parts[name])
