"""Access control: a dashboard that other machines can reach requires a password."""

from __future__ import annotations

import hmac
import ipaddress
import os
import time

import streamlit as st

PASSWORD = "DEPTHCUT_PASSWORD"
_GRANTED = "access_granted"


def is_loopback(address: str | None) -> bool:
    """Whether a server bound to ``address`` can be reached only from its own machine."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address or "").is_loopback
    except ValueError:
        return False


def check() -> None:
    """Stop the page unless the server is on loopback or this session entered the password."""
    if is_loopback(st.get_option("server.address")) or st.session_state.get(_GRANTED):
        return
    password = os.environ.get(PASSWORD, "")
    if not password:
        st.error(
            "This dashboard can be reached from other machines but has no password, so access is "
            f"disabled. Set {PASSWORD} before starting it, or bind it to 127.0.0.1 and use an SSH "
            "tunnel."
        )
        st.stop()
    given = st.text_input("Password", type="password", key="access_password")
    if given and hmac.compare_digest(given.encode(), password.encode()):
        st.session_state[_GRANTED] = True
        st.rerun()
    if given:
        time.sleep(1.0)  # slows down guessing
        st.error("Wrong password. Try again.")
    st.stop()
