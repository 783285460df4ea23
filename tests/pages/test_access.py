"""A dashboard that others can reach asks for a password, and is closed without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from core.ui import access

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bound(monkeypatch, tmp_path):
    """A function that says to which address the server is bound, and the password it has."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    real = st.get_option

    def bind(address, password=None):
        def option(key):
            return address if key == "server.address" else real(key)

        monkeypatch.setattr(st, "get_option", option)
        monkeypatch.delenv(access.PASSWORD, raising=False)
        if password:
            monkeypatch.setenv(access.PASSWORD, password)

    return bind


def page():
    return AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.0.7", "", None, "a-host"])
def test_without_a_password_everything_is_closed(bound, address):
    bound(address)
    shown = page()
    assert "has no password" in shown.error[0].value
    assert not shown.title
    assert not shown.button


def test_only_the_password_opens_it(bound):
    bound("0.0.0.0", "sésame")
    shown = page()
    assert not shown.title
    shown.text_input[0].set_value("wrong").run()
    assert "Wrong password" in shown.error[0].value
    assert not shown.title
    shown.text_input[0].set_value("sésame").run()
    assert shown.title[0].value == "Depthcut"
    assert not shown.error


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_loopback_asks_nothing(bound, address):
    bound(address)
    assert page().title[0].value == "Depthcut"
