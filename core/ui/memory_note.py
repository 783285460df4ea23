"""What a form says of memory: that a run reads the model block by block, or cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from core.ui.say import plain


def draw(found: Mapping[str, Any]) -> str:
    """Draw a line if a run uses the disk instead of memory; return what is wrong if it cannot run.

    ``found``: a dry run's facts, as `core.importance.capacity.Capacity.facts` has them.
    """
    way, limit = found.get("way", "fits"), found.get("memory_limit_mib")
    if limit is None:
        return ""
    disk = found.get("states_on_disk_mib")
    if disk and way != "cannot":
        st.caption(
            plain(
                "The hidden states of all calibration rows do not fit in memory: "
                f"{disk / 1024:.1f} GiB of them are on the disk while it heals."
            )
        )
    if way == "fits":
        return ""
    need = found["in_memory_mib"] / 1024
    if way == "cannot":
        return (
            f"Memory: {limit / 1024:.2f} GiB are too little; even block by block this needs "
            f"{found['streamed_mib'] / 1024:.2f} GiB. Raise the memory limit, or use fewer "
            "samples, shorter rows or fewer metrics."
        )
    passes = found.get("passes")  # unknown if it depends on what is found
    often = f", {passes or 0:,} times, for {found.get('rows_at_once', 0):,} rows each"
    often = ", once" if passes == 1 else often if passes else ""
    st.caption(
        plain(
            f"The model needs about {need:.1f} GiB, but only {limit / 1024:.1f} are there: its "
            f"blocks are read from the disk while it computes{often}."
        )
    )
    return ""
