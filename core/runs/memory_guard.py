"""End a process that a limit on its address space (ulimit -v) has stopped without an exception.

When not even a small object can be allocated, CPython can retry raising MemoryError for ever:
``evaluate`` was seen to import a library for minutes, deaf to signals. The guard keeps some address
space back and gives it up first, which usually lets the exception come out; if the process is stuck
nevertheless, the run is ended and says why.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from core.errors import OutOfMemoryError
from core.runs.devices import GIB, MIB

SPARE_BYTES = 16 * MIB
LOW_BYTES = 2 * MIB
"""With less than this left, Python cannot get memory for its next objects."""
STUCK_S = 10.0


def limit_bytes() -> int | None:
    """Return the limit of this process's address space; None if it has none."""
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def used_bytes() -> int:
    """Return the size of this process's address space; 0 if the kernel does not report it."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class MemoryGuard:
    """Watches the address space from another thread; does nothing without a limit."""

    def __init__(self) -> None:
        """Keep the spare address space back; it takes no memory, since it is never touched."""
        self._limit = limit_bytes()
        self._spare: bytearray | None = None
        if self._limit is not None and self._limit - used_bytes() > 4 * SPARE_BYTES:
            self._spare = bytearray(SPARE_BYTES)
        self._since: float | None = None
        self._mark: object = None

    def is_stuck(self, mark: object) -> bool:
        """Whether the limit has been reached for a while without any progress.

        ``mark`` is anything that changes when the run makes progress.
        """
        if self._limit is None:
            return False
        try:
            left = self._limit - used_bytes()
        except MemoryError:
            left = 0
        if left > LOW_BYTES or mark != self._mark:
            self._since, self._mark = None, mark
            return False
        self._spare = None
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return now - self._since > STUCK_S

    def error(self) -> OutOfMemoryError:
        """Return the error of a stuck run."""
        return OutOfMemoryError(
            f"Out of memory: the limit of {(self._limit or 0) / GIB:.1f} GiB of address space "
            "(ulimit -v) is reached.",
            "Raise the limit, e.g. with ulimit -v unlimited.",
        )
