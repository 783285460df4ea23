"""SLURM through its stock commands: sbatch, squeue, sacct and scancel.

This part runs on the machine from which jobs are submitted, which may be another one than the
dashboard's; it needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import PlaceError, Unreachable

ASK_S = 60.0
LEAST_SIGNAL_S = 10
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
ALIVE = (
    *WAITING,
    *("RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"),
)
GONE = "GONE"
"""State of a job that SLURM does not know any more."""
ENDS = {
    "TIMEOUT": "reached its time limit",
    "OUT_OF_MEMORY": "was killed because it used too much memory",
    "NODE_FAIL": "ended because its node failed",
    "CANCELLED": "was cancelled in SLURM",
    "PREEMPTED": "was preempted by another job",
    "BOOT_FAIL": "could not start on its node",
    "DEADLINE": "did not start before its deadline",
}
REASONS = {
    "Resources": "the nodes are busy",
    "Priority": "other jobs come first",
    "Dependency": "it waits for another job",
    "BeginTime": "its start time has not come",
    "ReqNodeNotAvail": "the nodes that it needs are not available",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "its time limit is longer than the partition allows",
    "PartitionNodeLimit": "it asks for more nodes than the partition has",
    "JobHeldUser": "it is on hold",
    "JobHeldAdmin": "an administrator holds it",
    "QOSMaxJobsPerUserLimit": "you have as many running jobs as are allowed",
    "AssocGrpGRES": "your account has reached its limit of GPUs",
    "JobArrayTaskLimit": "as many steps run as the place allows at once",
}
_NO_CONTROLLER = re.compile(r"unable to contact|connection refused|timed out|zero bytes", re.I)


@dataclasses.dataclass(frozen=True)
class Job:
    """What SLURM says of a job."""

    id: str
    state: str
    reason: str = ""
    start: str = ""
    """When it is expected to start, or has started, as SLURM writes it."""
    nodes: str = ""
    exit: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it has not started."""
        return self.state in WAITING

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.state in ALIVE

    @property
    def waiting(self) -> str:
        """Why it waits, and until when, in one sentence."""
        why = REASONS.get(self.reason, "")
        text = f"Job {self.id} waits in SLURM's queue"
        if self.reason and self.reason != "None":
            text += f": {self.reason}" + (f" ({why})" if why else "")
        return text + (f". Expected start: {self.start.replace('T', ' ')}." if self.start else ".")

    @property
    def is_going(self) -> bool:
        """Whether it will still do something: it waits, or it runs and is not about to end."""
        return self.is_alive and self.state != "COMPLETING"

    @property
    def ended(self) -> str:
        """How it ended without a result of the run, in one sentence."""
        if self.state == GONE:
            return f"Job {self.id} is no longer known to SLURM and left no result."
        how = ENDS.get(self.state) or f"ended as {self.state}" + (
            f" with exit status {self.exit}" if self.exit else ""
        )
        return f"Job {self.id} {how}."


def seconds(limit: str) -> int:
    """Return a time limit as SLURM writes it in seconds; 0 if it is none or unknown.

    Minutes, minutes:seconds, hours:minutes:seconds, and after days and a dash hours, hours:minutes
    or hours:minutes:seconds.
    """
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (*parts, *([days] if dash else []))):
        return 0
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, secs = (numbers + [0, 0])[:3]
    elif len(numbers) == 3:
        hours, minutes, secs = numbers
    else:
        hours, (minutes, secs) = 0, (numbers + [0])[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs


def options(place: Mapping[str, Any], name: str, log: str, margin_s: int) -> list[str]:
    """Return sbatch's options for a place's settings; ``log`` gets the output.

    Processes of a run are spread evenly over its nodes, and so are the GPUs.
    """
    nodes = int(place.get("nodes") or 1)
    words = [f"--nodes={nodes}", f"--job-name={name}", f"--output={_literal(log)}"]
    words.append("--open-mode=append")
    for key in ("partition", "account", "qos", "constraint", "time", "gres"):
        if place.get(key):
            words.append(f"--{key}={place[key]}")
    if place.get("gpus"):
        words.append(f"--gpus-per-node={place['gpus'] // nodes}" if nodes > 1
                     else f"--gpus={place['gpus']}")  # fmt: skip
    if nodes > 1:
        words.append("--ntasks-per-node=1")
    if place.get("cpus"):
        words.append(f"--cpus-per-task={place['cpus']}")
    if place.get("memory"):
        words.append(f"--mem={place['memory']}")
    return [*words, f"--signal=B:USR1@{max(LEAST_SIGNAL_S, margin_s)}", "--requeue"]


def _literal(path: str) -> str:
    """Return a path in which sbatch replaces nothing."""
    return path.replace("\\", "\\\\").replace("%", "%%")


def name_of(folder: Path) -> str:
    """Return the name of the jobs of the run in ``folder``."""
    return "depthcut-" + re.sub(r"[^\w.-]+", "-", folder.name)


def write_script(path: Path, text: str) -> None:
    """Write a job's script; its environment may hold what others must not read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(text)


def script(
    words: Sequence[str],
    env: Mapping[str, str],
    modules: Sequence[str],
    *,
    resumes: bool,
    submitted: Sequence[str] = (),
) -> str:
    """Return a job's script: it becomes the command, so that signals reach it.

    ``words`` is ``python -m core COMMAND ...``; a job that SLURM started again continues if the
    command ``resumes``.
    """
    lines = _head(env, modules, submitted)
    lines += ["set --", *([_RESUMING] if resumes else []), _command(words)]
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Part:
    """What one element of a job array does."""

    words: Sequence[str]
    """``python -m core COMMAND ...``"""
    folder: str
    log: str
    resumes: bool


def array_script(
    parts: Mapping[int, Part],
    env: Mapping[str, str],
    modules: Sequence[str],
    submitted: Sequence[str] = (),
) -> str:
    """Return the script of a job array: each element becomes the command of its number."""
    lines = [*_head(env, modules, submitted), "set --", 'case "$SLURM_ARRAY_TASK_ID" in']
    for number, part in parts.items():
        lines += [
            f"{number})",
            f"export DEPTHCUT_DETACHED={shlex.quote(part.folder)}",
            *([_RESUMING] if part.resumes else []),
            f"exec >> {shlex.quote(part.log)} 2>&1",
            _command(part.words),
            ";;",
        ]
    return "\n".join([*lines, "esac", "exit 1"]) + "\n"


_NODES = (
    '[ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && '
    'export DEPTHCUT_NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr "\\n" " ")"'
)
"""The names of a job's nodes; the script runs on the first."""
_RESUMING = '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && set -- --resume'


def _head(env: Mapping[str, str], modules: Sequence[str], submitted: Sequence[str]) -> list[str]:
    lines = ["#!/bin/bash -l" if modules else "#!/bin/bash"]
    if submitted:
        lines.append("# submitted with: " + shlex.join(submitted).replace("\n", " "))
    if modules:
        lines.append("module load " + shlex.join(modules) + " || exit 1")
    lines += [f"export {key}={shlex.quote(value)}" for key, value in env.items()]
    return [*lines, 'export DEPTHCUT_JOB="$SLURM_JOB_ID"', _NODES]


def _command(words: Sequence[str]) -> str:
    return f'exec {shlex.join(words[:4])} "$@" {shlex.join(words[4:])}'


def submit(words: Sequence[str], path: str, key: str = "") -> str:
    """Submit a script with sbatch's options and return the job's number.

    ``key`` becomes its comment, by which `keyed` finds it.
    """
    more = [f"--comment={key}"] if key else []
    told = ask(["sbatch", "--parsable", *more, *words, path])
    number = told.strip().splitlines()[-1].split(";")[0] if told.strip() else ""
    if not number.isdigit():
        raise PlaceError(f"sbatch named no job, but said: {told.strip()[:200]}.")
    return number


def keyed(name: str, key: str) -> str:
    """Return the number of the job that was submitted with ``key``; empty if there is none.

    A process that was killed after sbatch and before it noted the number has left such a job.
    """
    told = ask(["squeue", "-h", "-t", "all", f"--name={name}", "-o", "%F|%k"])
    found = [line.partition("|") for line in told.splitlines()]
    return next((number for number, _, comment in found if comment == key), "")


def elements(number: str) -> dict[int, Job]:
    """Return what SLURM knows of a job array's elements; those that ended long ago are missing."""
    form = "%K|%T|%r|%S|%N|%A"
    try:
        told = ask(["squeue", "-h", "-t", "all", "-r", "-j", number, "-o", form])
    except PlaceError as error:
        if "nvalid job id" not in error.message:
            raise
        told = ""
    found = {}
    for line in told.splitlines():
        index, state, reason, start, nodes = (line.split("|") + [""] * 5)[:5]
        if index.isdigit():
            start = "" if start in ("N/A", "Unknown") else start
            reason = "" if reason == "None" else reason
            found[int(index)] = Job(f"{number}_{index}", state, reason, start, nodes)
    return found


def look(number: str) -> Job:
    """Return what SLURM knows of a job: squeue while it is there, then sacct."""
    try:
        told = ask(["squeue", "-h", "-t", "all", "-j", number, "-o", "%T|%r|%S|%N"])
    except PlaceError as error:
        if "Invalid job id" not in error.message:
            raise
        told = ""
    line = told.strip().splitlines()[:1]
    if line:
        state, reason, start, nodes = (line[0].split("|") + ["", "", ""])[:4]
        start = "" if start in ("N/A", "Unknown") else start
        return Job(number, state, "" if reason == "None" else reason, start, nodes)
    try:
        told = ask(["sacct", "-n", "-P", "-X", "-j", number, "-o", "State,ExitCode,NodeList"])
    except PlaceError:  # accounting is not set up on this cluster
        told = ""
    line = told.strip().splitlines()[-1:]
    if not line:
        return Job(number, GONE)
    state, status, nodes = (line[0].split("|") + ["", ""])[:3]
    return Job(number, state.split()[0] if state else GONE, nodes=nodes, exit=status)


def cancel(number: str, *, kill: bool = False, waiting: bool = False) -> None:
    """Cancel a job, a job array, or an element of one (``ARRAY_INDEX``).

    With ``kill`` at once, without a chance to stop cleanly; with ``waiting`` only what has not
    started.
    """
    extra = ["--signal=KILL", "--full"] if kill else ["--state=PENDING"] if waiting else []
    for words in ([*extra, number], [number]) if kill else ([*extra, number],):
        try:
            ask(["scancel", *words])
        except PlaceError as error:  # it has ended meanwhile
            if "nvalid job id" not in error.message:
                raise


def try_options(words: Sequence[str]) -> str:
    """Return what sbatch says of options without submitting anything: when a job would start."""
    done = _run(["sbatch", "--test-only", *words, "--wrap=true"])
    told = " ".join((done.stderr or done.stdout).split()).removeprefix("sbatch: ")
    if done.returncode:
        raise _problem("sbatch", told)
    return told


def ask(words: Sequence[str]) -> str:
    """Run one of SLURM's commands and return its output; raises with its own words."""
    done = _run(words)
    if done.returncode:
        raise _problem(words[0], done.stderr or done.stdout)
    return done.stdout


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            list(words), capture_output=True, text=True, timeout=ASK_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise PlaceError(
            f"{words[0]} is not installed on the machine that submits jobs.",
            "Check the place's host: it must be a machine with SLURM's commands.",
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{words[0]} did not answer within {ASK_S:g} s.") from None


def _problem(program: str, told: str) -> PlaceError | Unreachable:
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    text = " ".join(line.removeprefix(f"{program}: ").removeprefix("error: ") for line in lines)
    text = text.rstrip(".")[:400] or "no reason given"
    if _NO_CONTROLLER.search(text):
        return Unreachable(f"SLURM does not answer ({program}: {text}).", "Try again later.")
    if program == "sbatch":
        return PlaceError(f"SLURM refused the job: {text}.", "Change the place's settings.")
    return PlaceError(f"{program}: {text}.")
