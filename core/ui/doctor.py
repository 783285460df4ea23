"""The home page's check of this machine: the command, a button that starts it, and its verdicts."""

from __future__ import annotations

import streamlit as st

from core.doctor.command import WORDS, DoctorSpec
from core.doctor.results import Diagnosis
from core.runs import jobs
from core.ui import runs, say, state


def panel() -> None:
    """Draw the check of this machine, with the results of the last one."""
    with st.expander("Check this machine"):
        st.markdown(
            "Runs every computing path on the bundled demo and compares its numbers with the CPU, "
            "or on a CPU with plain transformers. It takes about three minutes and needs no "
            "network."
        )
        st.code(jobs.command_line("doctor", DoctorSpec()), language="bash")
        record = next(iter(state.workspace().runs("doctor")), None)
        live = record is not None and record.is_live
        if st.button("Check this machine", icon=":material/stethoscope:", disabled=live):
            record = runs.launch_once("doctor", {"device": "auto"}) or record
        if record is None:
            return
        found = None if record.is_live else Diagnosis.read(record.path)
        if found is None:
            runs.show(record.id)
            return
        (say.success if found.agrees else say.error)(found.verdict)
        import pandas as pd  # half a second, which the first page of a server does not have

        rows = [
            {"check": c.title, "result": WORDS.get(c.state, c.state),
             "what was found": c.text, "seconds": c.seconds}
            for c in found.checks
        ]  # fmt: skip
        st.dataframe(pd.DataFrame(rows), hide_index=True)
