"""Processes of ours: the environment they start in, and whether one is still the one we knew.

A pid alone is reused; a pid with its start time is not.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
"""The checkout."""


def share_cores(env: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's idle threads sleep instead of spinning; before torch is imported.

    By default an idle thread spins for up to milliseconds, on a core that another process could
    use: with one thread a core, two processes side by side took 23 times as long as one alone, and
    2.6 times when they slept. A policy that the user has set stays.
    """
    if "GOMP_SPINCOUNT" not in env:
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def environment(*added: Mapping[str, str], **more: str) -> dict[str, str]:
    """Return this process's environment with ``added`` and ``more``, and with our code importable.

    A process may then run in any folder, and shares the cores with others (`share_cores`).
    """
    env = dict(os.environ)
    share_cores(env)
    for values in (*added, more):
        env |= values
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT), env.get("PYTHONPATH"))))
    return env


def start_time(pid: int) -> float | None:
    """Return a value that is fixed for a process's lifetime and differs if its pid is reused.

    None if the process does not exist, or has ended and only waits to be reaped.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else float(fields[19])
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def identity() -> dict[str, float | int | None]:
    """Return this process's pid and start time, as kept in status files."""
    return {"pid": os.getpid(), "pid_started": start_time(os.getpid())}


def is_alive(pid: object, started: object) -> bool:
    """Whether the process with this pid and start time is still running."""
    if not isinstance(pid, int):
        return False
    now = start_time(pid)
    if now is None:
        return False
    return not isinstance(started, (int, float)) or abs(now - started) < 1.5


def memory_mib(key: str = "VmRSS:") -> float:
    """Return a figure of this process's memory: ``VmRSS:``, ``VmHWM:`` (peak) or ``VmSize:``.

    If the kernel does not report it (outside Linux), the peak resident memory stands for all.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return float(line.split()[1]) / 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2.0**20 if sys.platform == "darwin" else 1024.0)
