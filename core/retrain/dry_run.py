"""Dry runs beside the page: a process of its own counts tokens while the page stays usable."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.retrain.spec import RetrainSpec
from core.runs.spec import to_arguments
from core.runs.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
KEPT = 12
"""Answers that are remembered."""
STALE_S = 120.0
"""Free memory changes, so an answer is asked for again after so long."""


@dataclass
class DryRun:
    """One ``--dry-run`` under way or answered."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    said: IO[bytes]
    began: float = field(default_factory=time.monotonic)
    plan: dict[str, Any] | None = None
    error: str = ""

    def poll(self) -> bool:
        """Take in the answer if it is there; whether it is."""
        if self.plan is not None or self.error:
            return True
        if self.process.poll() is None:
            return False
        try:
            self.plan = json.loads(_text(self.output))
        except ValueError:
            lines = [line for line in _text(self.said).splitlines() if line.strip()]
            self.error = (lines or ["The dry run said nothing."])[-1].removeprefix("Error: ")
        self._close()
        return True

    def stop(self) -> None:
        """End the process; there will be no answer."""
        self.process.kill()
        self.process.wait()
        self._close()

    def __del__(self) -> None:
        """End what nobody waits for any more: the session that asked has gone."""
        with contextlib.suppress(Exception):
            self.stop()

    def _close(self) -> None:
        self.output.close()
        self.said.close()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def ask(known: dict[str, DryRun], spec: RetrainSpec, where: Workspace) -> DryRun:
    """Return the dry run of ``spec``, started if need be; ``known`` is the session's memory.

    Only the newest question is worked on: processes of older ones are ended.
    """
    arguments = to_arguments(spec)
    key = json.dumps(arguments)
    found = known.get(key)
    if found and (not found.poll() or time.monotonic() - found.began < STALE_S):
        return found
    for other, older in list(known.items()):
        if not older.poll():  # stopped and forgotten, so that it can be asked again
            older.stop()
            del known[other]
    while len(known) >= KEPT:
        del known[next(iter(known))]
    env = {**os.environ, "DEPTHCUT_WORKSPACE": str(where.root.absolute())}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    # Files rather than pipes: nobody reads while the process writes. They vanish when closed.
    output, said = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "core", "retrain", *arguments, "--dry-run"],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=said,
        env=env,
    )
    known[key] = DryRun(process, output, said)
    return known[key]
