"""Estimated cost of the Prune page's plans on this device, updated as blocks are toggled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from core.benchmark.analytic import Rates, without
from core.benchmark.command import BenchmarkSpec
from core.benchmark.results import known_rates
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.compare.measured import estimate
from core.runs import devices, jobs
from core.ui import forms, runs, say, state
from core.words import brief, rounded

INPUT, OUTPUT = 12, 128
"""Prompt length of the paper and its shorter output length, in tokens."""


def rows(
    info: CheckpointInfo,
    plans: Mapping[str, Removal],
    rates: Rates | None,
    batch: int,
    dtype: str,
    context: int = INPUT + OUTPUT,
) -> list[dict[str, Any]]:
    """Return the table: a row per fact, columns dense and each plan; times need ``rates``.

    The peak is at ``context`` tokens, like the weights and the cache that the page shows: it is
    never below their sum.
    """
    cell = (batch, INPUT, OUTPUT)
    removals = {"dense": Removal(), **{f"plan {name}": plan for name, plan in plans.items()}}
    costs = {
        name: estimate(without(info, removal.below(info.blocks)), rates, cell, dtype)
        for name, removal in removals.items()
    }
    made = max(1, min(OUTPUT, context - 1))
    full = (batch, max(1, context - made), made)
    peaks = {
        name: estimate(without(info, removal.below(info.blocks)), None, full, dtype)
        for name, removal in removals.items()
    }
    table = [
        {"": f"peak memory, {context:,} tokens"}
        | {name: f"{rounded(peak.peak_memory_mib)} MiB" for name, peak in peaks.items()}
    ]
    facts: dict[str, Any] = {}
    if rates:
        whole = costs["dense"].latency_s_mean
        facts |= {
            f"latency of {OUTPUT} tokens": lambda c: brief(c.latency_s_mean),
            "time to first token": lambda c: brief(c.first_token_s),
            "time per token": lambda c: brief(c.per_token_s),
            "tokens/s": lambda c: rounded(c.tokens_per_s),
            "speed-up": lambda c: f"{whole / c.latency_s_mean:.2f} x",
        }
    return table + [
        {"": fact} | {name: show(cost) for name, cost in costs.items()}
        for fact, show in facts.items()
    ]


def device_of(name: str) -> str:
    """Return the device that the study of a checkpoint computes on."""
    return devices.meant(forms.kept(name).settings.device)


def draw(
    name: str,
    info: CheckpointInfo,
    plans: Mapping[str, Removal],
    batch: int,
    dtype: str,
    context: int,
) -> None:
    """Draw the table; if the device's rates are unknown, offer to measure them."""
    st.subheader("Estimated cost of the plans")
    device = device_of(name)
    rates = known_rates(state.workspace(), device, dtype)
    say.table(pd.DataFrame(rows(info, plans, rates, batch, dtype, context)).set_index(""))
    if rates:
        say.caption(
            f"Estimated from shapes and this device's measured rates: {INPUT} tokens in, {OUTPUT} "
            f"out, batch {batch}, {dtype}. For measurements, see the Compare page."
        )
        return
    values: dict[str, Any] = {"checkpoints": (name,), "rates_only": True, "dtype": dtype}
    values["device"] = forms.kept(name).settings.device
    say.caption(f"Times are unknown: {device} has not been measured in {dtype} yet.")
    command = jobs.command_line("benchmark", BenchmarkSpec(**values, out="DIR"))
    st.code(command, "bash", wrap_lines=True)
    if st.button("Measure this device", icon=":material/speed:"):
        record = runs.launch_once("benchmark", values)
        st.session_state["rates_run"] = record.id if record else ""
    runs.show_all(
        "benchmark",
        started=[st.session_state.get("rates_run", "")],
        only=lambda record: bool(record.spec.get("rates_only")),
    )
