"""Start processes that have already imported the computing libraries.

Importing torch and transformers costs seconds of CPU time, in every step of a recipe and every
visit of a benchmark. `template` starts one process that imports them and then forks whenever a
process is needed; the new process runs ``python -m MODULE ARGUMENTS`` as if it had just been
started: with its own session, standard streams, environment and folder.

A fork is only sound if nothing else happens in the process that forks. The template therefore
computes nothing, has one thread (otherwise it refuses) and never touches a device; it is used on
Linux and for work on a CPU alone. It ends when all processes that may ask it have ended. Without a
template, or if it cannot serve a request, the caller starts the process in the ordinary way.
`core.runs.warm_process` is the other side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from core.runs import processes

LIBRARIES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
)
"""What every computing command imports."""
OWN_THREADS = "OPENBLAS_NUM_THREADS"
"""Set to 1 for the template only: numpy's linear algebra starts its threads when it is imported."""
FREE = ("DEPTHCUT_", "PYTHONPATH", "PYTHONUNBUFFERED", "KINETO_LOG_LEVEL", OWN_THREADS)
"""Beginnings of the variables in which a process may differ from its template. All others may have
been read by a library when it was imported."""
POLL_S = 0.2
REQUEST_BYTES = 2**18
STREAMS = 3
ANSWER_BYTES = 8
"""Length of the process id and, later, of the exit status in an answer."""


@dataclasses.dataclass
class Process:
    """A process that a template has forked."""

    pid: int
    _answer: int
    """Descriptor from which the exit status is read once the process has ended."""
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status as `subprocess.Popen.poll` does."""
        if self.returncode is None and select.select([self._answer], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end of the process and return its exit status."""
        if self.returncode is None:
            told = os.read(self._answer, ANSWER_BYTES)
            if not told:  # the template was killed; the process goes on without it
                started = processes.start_time(self.pid)
                while started is not None and processes.is_alive(self.pid, started):
                    time.sleep(POLL_S)
            self.returncode = int.from_bytes(told, "little", signed=True) if told else 1
            os.close(self._answer)
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Template:
    """The process that forks, as seen by those who ask it."""

    def __init__(
        self,
        requests: socket.socket,
        env: Mapping[str, str],
        added: Mapping[str, str] | None = None,
    ) -> None:
        """Ask through ``requests``.

        ``env`` is the environment the libraries were imported in, and ``added`` what they set in
        it, if that is known.
        """
        self._requests = requests
        self._added = dict(added or {})
        self._env = _fixed(env)

    def is_ready(self, check: Callable[[], None]) -> bool:
        """Wait until the libraries are imported, calling ``check`` meanwhile; False if it ended."""
        while not select.select([self._requests], [], [], POLL_S)[0]:
            check()
        try:
            return bool(self._requests.recv(1))
        except OSError:
            return False

    def start(
        self,
        argv: list[str],
        *,
        streams: tuple[int, int, int],
        env: Mapping[str, str],
        cwd: Path | None = None,
        session: bool = False,
    ) -> Process | None:
        """Start ``python -m`` with ``argv`` (module and arguments); None if that is not possible.

        Args:
            argv: Name of the module, and its arguments.
            streams: Descriptors of standard input, output and error.
            env: The whole environment of the process.
            cwd: Its working directory; None for the caller's.
            session: Whether it leads a session of its own.
        """
        if _fixed({k: v for k, v in env.items() if self._added.get(k) != v}) != self._env:
            return None
        job = {"argv": argv, "env": dict(env), "cwd": str(cwd or os.getcwd()), "session": session}
        answer, theirs = os.pipe()
        try:
            descriptors = [*streams, theirs, self._requests.fileno()]
            socket.send_fds(self._requests, [json.dumps(job).encode()], descriptors)
        except OSError:  # the template has ended, or the request is too long
            os.close(answer)
            return None
        finally:
            os.close(theirs)
        try:
            told = os.read(answer, ANSWER_BYTES)
        except BaseException:  # a signal; the process finds that nobody waits, and ends
            os.close(answer)
            raise
        if not told:
            os.close(answer)
            return None
        return Process(int.from_bytes(told, "little"), answer)

    def close(self) -> None:
        """Ask no more."""
        self._requests.close()


_inherited: Template | None = None


def inherit(made: Template) -> None:
    """Take note that this process was forked from a template."""
    global _inherited
    _inherited = made


@contextlib.contextmanager
def template(device: str, check: Callable[[], None]) -> Iterator[Template | None]:
    """Yield a template for work on ``device``: this process's own, or a new one for the block.

    Yields None if processes have to be started in the ordinary way. ``check`` is called while the
    libraries are imported and may raise an error to stop waiting.
    """
    if _inherited or not _is_possible(device):
        yield _inherited if device == "cpu" else None
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        env = processes.environment({OWN_THREADS: "1"}, PYTHONUNBUFFERED="1", KINETO_LOG_LEVEL="99")
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "core.runs.warm_process", str(theirs.fileno()), *LIBRARIES],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # signals of our terminal are not for it
                env=env,
            )
        except OSError:
            yield None
            return
        theirs.close()
        made = Template(ours, env)
        ready = False
        try:
            ready = made.is_ready(check)
            yield made if ready else None
        finally:
            made.close()
            if not ready:
                process.kill()
            threading.Thread(target=process.wait, daemon=True).start()


def _is_possible(device: str) -> bool:
    if device != "cpu" or not sys.platform.startswith("linux"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # a kernel before 5.3
        return False
    return True


def _fixed(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a template and its processes must share."""
    return {name: value for name, value in env.items() if not name.startswith(FREE)}
