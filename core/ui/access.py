"""Who may use a dashboard that others can reach: it asks for a password, or shows nothing."""

from __future__ import annotations

import hmac
import ipaddress
import os
import time

import streamlit as st

PASSWORD = "DEPTHCUT_PASSWORD"
_GRANTED = "access_granted"


def is_loopback(address: str | None) -> bool:
    """Whether a server bound to ``address`` is reached from its own machine only."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address or "").is_loopback
    except ValueError:
        return False


def check() -> None:
    """End the page unless the server is on loopback, or this session gave the password."""
    if is_loopback(st.get_option("server.address")) or st.session_state.get(_GRANTED):
        return
    password = os.environ.get(PASSWORD, "")
    if not password:
        st.error(
            "This dashboard can be reached from other machines and has no password, so it is "
            f"closed. Start it with {PASSWORD} set, or on 127.0.0.1 behind an SSH tunnel."
        )
        st.stop()
    given = st.text_input("Password", type="password", key="access_password")
    if given and hmac.compare_digest(given.encode(), password.encode()):
        st.session_state[_GRANTED] = True
        st.rerun()
    if given:
        time.sleep(1.0)  # guessing is slow
        st.error("That is not the password. Try again.")
    st.stop()
