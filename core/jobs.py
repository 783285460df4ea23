"""Start, watch and stop detached runs. A launcher is a small interface, so that clusters fit in."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from core import commands, processes, workspace
from core.errors import InputError
from core.run import DETACHED, save_spec
from core.spec import build, to_arguments
from core.workspace import BOOKKEEPING, RunRecord, Workspace, read_run

PROJECT = Path(__file__).resolve().parent.parent


class Launcher(Protocol):
    """What it takes to run a command elsewhere: locally, or on a cluster."""

    def start(self, argv: list[str], folder: Path) -> None:
        """Start ``argv`` so that it outlives the caller, its output going to the run's log."""

    def kill(self, record: RunRecord) -> bool:
        """End a run's process at once; False where it was not running."""


class LocalLauncher:
    """A process of its own session on this machine."""

    def start(self, argv: list[str], folder: Path) -> None:
        """Start the process; its pid and start time go to launch.json."""
        env = {**os.environ, DETACHED: "1", "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT), env.get("PYTHONPATH"))))
        with (folder / BOOKKEEPING / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=env,
            )
        started = processes.start_time(process.pid)
        workspace.write_json(
            folder / BOOKKEEPING / "launch.json", {"pid": process.pid, "pid_started": started}
        )
        threading.Thread(target=process.wait, daemon=True).start()

    def kill(self, record: RunRecord) -> bool:
        """Send SIGKILL to the run's process group (it leads its own session)."""
        owner = record.status if record.status.get("pid") else None
        owner = owner or workspace.read_json(record.path / BOOKKEEPING / "launch.json") or {}
        pid = owner.get("pid")
        if not processes.is_alive(pid, owner.get("pid_started")) or not isinstance(pid, int):
            return False
        try:
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def launch(
    command: str,
    values: Any,
    where: Workspace | None = None,
    launcher: Launcher | None = None,
) -> RunRecord:
    """Start a run of ``command`` in a new folder of the workspace and return its record.

    ``values`` is a spec, or a dictionary of options without ``out``.
    """
    where = where or Workspace()
    entry = commands.get(command)
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
    build(entry.spec_class, {**values, "out": "checked"})  # refuse before anything is written
    folder = where.new_dir(command)
    spec = build(entry.spec_class, {**values, "out": str(folder)})
    save_spec(folder, entry, spec)
    workspace.write_json(
        folder / BOOKKEEPING / "status.json",
        {"state": "starting", "created": time.time(), "host": socket.gethostname()},
    )
    argv = [sys.executable, "-m", "core", command, *to_arguments(spec)]
    (launcher or LocalLauncher()).start(argv, folder)
    record = read_run(folder)
    assert record is not None
    return record


def restart(record: RunRecord, launcher: Launcher | None = None) -> RunRecord:
    """Start a failed, cancelled or lost run again in its own folder."""
    if record.state not in ("failed", "cancelled", "lost"):
        raise InputError(
            f"Run {record.id} is {record.state}.", "Only a failed, cancelled or lost run restarts."
        )
    entry = commands.get(record.command)
    spec = build(entry.spec_class, record.spec)
    argv = [sys.executable, "-m", "core", record.command, *to_arguments(spec)]
    (record.path / BOOKKEEPING / "cancel").unlink(missing_ok=True)
    workspace.write_json(
        record.path / BOOKKEEPING / "status.json",
        {"state": "starting", "created": time.time(), "host": socket.gethostname()},
    )
    (launcher or LocalLauncher()).start(argv, record.path)
    again = read_run(record.path)
    assert again is not None
    return again


def request_cancel(record: RunRecord) -> None:
    """Ask a run to stop; it ends itself by force when its grace is over."""
    if record.is_live:
        (record.path / BOOKKEEPING / "cancel").touch()


def cancel(record: RunRecord, grace_s: float | None = None) -> RunRecord:
    """Ask a run to stop, wait ``grace_s``, then kill it; returns its final record.

    A run that has ended already, or is lost, is returned as it is.
    """
    if not record.is_live:
        return record
    request_cancel(record)
    known = record.command in commands.COMMANDS
    grace = commands.get(record.command).grace_s + 3 if grace_s is None and known else grace_s
    deadline = time.time() + (20.0 if grace is None else grace)
    current: RunRecord | None = record
    while time.time() < deadline:
        current = read_run(record.path)
        if current is None or not current.is_live:
            break
        time.sleep(0.1)
    if current is not None and current.state != "lost" and current.is_live:
        LocalLauncher().kill(current)
        time.sleep(0.2)
    current = read_run(record.path)
    if current is not None and (current.is_live or current.state == "lost"):
        status = {**current.status, "state": "cancelled", "finished": time.time()}
        status["error"] = "Killed: it did not stop when asked."
        workspace.write_json(record.path / BOOKKEEPING / "status.json", status)
        (record.path / BOOKKEEPING / "cancel").unlink(missing_ok=True)
        current = read_run(record.path)
    return current or record


def command_line(command: str, spec: Any) -> str:
    """Return the command that does what a page is about to do."""
    return shlex.join(["python", "-m", "core", command, *to_arguments(spec)])
