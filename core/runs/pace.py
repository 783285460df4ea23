"""How fast this workspace's finished runs computed, for estimates of what a new one will take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from core.runs import devices
from core.runs.results import JsonResult
from core.runs.workspace import RunRecord, Workspace

T = TypeVar("T")

CPU_FLOPS_PER_CORE = 1.5e10
"""Assumed speed of small models on one core, until something has been measured here."""
START_S = 3.0
"""A process that imports torch and loads a small model, roughly."""
CUT_START_S = 0.5
"""A process that cuts by copying bytes, without torch, roughly."""
COPY_BYTES_PER_S = 2e8
"""Speed of writing a checkpoint, roughly: a disk, until something has been measured here."""
COUNTED = 5e7
"""Bytes from which on a cut tells the speed of copying; smaller ones mostly start a process."""
MEASURED = "the rate of the last run in this workspace"
ASSUMED = "an assumed rate, as nothing has been measured here yet"
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

    Of several, `nearest` counts: a small model spends most of its time on other things than
    operations, so its rate is many times lower. ``device`` is as ``--device`` has it; rates of
    another kind of device do not count. None if there is no run.
    """
    return nearest(_rates(command, device), parameters)


def _rates(command: str, device: str) -> Iterator[Rate]:
    for record in finished(command):
        found = _Pace.read(record.path) or _Pace()
        if found.flops_per_s and is_on(found.device, device):
            yield Rate(found.flops_per_s, found.parameters or 1)  # earlier versions had no size


@dataclass(frozen=True)
class Rate:
    """The speed of one finished run."""

    flops_per_s: float
    parameters: int
    alike: bool = True
    """Whether it did the same kind of work; counts among models of like size."""


def nearest(rates: Iterable[Rate], parameters: int) -> float | None:
    """Return the rate to go by, of runs from the newest on; None if there are none.

    Of those of like size a run that did the same kind of work counts, and then the newest.
    """
    near = of_like_size([(rate.parameters, rate) for rate in rates], parameters)
    found = next((rate for rate in near if rate.alike), near[0] if near else None)
    return found.flops_per_s if found else None


def of_like_size(sized: Sequence[tuple[float, T]], parameters: int) -> list[T]:
    """Return those whose sizes are as near to ``parameters`` as the nearest one's.

    Give or take `NEAR`; in the order in which they come.
    """
    every = [(abs(math.log(size / parameters)), one) for size, one in sized]
    least = min((apart for apart, _ in every), default=0.0)
    return [one for apart, one in every if apart < least + NEAR]


def finished(command: str) -> Iterator[RunRecord]:
    """Yield this machine's finished runs of a command from the newest on."""
    for record in Workspace().runs(command):
        if record.state == "done" and not record.is_elsewhere:  # other machines have other rates
            yield record


def is_on(measured: str, wanted: str) -> bool:
    """Whether a run's device is of the kind that ``--device WANTED`` means."""
    return measured.partition(":")[0] == devices.meant(wanted).partition(":")[0]


def measured(commands: Iterable[str], device: str, parameters: int) -> float | None:
    """Return the operations per second of the first of these commands that has finished runs."""
    rates = (flops_per_s(command, device, parameters) for command in commands)
    return next((rate for rate in rates if rate), None)


def expected(
    commands: Iterable[str], device: str, parameters: int
) -> tuple[float | None, str | None]:
    """Return the rate to estimate with and its origin: measured, or assumed on a CPU."""
    if rate := measured(commands, device, parameters):
        return rate, MEASURED
    if devices.meant(device) == "cpu":
        return CPU_FLOPS_PER_CORE * (os.cpu_count() or 1), ASSUMED
    return None, None


def writing(size: float) -> tuple[float, str]:
    """Return the seconds of writing ``size`` bytes of a checkpoint, and the rate's origin.

    The rate is that of the newest cut in this workspace that copied at least `COUNTED` bytes; until
    there is one, an assumed one.
    """
    for record in finished("prune"):
        if record.spec.get("heal", "none") != "none":
            continue
        written = sum(file.stat().st_size for file in record.path.glob("*.safetensors"))
        if written >= COUNTED and (spent := record.seconds - CUT_START_S) > 0:
            return size * spent / written, "the rate of the last cut in this workspace"
    return (
        size / COPY_BYTES_PER_S,
        "an assumed rate of writing, as no large cut has been made here yet",
    )
