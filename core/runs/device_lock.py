"""One computing run at a time on each device: a kernel file lock per user and device.

The lock lives outside any workspace, so two workspaces share it, and the kernel releases it when
its holder dies, for whatever reason. Waiting runs queue: each holds a lock on its own ticket file,
and the oldest live ticket goes next, by the monotonic clock that all processes share.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from core.errors import OutputError
from core.runs import devices

POLL_S = 0.2


def lock_dir() -> Path:
    """Return the folder of the locks: ``$DEPTHCUT_LOCK_DIR``, or one per user in /tmp.

    Raises `OutputError` for a link, and for a folder that others own or may write: they could hold
    the device, or have the lock files written elsewhere.
    """
    given = os.environ.get("DEPTHCUT_LOCK_DIR")
    base = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    path = Path(given) if given else base / f"depthcut-{os.getuid()}"
    problem = ""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _problem(path.lstat())
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise OutputError(
            f"Cannot use the device-lock directory {path}: {problem}.",
            "Set DEPTHCUT_LOCK_DIR to a directory that you own and that only you can write.",
        )
    return path


def _problem(found: os.stat_result) -> str:
    """Return why a folder cannot hold the locks; empty if it can."""
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link"
    if found.st_uid != os.getuid():
        return "it belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users can write to it (mode {stat.S_IMODE(found.st_mode):o}; 700 is right)"
    return ""


def _try_lock(handle: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock on ``path``; a shared lock, so checks do not collide."""
    try:
        with path.open("r") as handle:
            return not _try_lock(handle, fcntl.LOCK_SH)
    except OSError:
        return False


class DeviceLock:
    """The right to compute on one device; ``acquire`` queues for it."""

    def __init__(self, device: str, owner: dict[str, Any] | None = None) -> None:
        """Prepare a lock on ``device``; ``owner`` is shown to others while we hold it."""
        self.device = device
        self.owner = {"pid": os.getpid(), **(owner or {})}
        name = devices.lock_name(device)
        self._path = lock_dir() / f"{name}.lock"
        self._holder = lock_dir() / f"{name}.holder.json"
        self._queue = lock_dir() / f"{name}.queue"
        self._handle: IO[str] | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the device."""
        return self._handle is not None

    def acquire(self, on_wait: Callable[[str], None] | None = None) -> None:
        """Take the device, queueing if it is busy; ``on_wait`` is called with what is ahead.

        ``on_wait`` may raise to stop waiting.
        """
        if self.held:
            return
        self._queue.mkdir(exist_ok=True)
        ticket = self._queue / f"{time.monotonic_ns():020d}-{os.getpid()}"
        with ticket.open("w") as mine:
            fcntl.flock(mine, fcntl.LOCK_EX)
            mine.write(json.dumps(self.owner, default=str))
            mine.flush()
            try:
                while not (self._is_first(ticket) and self._take()):
                    if on_wait:
                        on_wait(self._describe(ticket))
                    time.sleep(POLL_S)
            finally:
                ticket.unlink(missing_ok=True)

    def release(self) -> None:
        """Release the device; does nothing if it is not held."""
        if self._handle is not None:
            self._holder.unlink(missing_ok=True)
            self._handle.close()
            self._handle = None

    def waiting(self) -> list[dict[str, Any]]:
        """Return the owners in the queue, first in line first."""
        return [self._read(path) for path in self._live_tickets()]

    def holder(self) -> dict[str, Any] | None:
        """Return who holds the device now, or None."""
        return (self._read(self._holder) or {"pid": 0}) if _is_locked(self._path) else None

    def _take(self) -> bool:
        handle = self._path.open("a+")
        if not _try_lock(handle):
            handle.close()
            return False
        temporary = self._holder.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.owner, default=str))
        temporary.replace(self._holder)
        self._handle = handle
        return True

    def _live_tickets(self) -> list[Path]:
        if not self._queue.is_dir():
            return []
        live = []
        for path in sorted(self._queue.iterdir()):
            if _is_locked(path):
                live.append(path)
            elif not 0 <= _age_s(path) <= 5:  # its owner has died; or an earlier boot's
                path.unlink(missing_ok=True)
        return live

    def _is_first(self, ticket: Path) -> bool:
        older = [p for p in self._live_tickets() if p.name < ticket.name]
        return not older

    def _describe(self, ticket: Path) -> str:
        ahead = [self.holder()] + [
            self._read(p) for p in self._live_tickets() if p.name < ticket.name
        ]
        known = [o for o in ahead if o and (o.get("run") or o.get("pid"))]
        names = [str(o.get("run") or f"process {o['pid']}") for o in known]
        return ", ".join(names) or "another run"

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text() or "{}")
        except (OSError, ValueError):
            return {}


def _age_s(ticket: Path) -> float:
    """Return the age of a ticket in seconds, by the monotonic clock that its name begins with."""
    born = ticket.name.partition("-")[0]
    return (time.monotonic_ns() - int(born)) / 1e9 if born.isdigit() else -1.0
