"""Access control: a password, required beyond loopback, and no pages of other origins."""

from __future__ import annotations

import hmac
import ipaddress
import os
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

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


def is_own_origin(origin: str | None, host: str | None, allowed: Sequence[str] = ()) -> bool:
    """Whether a browser's page from ``origin`` belongs to the dashboard it reached as ``host``.

    ``allowed`` are further origins (``server.corsAllowedOrigins``), e.g. that of a proxy. Streamlit
    itself refuses foreign hosts, but accepts pages of every port of this machine. Clients that are
    not browsers send no origin.
    """
    if origin is None:
        return True
    return urlsplit(origin).netloc == host or origin in allowed


def check() -> None:
    """Stop the page unless this session may use the dashboard.

    A password that is set is asked for everywhere; beyond loopback there must be one.
    """
    headers = st.context.headers
    others = [str(o).strip() for o in st.get_option("server.corsAllowedOrigins") or ()]
    if not is_own_origin(headers.get("Origin"), headers.get("Host"), others):
        st.error("This page of another site may not use the dashboard. Open the dashboard itself.")
        st.stop()
    password = os.environ.get(PASSWORD, "")
    if st.session_state.get(_GRANTED):
        return
    if not password:
        if is_loopback(st.get_option("server.address")):
            return
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
