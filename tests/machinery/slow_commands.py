"""Commands for tests of the machinery: they wait, fail, ignore cancelling, fill the disk."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from core.commands import COMMANDS, Command
from core.errors import DataError, NotFiniteError
from core.runs.spec import DeviceOptions, ProcessOptions, option


@dataclass(frozen=True, kw_only=True)
class WaitSpec:
    """Wait in steps, as a computing command would work in steps."""

    out: str = option(help="Run directory.")
    steps: int = option(5, help="Steps.", low=0)
    pause: float = option(0.05, help="Pause in a step.", unit="s", low=0)
    device: str = option("", help="Device to take; none where empty.")
    go: str = option("", help="File that must appear before the work ends.")
    deaf: bool = option(False, help="Never look whether to stop.")
    fail: str = option("", help="error, crash or memory.")
    megabytes: int = option(0, help="Size of the result.")


@dataclass(frozen=True, kw_only=True)
class ResumableSpec(WaitSpec):
    """Wait, and go on where an earlier attempt ended."""

    resume: bool = option(False, help="Go on.")


@dataclass(frozen=True, kw_only=True)
class ComputeSpec(WaitSpec, DeviceOptions):
    """Wait as a command that recipes fork."""


@dataclass(frozen=True, kw_only=True)
class SharedSpec(ProcessOptions):
    """Wait in processes that meet in every step."""

    out: str = option(help="Run directory.")
    steps: int = option(5, help="Steps.", low=0)
    pause: float = option(0.05, help="Pause of every process in a step.", unit="s", low=0)
    slow: float = option(0.0, help="Further pause of the first process before the first step.")
    fail: str = option("", help="error, crash: how the last process fails after its first step.")
    resume: bool = option(False, help="Go on.")


def share(spec: SharedSpec, run) -> None:
    """Step together, then write who took part."""
    ranks = run.ranks
    run.write_json("pids.json", {"pids": ranks.gather(os.getpid())})
    if ranks.is_first:
        time.sleep(spec.slow)
    for step in range(spec.steps):
        time.sleep(spec.pause)
        if step and ranks.rank == ranks.size - 1 and spec.fail:
            error = NotFiniteError("NaN here.", "Mend it.") if spec.fail == "error" else None
            raise error or ZeroDivisionError("seven by zero")
        ranks.gather(step)
        run.progress.step(step + 1, spec.steps, f"step {step + 1}")
    run.write_json("summary.json", {"shares": ranks.gather(str(ranks.share(5)))})


def run(spec: WaitSpec, run) -> None:
    """Step, then write result.csv."""
    if isinstance(spec, SharedSpec):
        share(spec, run)
        return
    if isinstance(spec, ComputeSpec):
        run.progress.log(f"parent: {os.getppid()}")
    if spec.device:
        run.take_device(spec.device)
    run.progress.log("work begins")
    for step in range(spec.steps):
        time.sleep(spec.pause)
        run.progress.metric(step=step + 1, loss=1.0 / (step + 1))
        if not spec.deaf:
            run.progress.step(step + 1, spec.steps, f"step {step + 1}")
    while spec.go and not Path(spec.go).exists():
        time.sleep(0.02)
        if not spec.deaf:
            run.progress.check_cancel()
    if spec.fail == "error":
        raise DataError("The text has 3 tokens, 10 are needed.", "Give a longer text.")
    if spec.fail == "crash":
        raise ZeroDivisionError("seven by zero")
    if spec.fail == "memory":
        raise MemoryError
    if spec.megabytes:
        run.write_csv("big.csv", ("x",), [["0" * 1023] for _ in range(1024 * spec.megabytes)])
    run.write_csv("result.csv", ("step", "value"), [(i, None) for i in range(spec.steps)])


REGISTRY = {
    name: Command(name, __name__, "WaitSpec", "Wait (tests).", grace_s=grace)
    for name, grace in (("wait", 20.0), ("stubborn", 1.0))
}
REGISTRY["compute"] = Command("compute", __name__, "ComputeSpec", "Wait (tests).")
REGISTRY["shared"] = Command("shared", __name__, "SharedSpec", "Wait (tests).", grace_s=2.0)
REGISTRY["resumable"] = Command("resumable", __name__, "ResumableSpec", "Wait (tests).")


def register() -> None:
    """Add ``wait`` (20 s of grace), ``stubborn`` (1 s) and the others to this process."""
    COMMANDS.update(REGISTRY)
