"""Dry runs for pages: a separate process does the work while the page stays usable."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.runs import processes, warm
from core.runs.spec import Spec, to_arguments
from core.runs.workspace import Workspace

KEPT = 12
"""Maximum number of results to keep."""
STALE_S = 120.0
"""Free memory changes, so a result is computed again once it is this old."""


@dataclass
class DryRun:
    """One ``--dry-run``, in progress or finished."""

    process: subprocess.Popen[bytes] | warm.Process
    output: IO[bytes]
    errors: IO[bytes]
    began: float = field(default_factory=time.monotonic)
    plan: dict[str, Any] | None = None
    error: str = ""
    wanted_by: int = 0
    """Sessions that keep it."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_fresh(self) -> bool:
        """Whether it is in progress, or its result is recent."""
        return not self.poll() or time.monotonic() - self.began < STALE_S

    def poll(self) -> bool:
        """Read the result if it is there; return whether the dry run has finished."""
        with self._lock:
            return self._poll()

    def _poll(self) -> bool:
        if self.plan is not None or self.error:
            return True
        if self.process.poll() is None:
            return False
        try:
            self.plan = json.loads(_text(self.output))
        except ValueError:
            lines = [line for line in _text(self.errors).splitlines() if line.strip()]
            self.error = (lines or ["The dry run printed nothing."])[-1].removeprefix("Error: ")
        self._close()
        return True

    def stop(self) -> None:
        """End the process without a result."""
        self.process.kill()
        self.process.wait()
        self._close()

    def __del__(self) -> None:
        """End the process when its session has gone and nobody waits for the result."""
        with contextlib.suppress(Exception):
            self.stop()

    def _close(self) -> None:
        self.output.close()
        self.errors.close()


_shared: weakref.WeakValueDictionary[tuple[str, str], DryRun] = weakref.WeakValueDictionary()
"""The dry runs of all sessions of this process, by workspace and arguments."""
_asking = threading.Lock()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def ask(known: dict[str, DryRun], command: str, spec: Spec, where: Workspace) -> DryRun:
    """Return the dry run of a command, started if necessary; ``known`` is the session's store.

    Sessions with the same settings share one. Of a session's dry runs only the newest keeps
    running: processes of older ones are ended, unless another session waits for them.
    """
    arguments = [command, *to_arguments(spec)]
    key = json.dumps(arguments)
    with _asking:
        found = known.get(key)
        if found and found.is_fresh:
            return found
        for other, older in list(known.items()):
            if other == key or not older.poll():  # removed, so that it can be started again
                _leave(known, other)
        while len(known) >= KEPT:
            _leave(known, next(iter(known)))
        place = str(where.root.absolute()), key
        found = _shared.get(place)
        if found is None or not found.is_fresh:
            found = _shared[place] = _start(arguments, where)
        found.wanted_by += 1
        known[key] = found
        return found


def _leave(known: dict[str, DryRun], key: str) -> None:
    """Remove a dry run from a session's store, and stop it if no other session keeps it."""
    older = known.pop(key)
    older.wanted_by -= 1
    if not older.wanted_by and not older.poll():
        older.stop()
        for place in [p for p, run in _shared.items() if run is older]:
            del _shared[place]


def _start(arguments: list[str], where: Workspace) -> DryRun:
    """Start a dry run in a separate process."""
    env = processes.environment(DEPTHCUT_WORKSPACE=str(where.root.absolute()))
    # Files, not pipes: nobody reads while the process writes. They are deleted when closed.
    output, errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
    with Path(os.devnull).open("rb") as nothing:
        streams = (nothing.fileno(), output.fileno(), errors.fileno())
        argv = [*warm.MODULE, "core", *arguments, "--dry-run"]
        process = warm.start(warm.kept(), argv, streams=streams, env=env)
    return DryRun(process, output, errors)
