"""A dashboard that others can reach asks for a password, and is closed without one."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
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


def test_a_password_protects_on_loopback_too(bound):
    bound("127.0.0.1", "sésame")
    shown = page()
    assert not shown.title
    assert not shown.button
    shown.text_input[0].set_value("sésame").run()
    assert shown.title[0].value == "Depthcut"


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://127.0.0.1:8501", True),
        ("https://proxy.example", True),
        ("http://127.0.0.1:9999", False),
        ("http://localhost:8501", False),
        ("http://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
def test_pages_of_other_origins_are_refused(bound, monkeypatch, origin, allowed):
    bound("127.0.0.1")
    assert access.is_own_origin(origin, "127.0.0.1:8501", ["https://proxy.example"]) is allowed
    if origin == "https://proxy.example":
        return
    headers = {"Host": "127.0.0.1:8501"} | ({} if origin is None else {"Origin": origin})
    monkeypatch.setattr(type(st.context), "headers", property(lambda _: headers))
    shown = page()
    assert bool(shown.title) is allowed
    assert bool(shown.error) is not allowed


def handshake(port, host, origin):
    """Return the status line of a WebSocket handshake with the dashboard."""
    lines = [
        "GET /_stcore/stream HTTP/1.1", f"Host: {host}", "Upgrade: websocket",
        "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13", *([f"Origin: {origin}"] if origin else []),
    ]  # fmt: skip
    with socket.create_connection(("127.0.0.1", port), 20) as one:
        one.sendall("\r\n".join([*lines, "", ""]).encode())
        return one.recv(200).split(b"\r\n")[0].decode()


def test_a_started_dashboard_refuses_foreign_handshakes(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "DEPTHCUT_WORKSPACE": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    env["https_proxy"] = env["http_proxy"]  # Streamlit asks a site for this machine's address
    server = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)],
        cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    own = f"127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if " 101 " in handshake(port, own, f"http://{own}"):
                    break
            time.sleep(0.1)
        assert " 101 " in handshake(port, own, f"http://{own}")
        assert " 101 " in handshake(port, f"localhost:{port}", f"http://localhost:{port}")
        for host, origin in (
            (own, "http://evil.example"),
            (own, f"http://evil.example:{port}"),
            (own, "null"),
            (f"evil.example:{port}", f"http://evil.example:{port}"),  # a name that leads here
        ):
            assert " 403 " in handshake(port, host, origin), (host, origin)
    finally:
        server.terminate()
        server.wait(20)
