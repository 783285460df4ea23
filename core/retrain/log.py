"""The metrics of a run, read incrementally. No Streamlit here.

A run of 100,000 steps writes about 20 MB; reading all of it every second would be too slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from core.retrain.results import Evaluation, Notice, Step, metric


@dataclass
class MetricLog:
    """The content of a retraining's metrics.jsonl so far."""

    path: Path
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    findings: list[Notice] = field(default_factory=list)
    version: int = 0
    """Increases with every update that found something new."""
    _read: int = 0
    _file: int = 0

    def update(self) -> bool:
        """Read what was added, or all if the file was replaced (resumed); True if there is news."""
        try:
            with self.path.open("rb") as handle:
                size = handle.seek(0, 2)
                number = self.path.stat().st_ino
                if size < self._read or (self._read and number != self._file):
                    self._clear()
                if size == self._read:
                    return False
                handle.seek(self._read)
                text = handle.read()
        except OSError:
            return False
        self._file = number
        whole = text[
            : text.rfind(b"\n") + 1
        ]  # a line that is still being written is read next time
        self._read += len(whole)
        for line in whole.splitlines():
            self._take(line)
        self.version += bool(whole)
        return bool(whole)

    def _clear(self) -> None:
        self.steps, self.evaluations, self.findings, self._read = [], [], [], 0
        self.version += 1

    def _take(self, line: bytes) -> None:
        value = metric(line)
        if isinstance(value, Step):
            self.steps.append(value)
        elif isinstance(value, Evaluation):
            self.evaluations.append(value)
        elif value:
            self.findings.append(value)
