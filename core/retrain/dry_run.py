"""Dry runs for the page: a separate process counts tokens while the page stays usable."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, Any

from core.retrain.spec import RetrainSpec
from core.runs import processes
from core.runs.spec import to_arguments
from core.runs.workspace import Workspace

KEPT = 12
"""Maximum number of results to keep."""
STALE_S = 120.0
"""Free memory changes, so a result is computed again once it is this old."""


@dataclass
class DryRun:
    """One ``--dry-run``, in progress or finished."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]
    began: float = field(default_factory=time.monotonic)
    plan: dict[str, Any] | None = None
    error: str = ""

    def poll(self) -> bool:
        """Read the result if it is there; return whether the dry run has finished."""
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


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def ask(known: dict[str, DryRun], spec: RetrainSpec, where: Workspace) -> DryRun:
    """Return the dry run of ``spec``, started if necessary; ``known`` is the session's store.

    Only the newest dry run keeps running: processes of older ones are ended.
    """
    arguments = to_arguments(spec)
    key = json.dumps(arguments)
    found = known.get(key)
    if found and (not found.poll() or time.monotonic() - found.began < STALE_S):
        return found
    for other, older in list(known.items()):
        if not older.poll():  # stopped and removed, so that it can be started again
            older.stop()
            del known[other]
    while len(known) >= KEPT:
        del known[next(iter(known))]
    env = processes.environment(DEPTHCUT_WORKSPACE=str(where.root.absolute()))
    # Files, not pipes: nobody reads while the process writes. They are deleted when closed.
    output, errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "core", "retrain", *arguments, "--dry-run"],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        env=env,
    )
    known[key] = DryRun(process, output, errors)
    return known[key]
