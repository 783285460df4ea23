"""The metrics of a run, read on from where the last look ended. No Streamlit here.

A run of 100,000 steps writes some 20 MB; reading all of it every second would be too slow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SERIES = ("loss", "lr", "grad_norm", "tokens_per_s", "memory_mib", "tokens")


def evaluation_table(folder: Path) -> Path | None:
    """Return the table of further evaluation in a retraining's folder, None if there is none.

    It is the folder's only CSV file, evaluation.csv; earlier versions gave it another name.
    """
    return next(iter(sorted(folder.glob("*.csv"))), None)


@dataclass
class MetricLog:
    """What metrics.jsonl of a retraining says so far."""

    path: Path
    steps: list[int] = field(default_factory=list)
    series: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in SERIES})
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    version: int = 0
    """Grows with every look that found something new."""
    _read: int = 0
    _file: int = 0

    def update(self) -> bool:
        """Read what was added; begin anew where the file was replaced (resumed). True if new."""
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
        whole = text[: text.rfind(b"\n") + 1]  # a line that is being written waits
        self._read += len(whole)
        for line in whole.splitlines():
            self._take(line)
        self.version += bool(whole)
        return bool(whole)

    def _clear(self) -> None:
        self.steps, self.evaluations, self.findings, self._read = [], [], [], 0
        self.series = {name: [] for name in SERIES}
        self.version += 1

    def _take(self, line: bytes) -> None:
        try:
            value = json.loads(line)
        except ValueError:
            return
        event = value.get("event") if isinstance(value, dict) else "unreadable"
        if event == "eval":
            self.evaluations.append(value)
        elif event == "finding":
            self.findings.append(value)
        elif event is None and isinstance(value.get("step"), int):
            self.steps.append(value["step"])
            for name, kept in self.series.items():
                kept.append(value.get(name))

    def last(self, name: str) -> Any:
        """Return the newest value of a series, None before the first step."""
        return self.series[name][-1] if self.series[name] else None
