"""Progress reports of computing code, independent of its environment.

Computing functions take a ``progress: Progress`` and call it at natural steps. The base class
does nothing, so the same functions serve a script or a test; inside a run,
`core.runs.run.RunProgress` writes status, metrics and heartbeat into the run directory and raises
`Cancelled` when asked.
"""

from __future__ import annotations

import sys


class Progress:
    """Silent progress; subclasses write it somewhere."""

    def step(self, done: int, total: int, message: str = "") -> None:
        """Report that ``done`` of ``total`` steps are finished; raises `Cancelled` if asked to."""

    def metric(self, **values: float | int | str | None) -> None:
        """Append named values to the run's metrics, as one line."""

    def log(self, message: str) -> None:
        """Write one line for a human reader."""

    def check_cancel(self) -> None:
        """Raise `Cancelled` if the run was asked to stop; cheap enough for inner loops."""


class StderrProgress(Progress):
    """Progress of a command without a run directory: lines on standard error."""

    def log(self, message: str) -> None:
        """Print one line."""
        print(message, file=sys.stderr, flush=True)


SILENT = Progress()
