"""status.json, checked field by field, and the clocks and folder that it was written by.

A field of the wrong type, or a number that cannot be what the field means, is dropped when the
file is read: one damaged file never breaks a list of runs.

Durations come from the monotonic clock, which all processes of a machine share until it is
restarted: setting the wall clock changes no duration. ``created`` and ``finished`` are times of
day, for people.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LATEST_S = 253_402_300_799.0
"""The last second of the year 9999, in Unix seconds; no time of a run is later."""
MOST_STEPS = 10**15


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any, low: float, high: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if low <= value <= high else None  # NaN is in no range


def _time(value: Any) -> float | None:
    return _number(value, 0.0, LATEST_S)


def _span(value: Any) -> float | None:
    return _number(value, -LATEST_S, LATEST_S)


def _whole(value: Any, low: int = 0, high: int = MOST_STEPS) -> int | None:
    found = _number(value, low, high)
    return None if found is None else int(found)


def _pid(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**31 else None


def _inode(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**64 else None


def _names(value: Any) -> list[str] | None:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else None


def _progress(value: Any) -> dict[str, Any] | None:
    return _cleaned(value, _PROGRESS) if isinstance(value, dict) else None


_PROGRESS: dict[str, Callable[[Any], Any]] = {
    "done": _whole,
    "total": _whole,
    "first": _whole,
    "message": _text,
    "since": _time,
    "at": _time,
    "since_clock": _span,
    "at_clock": _span,
    "left_s": _time,
}
_STATUS: dict[str, Callable[[Any], Any]] = {
    "state": _text,
    "created": _time,
    "finished": _time,
    "clock": _span,
    "seconds": _time,
    "host": _text,
    "pid": _pid,
    "pid_started": _span,
    "inode": _inode,
    "device": _text,
    "waiting_for": _text,
    "error": _text,
    "hint": _text,
    "job": _text,
    "files": _names,
    "progress": _progress,
}


def _cleaned(values: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], Any]]) -> dict:
    found = {}
    for key, value in values.items():
        kept = kinds[key](value) if key in kinds else value
        if kept is not None or value is None:
            found[key] = kept
    return found


def cleaned(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a parsed status.json that have the right type; unknown keys stay."""
    return _cleaned(values, _STATUS)


# ------------------------------------------------------------------------------ whose it is


def born(book: Path) -> dict[str, Any]:
    """Return what a new status says of time and place; ``book`` is the run's ``.run`` folder."""
    here = {"created": time.time(), "clock": time.monotonic(), "host": socket.gethostname()}
    inode = inode_of(book)
    return here if inode is None else {**here, "inode": inode}


def inode_of(folder: Path) -> int | None:
    """Return the number by which the file system knows a folder; None if it does not exist."""
    try:
        return os.stat(folder, follow_symlinks=False).st_ino
    except OSError:
        return None


def is_copy(book: Path, status: Mapping[str, Any]) -> bool:
    """Whether ``status`` was written for another folder than ``book``, e.g. before ``cp -r``.

    Its process then works for that other folder. A moved or linked run is not a copy.
    """
    inode = status.get("inode")
    return is_here(status) and inode is not None and inode != inode_of(book)


def is_here(status: Mapping[str, Any]) -> bool:
    """Whether ``status`` was written on this machine."""
    return status.get("host") in (None, socket.gethostname())


# --------------------------------------------------------------------------------- durations


def age_s(status: Mapping[str, Any]) -> float | None:
    """Return the seconds since a run was created; None if the machine was restarted or if unknown.

    Never negative. Statuses without a monotonic clock, or of another machine, go by the wall clock.
    """
    clock, created = status.get("clock"), status.get("created")
    if clock is None or not is_here(status):
        return max(0.0, time.time() - created) if created else None
    return None if clock > time.monotonic() else time.monotonic() - clock


def took_s(status: Mapping[str, Any]) -> float:
    """Return the seconds that an ended run took, from its creation."""
    seconds = status.get("seconds")
    if seconds is not None:
        return float(seconds)
    created, finished = status.get("created") or 0.0, status.get("finished") or 0.0
    return max(0.0, finished - created)


UNKNOWN_S = -1.0
"""What a run whose steps take very different times reports as its time left."""


def eta_s(status: Mapping[str, Any]) -> float | None:
    """Return the seconds left: as the run itself estimated, else at the pace so far.

    None before the first step, and if the run reports that it cannot estimate them (a negative
    number, `UNKNOWN_S`). Steps that a resumed run had already completed do not count towards
    the pace.
    """
    step = status.get("progress") or {}
    done, total, first = (step.get(name) or 0 for name in ("done", "total", "first"))
    since, at, now = step.get("since_clock"), step.get("at_clock"), time.monotonic()
    if since is None or at is None or not is_here(status):
        since, at, now = step.get("since"), step.get("at"), time.time()
    told = step.get("left_s")
    if told is not None and told < 0:
        return None
    if told is not None and at:
        return max(0.0, told - max(0.0, now - at))
    if not since or not at or done <= first or total <= 0:
        return None
    pace = max(0.0, at - since) / (done - first)
    left = max(0.0, pace * (total - done) - max(0.0, now - at))
    return left if math.isfinite(left) else None


def ending(status: Mapping[str, Any], state: str, error: str = "", hint: str = "") -> dict:
    """Return the fields of a run's end, ``finished`` and ``seconds`` included."""
    seconds = age_s(status) or 0.0
    created = status.get("created") or time.time()
    finished = max(time.time(), created + seconds) if time.time() < created else time.time()
    return {
        "state": state,
        "error": error,
        "hint": hint,
        "finished": finished,
        "seconds": seconds,
        "waiting_for": "",
    }
