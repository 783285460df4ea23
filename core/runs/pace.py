"""How fast this workspace's finished runs computed, for estimates of what a new one will take."""

from __future__ import annotations

from dataclasses import dataclass

from core.runs.results import JsonResult
from core.runs.workspace import Workspace


@dataclass(frozen=True)
class _Pace(JsonResult):
    """What every summary with a rate has."""

    device: str = ""
    flops_per_s: float | None = None


def flops_per_s(command: str, device: str) -> float | None:
    """Return the operations per second of the newest finished run of ``command`` on ``device``.

    ``device`` is as ``--device`` has it; auto takes any. None if there is no such run.
    """
    for record in Workspace().runs(command):
        found = _Pace.read(record.path) or _Pace()
        same = device == "auto" or found.device.startswith(device)
        if record.state == "done" and same and found.flops_per_s:
            return found.flops_per_s
    return None
