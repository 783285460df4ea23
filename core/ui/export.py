"""The Export section of a variant: programs that run it, and files of it for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core import outside
from core.checkpoint import engines, families, locate, own_code
from core.checkpoint.engines import Row
from core.checkpoint.locate import Checkpoint
from core.errors import DepthcutError
from core.export import formats
from core.export.command import ExportSpec
from core.export.formats import Format
from core.export.layout import default_type
from core.export.results import Export
from core.quantize import plan as quantizing
from core.quantize.command import QuantizeSpec
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import RunRecord
from core.study import study
from core.ui import merging, run_on, runs, say, state
from core.ui.say import plain
from core.words import size

DOWNLOAD_BYTES = 256 << 20
"""Larger files are not passed through the dashboard's memory; their path is shown."""
SHOWN = 5
"""Earlier exports of a variant that are listed."""
QUANTIZE = "quantize"
_SHORT = {
    "gguf": "GGUF",
    "mergekit": "mergekit recipe",
    "hub": "Hugging Face Hub",
    QUANTIZE: "int8 or int4",
}


def of_study(name: str, newest: str) -> None:
    """Draw the choice among the variants of a checkpoint's study, and the chosen one's section.

    ``newest`` is the run that this page started last: it is selected once, when it has finished.
    """
    known = study(state.workspace(), name)
    found = {v.id: v for v in known.variants if v.folder and v.id != known.dense.id}
    if not found:
        return
    st.subheader("Run it elsewhere")
    key = "export_variant"
    if newest in found and st.session_state.get(f"{key}_newest") != newest:
        st.session_state[key] = st.session_state[f"{key}_newest"] = newest
    if st.session_state.get(key) not in found:
        st.session_state[key] = next(reversed(found))
    chosen = st.selectbox(
        "Variant to run or export", list(found), key=key, format_func=lambda v: found[v].label
    )
    folder = found[chosen].folder
    assert folder is not None
    of_folder(folder.absolute(), chosen)


def of_folder(folder: Path, key: str) -> None:
    """Draw where the checkpoint in ``folder`` runs, and its export; ``key`` names its widgets."""
    try:
        checkpoint = locate.at(folder, need_weights=True)
    except (DepthcutError, OSError) as error:
        say.error(str(error))
        return
    found = formats.formats(checkpoint)
    with st.expander("Runs in", icon=":material/dns:", key=f"runs_in_{key}"):
        table(rows_of(checkpoint, found), key)
    with st.expander("Export", icon=":material/ios_share:", key=f"export_{key}"):
        _form(checkpoint, {f.name: f for f in found}, key)
    runs.show_all("export", "quantize", started=[st.session_state.get(f"export_run_{key}", "")])


def of_retrained(record: RunRecord) -> None:
    """Draw the section of a finished retraining: of its merged checkpoint, or of its adapter."""
    merged, adapter = record.path / "merged", record.path / "adapter"
    if record.state != "done":
        return
    if (merged / "config.json").is_file():
        of_folder(merged.absolute(), record.id)
    elif adapter.is_dir():
        _of_adapter(record, adapter.absolute())


def _of_adapter(record: RunRecord, adapter: Path) -> None:
    base = str(record.spec.get("checkpoint") or "")
    folder = locate.local_folder(base)
    with st.expander("Runs in", icon=":material/dns:", key=f"runs_in_{record.id}"):
        if folder is None:
            say.info(f"The adapter runs on top of {base}, which is not on this machine.")
        else:
            try:
                config = locate.at(folder).config
            except (DepthcutError, OSError) as error:
                say.error(str(error))
                return
            rank = record.spec.get("rank")
            rank = rank if isinstance(rank, int) else 16
            table(engines.of_adapter(config, str(folder.absolute()), str(adapter), rank), record.id)
    with st.expander("Export", icon=":material/ios_share:", key=f"export_{record.id}"):
        st.caption(
            "An adapter alone cannot be exported: files for other programs hold whole weights. "
            "Merge it first."
        )
        merging.draw(record, "export")


# -------------------------------------------------------------------------------------- Runs in


def runs_in(folder: Path, key: str) -> None:
    """Draw the table of programs for the checkpoint in ``folder``."""
    try:
        checkpoint = locate.at(folder)
        table(rows_of(checkpoint, formats.formats(checkpoint)), key)
    except (DepthcutError, OSError) as error:
        say.error(str(error))


def rows_of(checkpoint: Checkpoint, found: tuple[Format, ...]) -> tuple[Row, ...]:
    """Return every program for a checkpoint on this machine."""
    trusted = not families.is_custom(checkpoint.config) or own_code.is_trusted(checkpoint.folder)
    refused = next(f.why_not for f in found if f.name == "gguf")
    return engines.rows(
        checkpoint.config, str(checkpoint.folder.absolute()), trusted=trusted, refused=refused
    )


def table(rows: tuple[Row, ...], key: str) -> None:
    """Draw programs as a table, and the command for the selected one."""
    shown = [{"program": r.engine, "runs": r.runs, "why": r.why, "basis": r.basis} for r in rows]
    say.table(pd.DataFrame(shown).set_index("program"))
    st.caption(
        "tested: Depthcut's tests run small models with blocks of this kind. documented: by the "
        "program's documentation; not tried here."
    )
    able = {r.engine: r for r in rows if r.command}
    chosen = st.selectbox("Command for", list(able), key=f"engine_{key}", format_func=plain)
    if chosen in able:
        st.code(able[chosen].command, language=able[chosen].language, wrap_lines=True)


# --------------------------------------------------------------------------------------- Export


def _form(checkpoint: Checkpoint, found: dict[str, Format], key: str) -> None:
    """Draw format and options, the command and the button, and the files made so far."""
    name = st.segmented_control(
        "Format",
        [*found, QUANTIZE],
        default="gguf",
        key=f"format_{key}",
        required=True,
        format_func=lambda f: plain(_SHORT.get(f, f)),
    )
    if name == QUANTIZE:
        _quantize(checkpoint, key)
        return
    kind = found[str(name)]
    values: dict[str, Any] = {"checkpoint": str(checkpoint.folder.absolute()), "format": name}
    if not kind.possible:
        say.warning(kind.why_not)
    elif name == "gguf":
        values |= _gguf(checkpoint, kind, key)
    elif name == "mergekit":
        st.caption(
            "A YAML file with the slices of the dense checkpoint that give this variant. Every "
            "weight is compared with the dense checkpoint's first."
        )
    else:
        values |= _hub(kind, key)
    if kind.possible:
        _launch("export", ExportSpec, values, key)
    _made(checkpoint.folder, key)


def _gguf(checkpoint: Checkpoint, kind: Format, key: str) -> dict[str, Any]:
    types = list(kind.bytes)
    chosen = st.segmented_control(
        "Type of the weights, and size of the file",
        types,
        default=default_type(checkpoint.info.dtype),
        key=f"type_{key}",
        required=True,
        format_func=lambda t: plain(f"{t}: {size(kind.bytes[t])}"),
        help="q8_0 has 8 bits a weight, in groups of 32 with one scale; it hardly changes quality.",
    )
    about = f"Architecture {kind.architecture}"
    about += f", because {kind.why_deci}." if kind.why_deci else "."
    about += f" The checkpoint's own files: {size(checkpoint.info.disk_bytes)}."
    say.caption(" ".join([about, *kind.notes.get(str(chosen), ())]))
    return {"type": chosen}


def _quantize(checkpoint: Checkpoint, key: str) -> None:
    """Draw bits and group of a quantized variant, its size, the command and the button."""
    info = checkpoint.info
    offered = {p.bits: p for p in quantizing.possible(info)}
    for one in offered.values():
        if not one.ok:
            say.warning(one.reason)
    plans = {bits: quantizing.make(info, bits, None) for bits, one in offered.items() if one.ok}
    if not plans:
        return
    columns = st.columns([2, 1], vertical_alignment="bottom")
    bits = columns[0].segmented_control(
        "Bits per weight, and size of the weights",
        list(plans),
        default=next(iter(plans)),
        key=f"bits_{key}",
        required=True,
        format_func=lambda b: plain(f"int{b}: {size(plans[b].bytes_after)}"),
    )
    usual = offered[bits].group
    groups = [None, *(g for g in offered[bits].groups if g != usual)]
    group = columns[1].selectbox(
        "Group",
        groups,
        key=f"group_{key}_{bits}",
        format_func=lambda g: str(g or usual or "one scale per output channel"),
        help="Weights that share a scale. Only groups that divide every width are offered.",
    )
    plan = quantizing.make(info, bits, group)
    about = f"{size(plan.bytes_after)} instead of {size(plan.bytes_before)}, a variant of its own"
    about += " that transformers loads if torchao is installed."
    about += " int4 takes a byte a weight in this format." if bits == 4 else ""
    say.caption(f"{about} {plan.note}".strip())
    values = {"checkpoint": str(checkpoint.folder.absolute()), "bits": bits, "group": group}
    _launch("quantize", QuantizeSpec, values, key)


def _hub(kind: Format, key: str) -> dict[str, Any]:
    columns = st.columns([2, 1], vertical_alignment="bottom")
    repo = columns[0].text_input("Repository", placeholder="OWNER/NAME", key=f"repo_{key}")
    public = columns[1].checkbox("Public", key=f"public_{key}")
    say.caption(
        f"Uploads {size(kind.bytes['all'])} with the model card, in one commit; a repository that "
        "exists is updated. Needs a login on this machine: hf auth login, or HF_TOKEN."
    )
    return {"repo": repo.strip(), "public": public}


def _launch(command: str, spec_class: type[Any], values: dict[str, Any], key: str) -> None:
    """Draw the command, what is wrong with it, the button, and the progress of the run."""
    spec = build(spec_class, {**values, "out": "DIR"})
    problem = ""
    try:
        jobs.commands.get(command).load().check(spec)
    except DepthcutError as error:
        problem = str(error)
        (say.error if values.get("repo") else say.info)(problem)
    on = run_on.choose(command, str(values["checkpoint"])) if command == "quantize" else {}
    st.code(jobs.command_line(command, spec, on), "bash", wrap_lines=True)
    if st.button(
        "Quantize" if command == "quantize" else "Export",
        key=f"start_{key}",
        type="primary",
        icon=":material/ios_share:",
        disabled=bool(problem),
    ):
        record = runs.launch_once(command, values, on)
        st.session_state[f"export_run_{key}"] = record.id if record else ""


def _made(folder: Path, key: str) -> None:
    """Draw the finished exports of a checkpoint, newest first, with their downloads."""
    done = [r for r in state.workspace().runs("export") if r.state == "done"]
    ours = [r for r in done if r.spec.get("checkpoint") == str(folder.absolute())]
    if ours:
        say.bold("Exported so far")
        st.caption("Exporting again writes another file and leaves these as they are.")
    for record in ours[:SHOWN]:
        result = Export.read(record.path) or Export()
        if result.url:
            say.paragraph(f"{state.names().run(record)}: pushed to {result.url}")
        elif result.file:
            _file(record.path.absolute() / Path(result.file).name, record, key)


def _file(path: Path, record: RunRecord, key: str) -> None:
    if not outside.is_file(path):
        return
    bytes_ = path.stat().st_size
    with st.container(horizontal=True, vertical_alignment="center"):
        if bytes_ <= DOWNLOAD_BYTES:
            st.download_button(
                plain(f"{path.name} ({size(bytes_)})"),
                path.read_bytes,
                path.name,
                key=f"file_{key}_{record.id}",
                on_click="ignore",
                icon=":material/download:",
            )
        else:
            say.paragraph(f"{path.name} ({size(bytes_)})")
    st.code(json.dumps(str(path))[1:-1] if "\n" in str(path) else str(path), language=None,
            wrap_lines=True)  # fmt: skip
