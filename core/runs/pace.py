"""How fast this workspace's finished runs computed, for estimates of what a new one will take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.runs.results import JsonResult
from core.runs.workspace import Workspace

NEAR = 0.2
"""Models whose sizes differ by less than about a fifth compute alike; the newer run counts."""


@dataclass(frozen=True)
class _Pace(JsonResult):
    """What every summary with a rate has."""

    device: str = ""
    flops_per_s: float | None = None
    parameters: int | None = None


def flops_per_s(command: str, device: str, parameters: int) -> float | None:
    """Return the operations per second of a finished run of ``command`` on ``device``.

    Of several, the run whose model is nearest in size to ``parameters`` counts, and of those the
    newest: a small model spends most of its time on other things than operations, so its rate is
    many times lower. ``device`` is as ``--device`` has it; auto takes any. None if there is no run.
    """
    best, rate = math.inf, None
    for record in Workspace().runs(command):
        if record.state != "done":
            continue
        found = _Pace.read(record.path) or _Pace()
        if not found.flops_per_s or (device != "auto" and not found.device.startswith(device)):
            continue
        # runs of earlier versions did not record the size
        apart = abs(math.log((found.parameters or 1) / parameters))
        if apart < best - NEAR:
            best, rate = apart, found.flops_per_s
    return rate
