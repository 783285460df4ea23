"""Progress reports of computing code, independent of its environment.

Computing functions take a ``progress: Progress`` and call it at natural steps. The base class
does nothing, so the same functions serve a script or a test; inside a run,
`core.runs.run.RunProgress` writes status, metrics and heartbeat into the run directory and raises
`Cancelled` when asked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


class Progress:
    """Silent progress; subclasses write it somewhere."""

    def step(
        self, done: int, total: int, message: str = "", *, left_s: float | None = None
    ) -> None:
        """Report that ``done`` of ``total`` steps are finished; raises `Cancelled` if asked to.

        ``left_s``: the seconds left, if more is known of them than the pace of these steps.
        """

    def begin(self) -> None:
        """Report that the next of several parts begins; see `InParts`."""

    def metric(self, **values: float | int | str | None) -> None:
        """Append named values to the run's metrics, as one line."""

    def log(self, message: str) -> None:
        """Write one line for a human reader."""

    def check_cancel(self) -> None:
        """Raise `Cancelled` if the run was asked to stop; cheap enough for inner loops."""


class InParts(Progress):
    """Progress of work in several parts that report their own steps, as one whole."""

    SCALE = 1000

    def __init__(self, whole: Progress, weights: Sequence[float]) -> None:
        """Report to ``whole``; ``weights`` are what the parts take, in any unit."""
        self._whole, self._weights = whole, [max(w, 1e-9) for w in weights]
        self._place = -1

    def begin(self) -> None:
        """The next part begins."""
        self._place = min(self._place + 1, len(self._weights) - 1)

    def step(
        self, done: int, total: int, message: str = "", *, left_s: float | None = None
    ) -> None:
        """Report a step of the part under way."""
        place = max(self._place, 0)
        share = min(1.0, done / total) if total else 0.0
        before = sum(self._weights[:place]) + share * self._weights[place]
        all_ = self.SCALE * len(self._weights)
        self._whole.step(round(all_ * before / sum(self._weights)), all_, message)

    def metric(self, **values: float | int | str | None) -> None:
        """Append named values to the run's metrics."""
        self._whole.metric(**values)

    def log(self, message: str) -> None:
        """Write one line for a human reader."""
        self._whole.log(message)

    def check_cancel(self) -> None:
        """Raise `Cancelled` if the run was asked to stop."""
        self._whole.check_cancel()


class StderrProgress(Progress):
    """Progress of a command without a run directory: lines on standard error."""

    def log(self, message: str) -> None:
        """Print one line."""
        print(message, file=sys.stderr, flush=True)


SILENT = Progress()
