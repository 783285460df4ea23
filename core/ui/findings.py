"""Findings on a page: what the figures mean, the evidence, and what to try."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from core.findings import Finding
from core.ui.job_cards import plain


def show(found: Sequence[Finding]) -> None:
    """Draw each finding with its evidence folded in; nothing where there is none."""
    for finding in found:
        with st.container(border=True):
            st.markdown(f":material/troubleshoot: **{plain(finding.sentence)}**")
            st.markdown(f"Try: {plain(finding.try_next)}")
            with st.expander("Evidence"):
                rows = [{"": k, "value": str(v)} for k, v in finding.evidence.items()]
                st.dataframe(rows, hide_index=True)
