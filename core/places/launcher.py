"""The launcher of runs at another place: it starts the process that follows the run there."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.places import place as place_file
from core.places.follow import FACTS, KILL
from core.runs import workspace
from core.runs.jobs import LocalLauncher
from core.runs.workspace import BOOKKEEPING, RunRecord, read_run

KILL_S = 20.0
"""How long to wait for the end of a run that is ended at once."""


class PlaceLauncher:
    """Starts runs at a place of the workspace's file."""

    def __init__(
        self,
        on: Mapping[str, Any],
        root: Path,
        *,
        again: bool = False,
        spec: Mapping[str, Any] | None = None,
    ) -> None:
        """Launch as ``on`` asks; raises `PlaceError` for an unknown place or an impossible wish.

        ``again`` follows a run that may still be going on there; ``spec`` has the run's options.
        """
        self._root, self._again = root, again
        if not again:
            place_file.find(str(on["place"]), root).for_run(on, spec or {})

    def start(self, argv: list[str], folder: Path) -> None:
        """Start the process that follows the run; ``argv`` is not for this machine."""
        facts = folder / BOOKKEEPING / FACTS
        before = workspace.read_json(facts) if self._again else None
        (folder / BOOKKEEPING / KILL).unlink(missing_ok=True)
        facts.unlink(missing_ok=True)
        if before:
            workspace.write_json(facts, {**before, "again": True})
        words = [sys.executable, "-m", "core.places.follow", str(folder)]
        _Plain(root=self._root).start(words, folder)

    def kill(self, record: RunRecord) -> bool:
        """End the run at once at its place; return False if nothing follows it here."""
        if not record.is_live:
            return False
        request(record)
        deadline = time.monotonic() + KILL_S
        while time.monotonic() < deadline:
            now = read_run(record.path)
            if now is None or not now.is_live:
                return now is not None and now.state != "lost"
            time.sleep(0.1)
        return False


class _Plain(LocalLauncher):
    """Starts processes without what a warm one has imported."""

    def __init__(self, *, root: Path) -> None:
        super().__init__(root=root)
        self._template = None


def request(record: RunRecord) -> None:
    """Ask for the end of a run at once, without waiting for it."""
    try:
        (record.path / BOOKKEEPING / KILL).touch()
    except OSError as error:
        raise workspace.cannot_write(record.path, error) from error
