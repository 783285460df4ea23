"""Connections without the secret: they never count as requests, and bad bytes leave no trace."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time

import pytest

from core.live import protocol, server
from core.live.replies import Status
from core.live.server import MOST_CONNECTIONS, MOST_STRANGERS, Server


@pytest.fixture
def tracebacks(monkeypatch):
    """Exceptions that ended a thread."""
    found: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    return found


@pytest.fixture
def up(tmp_path):
    (tmp_path / ".run").mkdir()
    with Server(tmp_path, Status) as running:
        yield running, protocol.read_contact(tmp_path)


def connect(contact):
    return socket.create_connection((contact.host, contact.port), 5)


def reply_to(contact, data):
    with connect(contact) as one:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        return next(protocol.lines(one), None)


def ask(contact, **values):
    question = {"secret": contact.secret, "ask": "status", **values}
    return reply_to(contact, json.dumps(question).encode() + b"\n")


def test_idle_connections_keep_nobody_out(up):
    _, contact = up
    idle = [connect(contact) for _ in range(2 * MOST_STRANGERS + 10)]
    try:
        began = time.monotonic()
        assert ask(contact)["models"] == []
        assert time.monotonic() - began < 2
    finally:
        for one in idle:
            one.close()


def test_requests_with_the_secret_are_limited_truthfully(up):
    running, contact = up
    question = {"checkpoint": "demo", "secret": contact.secret, "ask": "perplexity"}
    open_ones = []
    for _ in range(MOST_CONNECTIONS):
        open_ones.append(connect(contact))
        open_ones[-1].sendall(json.dumps(question).encode() + b"\n")
    deadline = time.monotonic() + 10
    while running._open < MOST_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ask(contact)["message"] == f"Too many open requests ({MOST_CONNECTIONS})."
    open_ones.pop().close()
    while running._open >= MOST_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ask(contact)["event"] == "done"
    for one in open_ones:
        one.close()


def test_a_dripping_stranger_is_dropped_in_time(up, monkeypatch):
    monkeypatch.setattr(server, "HELLO_S", 0.3)
    _, contact = up
    began = time.monotonic()
    with connect(contact) as one, contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 5:
            one.sendall(b" ")
            time.sleep(0.02)
    assert time.monotonic() - began < 2


def bad_bytes():
    rng = random.Random(5)
    yield from (b"", b"\n", b"{", b"[" * 200_000, b"\xff\xfe\n", b"null\n", b'{"secret": 1}\n')
    yield from (b'{"secret": "\\ud800"}\n', b'{"secret": ' + b"[" * 50_000, b"1" * 9_000 + b"\n")
    yield b"x" * (protocol.LINE_BYTES + 1)
    yield from (rng.randbytes(rng.randint(1, 400)) for _ in range(40))


def test_bad_bytes_leave_no_traceback(up, tracebacks):
    _, contact = up
    for data in bad_bytes():
        try:
            reply = reply_to(contact, data)
        except OSError:
            continue  # closed before all of it was sent
        assert reply is None or reply["message"] == "Wrong secret for the live model."
    assert ask(contact)["event"] == "done"
    assert tracebacks == []


def test_bad_questions_of_a_friend_leave_no_traceback(up, tracebacks):
    _, contact = up
    values = (None, "\ud800", [], {}, [[]], True, -1, 1e308, "x" * 5000)
    for name in ("ask", "checkpoint", "skip", "window", "tokens", "bos", "colour"):
        for value in values:
            question = {"ask": "perplexity", "checkpoint": "demo", "window": "x", name: value}
            assert ask(contact, **question)["event"] == "error", question
    assert tracebacks == []
