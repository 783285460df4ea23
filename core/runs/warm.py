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

A process that starts many runs, such as the dashboard, keeps one template for all of them: `keep`
has it made in the background, and `kept` returns it once it is ready.
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
MODULE = [sys.executable, "-m"]
"""How a command begins that runs a module, which is what a template can do."""
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
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """Ask through ``requests``.

        ``env`` is the environment the libraries were imported in, and ``added`` what they set in
        it, if that is known; ``process`` is the template if it is this process's child.
        """
        self._requests = requests
        self._process = process
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

    def close(self, *, at_once: bool = False) -> None:
        """Ask no more. The template ends when nobody else can ask it, or ``at_once``."""
        self._requests.close()
        if at_once and self._process:
            self._process.kill()


_inherited: Template | None = None


def inherit(made: Template) -> None:
    """Take note that this process was forked from a template."""
    global _inherited
    _inherited = made


@contextlib.contextmanager
def template(device: str, check: Callable[[], None]) -> Iterator[Template | None]:
    """Yield a template for work on ``device``: the one this process has, or one for the block.

    Yields None if processes have to be started in the ordinary way. ``check`` is called while the
    libraries are imported and may raise an error to stop waiting.
    """
    ours = at_hand()
    if ours or not _is_possible(device):
        yield ours if device == "cpu" else None
        return
    made = _new()
    if made is None:
        yield None
        return
    ready = False
    try:
        ready = made.is_ready(check)
        yield made if ready else None
    finally:
        made.close(at_once=not ready)


def start(
    made: Template | None,
    argv: list[str],
    *,
    streams: tuple[int, int, int],
    env: Mapping[str, str],
    cwd: Path | None = None,
    session: bool = False,
) -> Process | subprocess.Popen[bytes]:
    """Start ``argv``: forked from the template ``made`` if that is possible.

    It is for a module run by this interpreter. The other arguments are those of `Template.start`.
    """
    if made and argv[:2] == MODULE:
        forked = made.start(argv[2:], streams=streams, env=env, cwd=cwd, session=session)
        if forked:
            return forked
    given, output, errors = streams
    return subprocess.Popen(
        argv,
        stdin=given,
        stdout=output,
        stderr=errors,
        start_new_session=session,
        cwd=cwd,
        env=dict(env),
    )


def later(seconds: float, do: Callable[..., None], *arguments: object) -> None:
    """Call ``do`` in a background thread after a while; the process does not wait for it."""
    timer = threading.Timer(seconds, do, arguments)
    timer.daemon = True
    timer.start()


def at_hand() -> Template | None:
    """Return the template that this process was forked from or keeps, or None."""
    return _inherited or _kept


def keep() -> None:
    """Have a template made in the background that this process keeps; once, however often called.

    Nothing happens on a system that has no templates.
    """
    if not _keeping.acquire(blocking=False):
        return
    if _is_possible("cpu"):
        threading.Thread(target=_keep, daemon=True).start()


def kept() -> Template | None:
    """Return the template that `keep` has made, or None if there is none yet."""
    return _kept


_keeping = threading.Lock()
"""Held from the first call of `keep` on."""
_kept: Template | None = None


def _keep() -> None:
    global _kept
    made = _new()
    if made and made.is_ready(lambda: None):
        _kept = made
    elif made:
        made.close(at_once=True)


def _new() -> Template | None:
    """Start a template, which is not ready yet; None if no process can be started."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = processes.environment({OWN_THREADS: "1"}, PYTHONUNBUFFERED="1", KINETO_LOG_LEVEL="99")
    with theirs:
        try:
            process = subprocess.Popen(
                [*MODULE, "core.runs.warm_process", str(theirs.fileno()), *LIBRARIES],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # signals of our terminal are not for it
                env=env,
            )
        except OSError:
            ours.close()
            return None
    threading.Thread(target=process.wait, daemon=True).start()
    return Template(ours, env, process=process)


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
