"""Starting runs, waiting for their state, and killing them."""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace

from core.__main__ import main
from core.prune import staging
from core.runs import jobs, processes
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


def started(place, on=None, **options):
    """Launch a run of two processes and return its record and their pids once they have met."""
    record = jobs.launch("shared", {"device": "cpu", "processes": 2, **options}, place, on=on)
    met = record.path / "pids.json"
    wait_until(lambda: met.exists() or not read_run(record.path).is_live, seconds=120)
    assert met.exists(), record.log_tail()
    return record, json.loads(met.read_text())["pids"]


def all_gone(pids):
    wait_until(lambda: not any(processes.start_time(pid) for pid in pids))


def full_disk_before_work(argv, out, capsys, monkeypatch):
    """Run a command on a disk with 4 KiB left: it says so before it loads anything."""
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(out.parent / "locks"))
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    assert main([*argv, "--device", "cpu", "--out", str(out)]) == 2
    assert f"but {out} has only 4.00 KiB free" in capsys.readouterr().err
    assert "Loading" not in (out / ".run" / "log.txt").read_text()
