"""The first process of a run starts the others, watches them, and ends them.

Each of the others runs `core.runs.rank_process`. Its standard input is a pipe on which it is told
where to meet; the pipe closes when the first process ends, for whatever reason, and the other then
ends too. Its standard output is a pipe on which it says why it failed. If one dies, the run ends
with its reason: at once if the first process notices, which is waiting for it, and otherwise by
force.

In a job of several nodes, srun starts those on other nodes: it passes both pipes and the exit
status on. With srun's end the pipe closes there, and the process ends as it would here.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from core import errors
from core.errors import DepthcutError, InputError, RunError
from core.runs import processes, ranks, warm
from core.runs.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.runs.run import Run

MODULE = "core.runs.rank_process"
HOST = "127.0.0.1"
NOTICE_S = 5.0
"""How long the first process may take to notice that another has died."""
END_S = 60.0
"""How long the others may take to end once the first has its results."""
SRUN = ("srun", "--nodes=1", "--ntasks=1", "--overlap", "--quiet", "--unbuffered")
"""Starts a process on another node of this job, beside the one that is going on there."""
PATIENCE = datetime.timedelta(days=30)
"""torch's own time limit for waiting; who is dead is known otherwise."""
REPORT_BYTES = 2**16


@dataclass
class _Other:
    """One of the other processes, as the first sees it."""

    rank: int
    device: str
    node: str
    """Where it runs, if that is another machine."""
    process: warm.Process | subprocess.Popen[bytes]
    lifeline: int
    """Descriptor of the pipe that keeps it alive."""
    reports: int
    """Descriptor from which its reason is read."""
    failed: DepthcutError | None = None
    trace: str = ""
    at: float = 0.0
    """When it was found dead."""
    ended: threading.Event = field(default_factory=threading.Event)

    def kill(self) -> None:
        """Send SIGKILL unless it has ended; a thread is waiting for its end."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def together(run: Run, spec: Any, places: Sequence[str]) -> Iterator[Any]:
    """Have processes on ``places`` share a run; yield the spec for this one, the first.

    ``run.ranks`` is set meanwhile. Raises the reason of a process that dies, instead of whatever
    this one noticed of it.
    """
    team = _Team(run, places)
    run.kill_others = team.kill
    try:
        team.start()
        with joined(0, places, team.store()) as run.ranks:
            yield replace(spec, device=places[0])
            team.finish()
    except (DepthcutError, KeyboardInterrupt):
        raise
    except BaseException as error:
        found = team.reason()
        if found is None:
            raise
        raise found from error
    finally:
        run.ranks = Ranks()
        team.close()
        run.kill_others = lambda: None


@contextlib.contextmanager
def joined(rank: int, places: Sequence[str], store: Any) -> Iterator[Ranks]:
    """Meet the other processes at ``store`` and yield this process's place among them."""
    import torch
    import torch.distributed as dist

    device, size = torch.device(places[rank]), len(places)
    machines = len(ranks.nodes())
    threads = torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, threads * machines // size))
    options = {"store": store, "rank": rank, "world_size": size, "timeout": PATIENCE}
    gpus = None
    with contextlib.nullcontext() if machines > 1 else _on_this_machine():
        dist.init_process_group("gloo", **options)
        if device.type == "cuda":
            gpus = dist.new_group(backend="nccl", timeout=PATIENCE)
    try:
        yield Ranks(rank, size, gpus)
    finally:
        if device.type != "cuda":  # NCCL would wait for a process that has died
            dist.destroy_process_group()
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _on_this_machine() -> Iterator[None]:
    """Have gloo use the loopback; otherwise it looks for an address by the machine's name."""
    name = "GLOO_SOCKET_IFNAME"
    given = os.environ.get(name)
    os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


class _Team:
    """The other processes of one run."""

    def __init__(self, run: Run, places: Sequence[str]) -> None:
        self.run, self.places = run, places
        self.nodes = ranks.nodes()
        self.others: list[_Other] = []
        self.closing = threading.Event()

    def start(self) -> None:
        """Start them; they import what they need while this process does."""
        each = len(self.places) // len(self.nodes)
        for rank, device in enumerate(self.places[1:], start=1):
            self._start(rank, device, self.nodes[rank // each] if rank >= each else "")
        pids = ", ".join(str(o.process.pid) for o in self.others)
        where = " ".join(dict.fromkeys(self.places))
        if len(self.nodes) > 1:
            where += f" of each of {len(self.nodes)} nodes: {', '.join(self.nodes)}"
        self.run.log(f"{len(self.places)} processes share the work on {where} (also: {pids}).")

    def _start(self, rank: int, device: str, node: str) -> None:
        given, lifeline = os.pipe()
        reports, told = os.pipe()
        argv = [*warm.MODULE, MODULE, str(self.run.dir.absolute()), str(rank), *self.places]
        if node:
            argv = [*SRUN, f"--nodelist={node}", *argv]
        env = processes.environment(PYTHONUNBUFFERED="1")
        template = warm.at_hand() if device == "cpu" and not node else None
        streams = (given, told, 2)
        try:
            process = warm.start(template, argv, streams=streams, env=env)
        except OSError as error:
            os.close(lifeline)
            os.close(reports)
            why = f"{SRUN[0]}: {error.strerror or error}" if node else error.strerror or error
            fix = "Check that srun is installed there." if node else "Free up memory."
            raise RunError(f"Cannot start process {rank + 1}: {why}.", fix) from error
        finally:
            os.close(given)
            os.close(told)
        other = _Other(rank, device, node, process, lifeline, reports)
        self.others.append(other)
        threading.Thread(target=self._watch, args=(other,), daemon=True).start()

    def store(self) -> Any:
        """Return the store through which the processes meet; tell the others its host and port."""
        from torch.distributed import TCPStore

        store = TCPStore(HOST, 0, None, True, wait_for_workers=False, timeout=PATIENCE)
        for other in self.others:
            with contextlib.suppress(OSError):  # it has died, which is noticed elsewhere
                host = socket.gethostname() if other.node else HOST
                os.write(other.lifeline, f"{host} {store.port}\n".encode())
        return store

    def _watch(self, other: _Other) -> None:
        """Wait for the end of a process; if it failed, see to it that the run ends too."""
        status = other.process.wait()
        if status:
            other.failed, other.trace = self._why(other, status)
            other.at = time.monotonic()
        other.ended.set()
        if not status or self.closing.wait(NOTICE_S):
            return
        found = self.reason()
        if found is not None:
            self.run.end_by_force("failed", found)

    def _why(self, other: _Other, status: int) -> tuple[DepthcutError, str]:
        """Return why a process failed, and its traceback if there is one."""
        at = f"node {other.node}" if other.node else f"pid {other.process.pid}"
        who = f"Process {other.rank + 1} of {len(self.places)} ({at}, {other.device})"
        if other.node and status > 128:  # as srun and shells tell a signal
            status = 128 - status
        told = _last_line(other.reports)
        kind = getattr(errors, str(told.get("error")), None)
        if isinstance(kind, type) and issubclass(kind, DepthcutError):
            message, hint = str(told.get("message")), str(told.get("hint") or "")
            if not issubclass(kind, InputError):
                message = f"{who}: {message}"
            return kind(message, hint), str(told.get("trace") or "")
        if status < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-status).name
                out = " If nobody did that, memory ran out." if name == "SIGKILL" else ""
                return RunError(f"{who} was ended by {name}.{out}", "Start the run again."), ""
        return RunError(f"{who} ended with status {status}.", "See the log."), ""

    def reason(self) -> DepthcutError | None:
        """Return why the first of the others failed; None if none does within a few seconds."""
        deadline = time.monotonic() + NOTICE_S
        while not (failed := [o for o in self.others if o.at]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not failed:
            return None
        worst = min(failed, key=lambda other: other.at)
        if worst.trace:
            self.run.log(worst.trace)
            worst.trace = ""
        return worst.failed

    def finish(self) -> None:
        """Wait for the others, which have nothing left to do; raise the reason if one fails."""
        deadline = time.monotonic() + END_S
        for other in self.others:
            other.ended.wait(max(0.0, deadline - time.monotonic()))
        if any(other.at for other in self.others):
            found = self.reason()
            assert found
            raise found

    def kill(self) -> None:
        """Kill them, also those that are stopped and would not notice that the run has ended."""
        self.closing.set()
        for other in self.others:
            other.kill()

    def close(self) -> None:
        """End the processes that are left: they end by themselves, or are killed."""
        self.closing.set()
        for other in self.others:
            os.close(other.lifeline)
        for other in self.others:
            if not other.ended.wait(2.0):
                other.kill()
                other.ended.wait(10.0)
            os.close(other.reports)


def _last_line(descriptor: int) -> dict[str, Any]:
    """Return what a process that has ended said last, if that is JSON."""
    if not select.select([descriptor], [], [], 0)[0]:
        return {}
    text = os.read(descriptor, REPORT_BYTES).decode(errors="replace").strip()
    try:
        found = json.loads(text.splitlines()[-1]) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
