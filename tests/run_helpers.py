"""Waiting for a run's state, and killing it."""

from __future__ import annotations

import os
import signal
import time

from core.runs.workspace import read_run

SOON = 30.0


def wait_for(record, *states, seconds=SOON):
    """Wait until the run is in one of ``states`` and return its record."""
    deadline = time.monotonic() + seconds
    while True:
        now = read_run(record.path)
        if now.state in states:
            return now
        assert time.monotonic() < deadline, f"{now.state} {now.status}\n{now.log_tail()}"
        time.sleep(0.03)


def wait_until(true, seconds=SOON):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.03)


def kill(record):
    os.kill(record.status["pid"], signal.SIGKILL)
