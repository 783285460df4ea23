"""Checkpoint: what the model is and where its parameters are. Reads headers only."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from core.charts.checkpoint import parameter_bars
from core.checkpoint.inspect_command import InspectSpec
from core.runs import jobs
from core.ui import estimate_table, frame, heal_form, say, state, study_form, widgets
from core.ui.say import plain
from core.words import parameters, size

frame.start("Checkpoint")
name = state.active_checkpoint()
info = state.inspect(name)
with st.expander("Another checkpoint"):
    state.picker()
state.warnings(info)
if info.imported:
    say.info(" ".join([info.imported.summary, *info.imported.notes]))

tiles = st.columns(4)
tiles[0].metric("Family", plain(info.family), border=True)
tiles[1].metric("Blocks", f"{info.blocks:d}", border=True)
tiles[2].metric(
    "Parameters", parameters(info.parameters, exact=True), border=True, help=f"{info.parameters:,}"
)
tiles[3].metric(
    "On disk", size(info.disk_bytes) if info.has_weights else "config only", border=True
)

study_form.panel(name)
heal_form.of_folder(Path(info.path))
st.subheader("Where the parameters are")
widgets.chart(
    parameter_bars(info), key="parameters", alt="Parameters of embedding, each block, and head."
)
st.caption("Counted from config.json and the safetensors headers; no weights were loaded.")

left, right = st.columns(2)
with left:
    st.subheader("Facts")
    tokens = info.tokenizer
    facts = {
        "hidden size": f"{info.hidden:,}",
        "MLP size": f"{info.intermediate:,}",
        "query heads": f"{info.heads}",
        "key/value heads": f"{info.kv_heads}",
        "head dimension": f"{info.head_dim}",
        "vocabulary": f"{info.vocab:,}",
        "context": f"{info.context:,} tokens",
        "tied embeddings": "yes" if info.tied else "no",
        "stored as": info.dtype,
        "architecture": info.architecture,
        "tokenizer": f"{tokens['kind']}, {tokens['size']:,} entries" if tokens else "none",
        "weight files": f"{len(info.shards)}",
    }
    if info.quantization:
        facts["quantized"] = info.quantization.words
    if info.imported:
        facts["imported from"] = f"{info.imported.file} ({info.imported.how_stored})"
        facts["license"] = info.imported.license or "not stated in the file"
        facts["source"] = info.imported.origin or "a file on this machine"
    say.table(pd.DataFrame({"": facts.keys(), "value": facts.values()}).set_index(""))
with right:
    st.subheader("Parameters by part")
    parts = [(part, f"{n:,}", f"{n / info.parameters:.1%}") for part, n in info.parts.items()]
    say.table(pd.DataFrame(parts, columns=["", "parameters", "share"]).set_index(""))
    st.subheader("Memory")
    rows = [
        (dtype, size(n), size(info.kv_bytes_per_token[dtype] * min(info.context, 4096)))
        for dtype, n in info.memory_bytes.items()
    ]
    cache = f"cache, {min(info.context, 4096):,} tokens"
    say.table(pd.DataFrame(rows, columns=["", "weights", cache]).set_index(""))
    st.caption("Computed from the shapes; activations are not included.")

st.subheader("Blocks")
table = pd.DataFrame(
    [
        {"block": b, "parameters": n, **info.block_shapes[b], **info.block_modules[b]}
        for b, n in enumerate(info.block_parameters)
    ]
)
st.dataframe(table, hide_index=True, height=min(400, 38 + 35 * len(table)))
widgets.csv_download("checkpoint_blocks.csv", lambda: table.to_csv(index=False), label="blocks.csv")
estimate_table.draw(name, info)
st.caption("Equivalent command:")
st.code(jobs.command_line("inspect", InspectSpec(checkpoint=name)), "bash", wrap_lines=True)
frame.step("importance", "Next: score the blocks")
