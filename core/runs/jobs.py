"""Start, watch and stop detached runs. A launcher is a small interface, so clusters fit in."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from core import commands
from core.errors import InputError, RunError
from core.runs import processes, ranks, warm, workspace
from core.runs import status as statuses
from core.runs.run import (
    DETACHED,
    KILLED,
    busy,
    place_words,
    processes_of,
    refuse_link,
    save_spec,
)
from core.runs.spec import RunSpec, Spec, build, hints_of, to_arguments, to_dict
from core.runs.warm import Template
from core.runs.workspace import BOOKKEEPING, RunRecord, Workspace, read_run

TWICE_S = 1.5
"""How long after its start a finished run still answers the same wish."""


class Launcher(Protocol):
    """What it takes to run a command in another process: locally, or on a cluster."""

    def start(self, argv: list[str], folder: Path) -> None:
        """Start ``argv`` so that it outlives the caller and its output goes to the run's log."""

    def kill(self, record: RunRecord) -> bool:
        """Kill a run's process at once; return False if it was not running."""


def launcher_at(
    on: Mapping[str, Any],
    root: Path | None = None,
    *,
    again: bool = False,
    spec: Mapping[str, Any] | None = None,
) -> Launcher:
    """Return the launcher of what a launch asks for: a place by its name, or this machine.

    ``again`` follows a run that may still be going on there. Raises `PlaceError` for an unknown
    place, and for less than a run with the options ``spec`` needs there.
    """
    if not on.get("place"):
        return LocalLauncher(root=root)
    module = importlib.import_module("core.places.launcher")
    return module.PlaceLauncher(dict(on), root or Workspace().root, again=again, spec=spec)


def launcher_of(record: RunRecord) -> Launcher:
    """Return the launcher of a run that exists."""
    return launcher_at(record.on, again=True) if record.is_elsewhere else LocalLauncher()


class LocalLauncher:
    """Starts each run as a process in its own session on this machine."""

    def __init__(
        self,
        *,
        root: Path | None = None,
        cwd: Path | None = None,
        template: Template | None = None,
    ) -> None:
        """Start runs in ``cwd``; they look up other runs by id in the workspace ``root``.

        Runs are forked from ``template`` (`core.runs.warm`), or the one this process keeps, if
        there is one.
        """
        self._root, self._cwd, self._template = root, cwd, template or warm.kept()

    def start(self, argv: list[str], folder: Path) -> None:
        """Start the process and write its pid and start time to launch.json."""
        env = processes.environment({DETACHED: str(folder)}, PYTHONUNBUFFERED="1")
        if self._root:
            env["DEPTHCUT_WORKSPACE"] = str(self._root.absolute())
        with (
            (folder / BOOKKEEPING / "log.txt").open("ab") as log,
            Path(os.devnull).open("rb") as nothing,
        ):
            streams = (nothing.fileno(), log.fileno(), log.fileno())
            process = warm.start(
                self._template, argv, streams=streams, env=env, cwd=self._cwd, session=True
            )
        started = processes.start_time(process.pid)
        workspace.write_json(
            folder / BOOKKEEPING / "launch.json", {"pid": process.pid, "pid_started": started}
        )
        threading.Thread(target=process.wait, daemon=True).start()

    def kill(self, record: RunRecord) -> bool:
        """Send SIGKILL to the run's process group (it leads its own session) and wait for it.

        The process of a copied record belongs to the original, so it is not signalled.
        """
        owner = workspace.owner_of(record.path, record.status)
        pid, started = owner.get("pid"), owner.get("pid_started")
        ours = statuses.is_here(record.status)
        ours = ours and not statuses.is_copy(record.path / BOOKKEEPING, record.status)
        if not ours or not isinstance(pid, int) or not processes.is_alive(pid, started):
            return False
        try:
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise RunError(
                f"Process {pid} of run {record.id} is owned by another user.",
                "Ask that user to stop it.",
            ) from error
        _until(lambda: not processes.is_alive(pid, started), 5.0)
        return True


def _until(true: Callable[[], bool], seconds: float) -> bool:
    """Wait up to ``seconds`` for ``true()``; return whether it became true."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def launch(
    command: str,
    values: Any,
    where: Workspace | None = None,
    launcher: Launcher | None = None,
    on: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Start a run of ``command`` in a new folder of the workspace and return its record.

    ``values`` is a spec, or a dictionary of options without ``out``; ``on`` asks for another place
    than this machine (`launcher_at`).
    """
    where = where or Workspace()
    entry, values = _checked(command, values)
    launcher = launcher or launcher_at(on or {}, where.root, spec=values)
    folder = where.new_dir(command)
    spec = build(entry.spec_class, {**values, "out": str(folder)})
    return launch_in(folder, command, spec, launcher, on)


def launch_once(
    command: str,
    values: Any,
    where: Workspace | None = None,
    launcher: Launcher | None = None,
    on: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Start a run as `launch` does, or return the one that the same wish has just started.

    The same options while a run with them is live, or within `TWICE_S` of its start, are the same
    wish: a second click, or the same button in another tab or by another user of the workspace.
    """
    where = where or Workspace()
    entry, values = _checked(command, values)
    wish = _wish(build(entry.spec_class, {**values, "out": "wish"}))
    with _one_launch(where.root):
        for record in where.runs(command):
            age = statuses.age_s(record.status)
            fresh = record.is_live or (age is not None and age < TWICE_S)
            same = {**record.spec, "out": ""} == wish and record.on == dict(on or {})
            if fresh and not record.parent and same:
                return record
        return launch(command, values, where, launcher, on)


def _wish(spec: RunSpec) -> dict[str, Any]:
    return {**to_dict(spec), "out": ""}


def _checked(command: str, values: Any) -> tuple[commands.Command, dict[str, Any]]:
    """Return the command and its options, or raise an error before anything is written."""
    entry = commands.get(command)
    if not entry.is_run:
        raise InputError(
            f"{command} does not create a run.", "Run it from the command line or call it directly."
        )
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
    build(entry.spec_class, {**values, "out": "checked"})
    if values.get("dry_run"):
        raise InputError(
            "A dry run cannot be launched as a job.", "Call the command's dry_run() instead."
        )
    return entry, values


@contextlib.contextmanager
def _one_launch(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder's launches, so that two wishes are looked at one after another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".launch.lock").open("a")
    except OSError as error:
        raise workspace.cannot_write(folder, error) from error
    with handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def launch_in(
    folder: Path,
    command: str,
    spec: RunSpec,
    launcher: Launcher | None = None,
    on: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Start a run in a given folder, creating it if necessary; see `launch`.

    A live run there is returned if it has the same options, and refused otherwise.
    """
    refuse_link(folder)
    nodes = int((on or {}).get("nodes") or 1)
    ranks.check_nodes(processes_of(spec), nodes, command, splits=hasattr(spec, "processes"))
    try:
        (folder / BOOKKEEPING).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise workspace.cannot_write(folder, error) from error
    with _one_launch(folder / BOOKKEEPING):
        found = read_run(folder)
        if found and found.is_live:
            if {**found.spec, "out": ""} == _wish(spec):
                return found
            raise busy(folder, f" ({found.command}, {found.state})")
        before = workspace.read_json(folder / BOOKKEEPING / "status.json") or {}
        status = _announce(folder, before)
        save_spec(folder, commands.get(command), spec, on=on)
        launcher = launcher or launcher_at(on or {})
        _start(launcher, command, spec, folder, status)
    record = read_run(folder)
    assert record is not None
    return record


def _announce(folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Record that a run is starting in ``folder``; ``before`` is the status it replaces.

    This comes before the new spec is written: a crash in between then leaves a lost run, never new
    options beside the results of an earlier run.
    """
    book = folder / BOOKKEEPING
    refuse_link(folder)
    try:
        workspace.unlink_links(book)
        (book / "cancel").unlink(missing_ok=True)
        (book / "launch.json").unlink(missing_ok=True)
    except OSError as error:
        raise workspace.cannot_write(folder, error) from error
    files = statuses.cleaned(before).get("files") or []
    status = {"state": "starting", **statuses.born(book), "files": files}
    workspace.write_json(book / "status.json", status)
    return status


def _start(
    launcher: Launcher, command: str, spec: RunSpec, folder: Path, status: dict[str, Any]
) -> None:
    """Start an announced run; mark it as failed if it cannot even be started."""
    argv = [sys.executable, "-m", "core", command, *to_arguments(spec)]
    try:
        launcher.start(argv, folder)
    except OSError as error:
        failed = RunError(
            f"Cannot start the run: {error.strerror or error}.", "Free up memory or disk space."
        )
        end = statuses.ending(status, "failed", failed.message, failed.hint)
        workspace.write_json(folder / BOOKKEEPING / "status.json", {**status, **end})
        raise failed from error


def restart(record: RunRecord, launcher: Launcher | None = None, **changes: object) -> RunRecord:
    """Start a failed, cancelled or lost run again in its own folder and working directory.

    A command that can resume does so; the others start over. If someone else has just restarted
    it, that run is returned. With ``changes`` of its options, a finished run that can resume may
    be continued as well, e.g. to merge the adapter of a retraining.
    """
    if not record.command:
        raise InputError(record.error, record.hint)
    entry = commands.get(record.command)
    again = {"resume": True} if "resume" in hints_of(entry.spec_class) else {}
    more = ("done",) if again and changes else ()
    if record.state not in ("failed", "cancelled", "lost", *more):
        raise InputError(
            f"Run {record.id} is {record.state}.",
            "Only a failed, cancelled or lost run can be restarted.",
        )
    folder = record.path.absolute()
    spec = build(entry.spec_class, {**record.spec, **changes, **again, "out": str(folder)})
    cwd = Path(record.cwd) if record.cwd and Path(record.cwd).is_dir() else None
    if record.is_elsewhere:
        again_there = record.state == "lost"
        launcher = launcher or launcher_at(record.on, again=again_there, spec=to_dict(spec))
    launcher = launcher or LocalLauncher(root=Workspace().root, cwd=cwd)
    refuse_link(folder)
    with _one_launch(folder / BOOKKEEPING):
        now = read_run(folder)
        if now and now.is_live:
            return now
        status = _announce(folder, record.status)
        save_spec(folder, entry, spec, cwd, record.on)
        _start(launcher, record.command, spec, folder, status)
    started = read_run(record.path)
    assert started is not None
    return started


def request_cancel(record: RunRecord) -> None:
    """Ask a run to stop; it kills itself if it is still running after its grace period."""
    if record.is_live:
        try:
            (record.path / BOOKKEEPING / "cancel").touch()
        except OSError as error:
            raise workspace.cannot_write(record.path, error) from error


def cancel(
    record: RunRecord, grace_s: float | None = None, launcher: Launcher | None = None
) -> RunRecord:
    """Ask a run to stop, wait ``grace_s`` (default: its command's), then kill it.

    Returns its final record. A run that has already ended or is lost is returned unchanged; a run
    on another machine is asked to stop but never killed, and returned as it is after the wait.
    A run that was announced but has no process is cancelled at once: should its process come up
    late, it finds the request and stops.
    """
    if not record.is_live:
        return record
    request_cancel(record)
    if grace_s is None:
        entry = commands.COMMANDS.get(record.command)
        grace_s = (entry.grace_s if entry else 20.0) + 3.0

    def ended() -> bool:
        current = read_run(record.path)
        return current is None or not current.is_live or _has_no_process(current)

    if not _until(ended, grace_s):
        current = read_run(record.path)
        if current is None or not (launcher or launcher_of(record)).kill(current):
            return current or record
    current = read_run(record.path)
    if current is not None and current.is_elsewhere:  # its follower records the end
        return current
    if current is None or (current.state != "lost" and not _has_no_process(current)):
        return current or record
    book = current.path / BOOKKEEPING
    error = KILLED if current.status.get("pid") else "Cancelled."
    end = {**current.status, **statuses.ending(current.status, "cancelled", error)}
    workspace.write_json(book / "status.json", end, parents=False)
    if workspace.owner_of(current.path, current.status):
        (book / "cancel").unlink(missing_ok=True)
    return read_run(record.path) or record


def kill_now(record: RunRecord) -> None:
    """End a run at once; one at another place is only asked for, so that no page waits for it."""
    if record.is_elsewhere and record.is_live:
        importlib.import_module("core.places.launcher").request(record)
    else:
        cancel(record, grace_s=0)


def _has_no_process(record: RunRecord) -> bool:
    """Whether a run of this machine was announced, but no process was started for it (yet)."""
    here = statuses.is_here(record.status)
    return here and record.is_live and not workspace.owner_of(record.path, record.status)


def command_line(command: str, spec: Spec, on: Mapping[str, Any] | None = None) -> str:
    """Return the shell command that is equivalent to a page's form; ``on`` is its place."""
    words = [*to_arguments(spec), *place_words(on or {})]
    return shlex.join(["python", "-m", "core", command, *words])
