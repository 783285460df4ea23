"""A run at another place from the command line: started, followed on the terminal, cancelled."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from core.commands import Command
from core.errors import Cancelled, RunError
from core.runs import jobs
from core.runs.run import prepare
from core.runs.spec import RunSpec, to_dict
from core.runs.workspace import BOOKKEEPING, RunRecord, read_run

POLL_S = 0.3


def execute(
    command: Command, spec: RunSpec, on: Mapping[str, Any], *, overwrite: bool, detach: bool
) -> int:
    """Carry out ``spec`` at a place and return the exit status.

    With ``detach``, return when the run has been handed over to the process that follows it. The
    first Ctrl-C asks the run to stop, the second leaves it alone.
    """
    folder = Path(spec.out)
    launcher = jobs.launcher_at(on, spec=to_dict(spec))
    replace = overwrite or any(getattr(spec, name, False) for name in ("resume", "overwrite"))
    prepare(folder, overwrite=replace, command=command.name)
    record = jobs.launch_in(folder, command.name, spec, launcher, on)
    if not detach:
        record = _Terminal(record).follow()
    print(json.dumps({"run": str(record.path), "place": record.place, "state": record.state}))
    if record.state == "failed" or record.state == "lost":
        raise RunError(record.error, record.hint)
    return Cancelled.exit_status if record.state == "cancelled" else 0


class _Terminal:
    """A run as it is followed on a terminal."""

    def __init__(self, record: RunRecord) -> None:
        self._record, self._at, self._signals = record, 0, 0

    def follow(self) -> RunRecord:
        """Print the log until the run ends and return its record."""
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while True:
                record = read_run(self._record.path) or self._record
                self._print()
                if not record.is_live:
                    return record
                if self._signals > 1:
                    print("The run goes on; see: python -m core jobs list.", file=sys.stderr)
                    return record
                time.sleep(POLL_S)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            jobs.request_cancel(self._record)

    def _print(self) -> None:
        try:
            with (self._record.path / BOOKKEEPING / "log.txt").open("rb") as handle:
                handle.seek(self._at)
                data = handle.read()
        except OSError:
            return
        self._at += len(data)
        sys.stderr.write(data.decode(errors="replace"))
        sys.stderr.flush()
