"""``python -m core doctor``: does every computing path work on this machine?

The checks run in a separate process (`core.doctor.worker`), one after another. A check that
raises an error or hangs is reported, the rest go on, and a check that left the device unusable gets
a new process after it. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.doctor import plan
from core.doctor.plan import Check
from core.doctor.results import (
    FAILED,
    GOOD,
    SKIPPED,
    WRONG,
    Diagnosis,
    Machine,
    Rate,
    Verdict,
)
from core.errors import OptionError, RunError
from core.runs import devices, processes
from core.runs.results import from_dict
from core.runs.spec import option
from core.words import size

if TYPE_CHECKING:
    from core.runs.run import Run

POLL_S = 0.2
WORKER = ("-m", "core.doctor.worker")
START_S = 120.0
"""Time for a process to start: importing torch from a cold disk takes a minute."""
LEAST_S = 3.0
"""A check is not begun with less time than this."""
TEXT = "doctor.md"
WORDS = {GOOD: "ok", WRONG: "WRONG", FAILED: "FAILED", SKIPPED: "skipped"}


@dataclass(frozen=True, kw_only=True)
class DoctorSpec:
    """Check that every computing path works on this machine, on the bundled demo, offline."""

    device: str = option("auto", help="auto, cpu, cuda, cuda:1 or mps.")
    json: bool = option(False, help="Print one JSON document instead of text.")
    only: tuple[str, ...] = option((), choices=plan.NAMES, help="Checks to run. Default: all.")
    minutes: float = option(
        5.0,
        low=0.1,
        high=60,
        help="Time limit; checks that do not fit into it are skipped and named.",
    )
    out: str = option("", help="Run directory to write. Default: a new one in the workspace.")


def run(spec: DoctorSpec, run: Run) -> None:
    """Carry out the checks; raises `RunError` naming those that disagree or failed."""
    say = _silent if spec.json else _say
    doctor = Doctor(spec, run, say)
    try:
        doctor.examine()
    finally:
        found = doctor.diagnosis()
        found.write(run)
        run.write_text(TEXT, text(found))
    if spec.json:
        _say(json.dumps(found.to_dict(), indent=2))
    else:
        say("\n" + found.verdict)
    wrong = [check.title for check in found.checks if check.is_wrong]
    if wrong:
        count = "1 check" if len(wrong) == 1 else f"{len(wrong)} checks"
        raise RunError(
            f"{count} did not pass on {found.machine.device or spec.device}: {'; '.join(wrong)}.",
            f"The reasons are in {run.path(TEXT)}.",
        )


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def _silent(line: str) -> None:
    """Print nothing: with --json only the document goes to standard output."""


class Doctor:
    """One examination: the machine, then the checks one after another."""

    def __init__(self, spec: DoctorSpec, run: Run, say: Callable[[str], None]) -> None:
        """Prepare the checks that ``spec`` asks for."""
        self.spec, self.run, self.say = spec, run, say
        self.checks = [c for c in plan.CHECKS if not spec.only or c.name in spec.only]
        self.began = time.monotonic()
        self.end = self.began + 60 * spec.minutes
        self.machine = Machine()
        self.verdicts: list[Verdict] = []

    def examine(self) -> None:
        """Look at the machine, then carry out the checks.

        Raises `OptionError` for a device that does not exist, and `Cancelled`.
        """
        with (
            tempfile.TemporaryDirectory(prefix="depthcut-doctor-") as folder,
            contextlib.ExitStack() as stack,
        ):
            workers = Workers(self.spec.device, Path(folder), self.run)
            stack.callback(workers.stop)
            self._step("the machine")
            answer = workers.ask("machine", min(START_S + 60.0, self._left()))
            self._take_machine(answer)
            for check in self.checks:
                self._step(check.title)
                verdict = self._check(check, workers)
                self.verdicts.append(verdict)
                self.say(line(verdict))
        self._step("Done.")

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _step(self, message: str) -> None:
        self.run.progress.step(len(self.verdicts), len(self.checks), message)

    def _take_machine(self, answer: dict[str, Any]) -> None:
        """Take what the device is, and report a GPU that auto had to pass over."""
        if answer.get("input"):
            raise OptionError(str(answer.get("message", "")), str(answer.get("hint", "")))
        self.machine = from_dict(Machine, answer.get("machine") or {}) or Machine()
        title = "The device"
        if "error" in answer:
            self.verdicts.append(
                Verdict(name="device", title=title, state=FAILED, text=answer["error"])
            )
        else:
            for about in describe(self.machine):
                self.say(about)
        gpus = devices.unusable() if self.spec.device == "auto" else ()
        if self.machine.device == "cpu":
            asked = devices.resolve(self.spec.device)
            texts = [str(gpu) for gpu in gpus]
            if asked != "cpu":
                texts.append(f"The driver lists {asked}, but torch cannot use it.")
            self.verdicts += [
                Verdict(name="device", title=title, state=WRONG, text=text) for text in texts
            ]
        for verdict in self.verdicts:
            self.say(line(verdict))

    def _check(self, check: Check, workers: Workers) -> Verdict:
        """Carry out one check, or tell why it is skipped."""
        blank = Verdict(name=check.name, title=check.title)
        absent = [n for n in check.needs if importlib.util.find_spec(n) is None]
        if absent:
            names = " and ".join(plan.PACKAGES.get(name, name) for name in absent)
            be = "is" if len(absent) == 1 else "are"
            return replace(blank, text=f"{names} {be} not installed")
        if check.only_cuda and not self.machine.device.startswith("cuda"):
            return replace(blank, text="only on an NVIDIA or AMD GPU")
        known = devices.gpu_names()
        if check.gpus > 1 and (known is None or len(known) < check.gpus):
            there = "their number is not known" if known is None else f"there is {len(known)}"
            return replace(blank, text=f"only with {check.gpus} GPUs; {there}")
        late = f"the time limit of {self.spec.minutes:g} minutes was reached"
        if self._left() < LEAST_S:
            return replace(blank, text=late)
        began = time.monotonic()
        limit = min(check.limit_s, self._left())
        answer = workers.ask(check.function, limit)
        blank = replace(blank, seconds=round(time.monotonic() - began, 1))
        if answer.get("late") and limit < check.limit_s:
            return replace(blank, text=f"{late} while it ran")
        if "error" in answer:
            return replace(blank, state=FAILED, text=str(answer["error"]))
        state = GOOD if answer.get("agrees") else WRONG
        return replace(blank, state=state, text=str(answer.get("text", "")))

    def diagnosis(self) -> Diagnosis:
        """Return the results so far; checks that were not reached are skipped."""
        reached = {verdict.name for verdict in self.verdicts}
        rest = [
            Verdict(name=check.name, title=check.title, text="not reached")
            for check in self.checks
            if check.name not in reached
        ]
        checks = (*self.verdicts, *rest)
        return Diagnosis(
            verdict=sentence(self.machine, checks),
            agrees=not any(check.is_wrong for check in checks),
            compared_with=compared_with(self.machine),
            seconds=round(time.monotonic() - self.began, 1),
            machine=self.machine,
            checks=checks,
        )


class Workers:
    """The process that carries out checks; it is started when needed, and again if it is lost."""

    def __init__(self, device: str, folder: Path, run: Run) -> None:
        """Work on ``device``, in ``folder``."""
        self._device, self._folder, self._run = device, folder, run
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._number = 0
        self._log = folder / "log.txt"

    def ask(self, check: str, limit_s: float) -> dict[str, Any]:
        """Return the answer to one check; an ``error`` if it fails, hangs or kills the process."""
        if self._process is None:
            answer = self._start()
            if "error" in answer:
                self.stop()
                return answer
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # if it has ended, its end is the answer
            self._process.stdin.write(json.dumps({"check": check}) + "\n")
            self._process.stdin.flush()
        answer = self._answer(limit_s)
        if "error" in answer and not answer.get("works"):
            self.stop()
        return answer

    def _start(self) -> dict[str, Any]:
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        env = processes.environment(
            DEPTHCUT_WORKSPACE=str(folder / "workspace"),
            HF_HUB_OFFLINE="1",
            HF_DATASETS_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
        )
        env.pop("DEPTHCUT_DETACHED", None)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
                start_new_session=True,  # Ctrl-C goes to us, and we end it with all it started
            )
        self._answers = queue.Queue()
        threading.Thread(
            target=_read, args=(self._process.stdout, self._answers), daemon=True
        ).start()
        assert self._process.stdin is not None
        request = {"device": self._device, "folder": str(folder)}
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer(START_S)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            self._run.progress.check_cancel()
            try:
                answer = self._answers.get(timeout=POLL_S)
            except queue.Empty:
                continue
            return self._ended() if answer is None else answer
        return {"error": f"not finished within {limit_s:.0f} s", "late": True}

    def _ended(self) -> dict[str, Any]:
        assert self._process is not None
        status = self._process.wait()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        lines = [x for x in self._log.read_text(errors="replace").splitlines() if x.strip()]
        last = f": {lines[-1].strip()[:300]}" if lines else ""
        return {"error": f"its process ended with {how}{last}"}

    def stop(self) -> None:
        """End the process and everything that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]


def _read(lines: Any, answers: queue.Queue[dict[str, Any] | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed while it was read
        for line in lines:
            answers.put(json.loads(line))
    answers.put(None)


def compared_with(machine: Machine) -> str:
    """Return what the device's numbers are compared with."""
    return "plain transformers" if machine.device in ("cpu", "") else "the CPU"


def sentence(machine: Machine, checks: Sequence[Verdict]) -> str:
    """Return the verdict on all checks in plain words."""
    good = sum(check.state == GOOD for check in checks)
    wrong = [check.title for check in checks if check.is_wrong]
    left = [check.title for check in checks if check.state == SKIPPED]
    rest = f" Skipped: {'; '.join(left)}." if left else ""
    name = machine.device or "The device"
    if wrong:
        return f"{name} does not pass: {'; '.join(wrong)}. {good} checks agree.{rest}"
    if not good:
        return f"Nothing was compared on {name}.{rest}"
    numbers = "1 check agrees" if good == 1 else f"All {good} checks that ran agree"
    return f"{name} works: {numbers} with {compared_with(machine)}.{rest}"


def describe(machine: Machine) -> list[str]:
    """Return lines on the device, the most important first."""
    lines = [f"{machine.device}: {machine.device_name}"]
    if machine.capability:
        lines[0] += f", compute capability {machine.capability}"
    if machine.total_bytes:
        free = f"{size(machine.free_bytes)} free of " if machine.free_bytes is not None else ""
        lines.append(f"Memory: {free}{size(machine.total_bytes)}")
    if machine.driver:
        lines.append(f"Driver {machine.driver}, for CUDA up to {machine.driver_cuda}")
    built = f"built for CUDA {machine.torch_cuda}" if machine.torch_cuda else "without CUDA"
    lines.append(
        f"torch {machine.torch} ({built}), transformers {machine.transformers}, Python "
        f"{machine.python}" + (f", {machine.threads} threads" if machine.threads else "")
    )
    if machine.missing:
        lines.append(f"Not installed: {', '.join(machine.missing)}")
    lines += [_rate(rate) for rate in machine.rates]
    return [*lines, *machine.unusable_gpus]


def _rate(rate: Rate) -> str:
    if rate.bandwidth_bytes_per_s is None or rate.matmul_flops_per_s is None:
        return f"{rate.dtype}: no instructions for it; float32 takes its place"
    emulated = "" if rate.native else " (emulated)"
    return (
        f"{rate.dtype}{emulated}: reads {rate.bandwidth_bytes_per_s / 1e9:,.0f} GB/s, multiplies "
        f"{rate.matmul_flops_per_s / 1e12:,.2f} TFLOP/s"
    )


def line(verdict: Verdict) -> str:
    """Return a check as a line of text."""
    took = f" [{verdict.seconds:.1f} s]" if verdict.seconds else ""
    return f"{WORDS[verdict.state]:<8} {verdict.title}: {verdict.text}{took}"


def text(found: Diagnosis) -> str:
    """Return the Markdown file: the verdict, the device, then every check."""
    lines = ["# Doctor", "", found.verdict, ""]
    lines += [f"- {about}" for about in describe(found.machine)] if found.machine.device else []
    lines += ["", f"Compared with {found.compared_with}, in {found.seconds:.0f} s:", ""]
    lines += ["| check | | what was found | s |", "| --- | --- | --- | ---: |"]
    for check in found.checks:
        said = check.text.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {check.title} | {WORDS[check.state]} | {said} | {check.seconds:.1f} |")
    return "\n".join(lines) + "\n"
