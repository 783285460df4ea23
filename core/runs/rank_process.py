"""A further process of a run: ``python -m core.runs.rank_process FOLDER RANK DEVICE DEVICE ...``.

It reads the run's options from its folder and runs the same command on its part of the rows; it
writes nothing there. Standard input tells it where to meet the others and closes when the run
ends; see `core.runs.rank_start`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core import commands, noise
from core.errors import Cancelled, DepthcutError
from core.runs import processes, rank_start, workspace
from core.runs.failures import as_known
from core.runs.progress import SILENT
from core.runs.run import Run
from core.runs.spec import build
from core.runs.workspace import BOOKKEEPING

FROM = "SLURM_LAUNCH_NODE_IPADDR"
"""Variable in which srun leaves the address of the node that called it, the first one."""
TRACE = 16_000
"""Characters of a traceback that are passed on."""


class Follower(Run):
    """A run in another of its processes: it computes, and neither writes nor reports."""

    def __init__(self, command: commands.Command, spec: Any, folder: Path) -> None:
        """Bind a command and its spec to ``folder``, which stays as it is."""
        super().__init__(command, spec, folder)
        self.progress = SILENT

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Leave it to the first process."""

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Leave it to the first process."""

    def write_text(self, name: str, text: str) -> None:
        """Leave it to the first process."""

    def note(self, name: str) -> None:
        """Leave it to the first process."""

    def write_status(self, **changes: Any) -> None:
        """Leave it to the first process."""

    def log(self, message: str, *, plain: bool = False) -> None:
        """Leave it to the first process, which says the same."""


class _Lifeline(threading.Thread):
    """Reads standard input: first the address at which the processes meet, then its end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.host, self.port = "", 0
        self.told = threading.Event()

    def run(self) -> None:
        text = b""
        while piece := os.read(0, 64):
            text += piece
            if text.endswith(b"\n"):
                host, port = text.decode().split()
                self.host, self.port = host, int(port)
                self.told.set()
        os._exit(1)  # the run has ended


def main(argv: Sequence[str]) -> int:
    """Run this process's part of the run and return the exit status."""
    reports = os.dup(1)
    os.dup2(2, 1)  # what libraries print is for the log
    lifeline = _Lifeline()
    lifeline.start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the first process, which ends us
    noise.silence()
    processes.share_cores()
    folder, rank, places = Path(argv[0]), int(argv[1]), argv[2:]
    try:
        _compute(folder, rank, places, lifeline)
    except BaseException as error:
        known = error if isinstance(error, DepthcutError) else as_known(error, folder=folder)
        trace = "" if known is error else traceback.format_exc()[-TRACE:].rstrip()
        told = {"error": type(known).__name__, "message": known.message, "hint": known.hint}
        line = json.dumps({**told, "trace": trace}) + "\n"
        os.write(reports, line.encode())
        return known.exit_status
    return 0


def _compute(folder: Path, rank: int, places: Sequence[str], lifeline: _Lifeline) -> None:
    saved = workspace.read_json(folder / BOOKKEEPING / "spec.json") or {}
    command = commands.get(str(saved.get("command")))
    module = command.load()
    spec = build(command.spec_class, saved.get("spec") or {})
    run = Follower(command, spec, folder)
    from torch.distributed import TCPStore

    lifeline.told.wait()
    host = (
        lifeline.host if lifeline.host == rank_start.HOST else os.environ.get(FROM, lifeline.host)
    )
    store = TCPStore(host, lifeline.port, None, False, timeout=rank_start.PATIENCE)
    with rank_start.joined(rank, places, store) as run.ranks:
        try:
            module.run(replace(spec, device=places[rank]), run)
        except Cancelled:
            return


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # without waiting for threads of the libraries
