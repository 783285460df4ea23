"""Connections of the live process: loopback only, a secret first, one question each.

Every connection has a thread that reads the question, forwards its events, and notices when the
client disconnects. Questions to the model are queued; the run's main thread answers them.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import itertools
import queue
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.errors import DepthcutError, InputError, RunError
from core.live import protocol
from core.live.replies import Done, Reply, Status, Waiting, to_event
from core.runs.spec import build

HELLO_S = 10.0
"""How long a new connection may take to send its request. Chosen; both sides are on one machine."""
SEND_S = 30.0
"""How long a client may leave unread what it is sent before it counts as gone. Chosen."""
MOST_CONNECTIONS = 64
"""Open requests, each with its thread. Chosen: far more than a few open pages make."""
MOST_STRANGERS = 64
"""Connections that have not sent the secret yet; one more, and the oldest is closed. They are not
requests, so nobody without the secret can keep out those who have it."""


class Gone(Exception):
    """The client has disconnected, so its question needs no answer."""


class Hurried(Exception):
    """A quick question is waiting; this one goes on after it."""


class Job:
    """One question and the stream of events that answers it."""

    def __init__(self, kind: str, question: Any) -> None:
        """Hold a validated ``question`` of `protocol.QUESTIONS`."""
        self.kind, self.question = kind, question
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.gone = threading.Event()
        self.number = -1
        """Place in the queue, once it is there."""

    @property
    def is_quick(self) -> bool:
        """Whether others give way to it."""
        return bool(getattr(self.question, "quick", False))

    def emit(self, reply: Reply) -> None:
        """Queue one reply; never waits for the client."""
        self.events.put(to_event(reply))

    def fail(self, error: DepthcutError) -> None:
        """Send an error as the last event."""
        self.events.put(protocol.error_event(error))

    def check(self) -> None:
        """Raise `Gone` if the client has disconnected."""
        if self.gone.is_set():
            raise Gone


class Server:
    """Server on a free loopback port; `next` returns the questions to the model one by one."""

    def __init__(self, folder: Path, status: Callable[[], Status]) -> None:
        """Serve the run in ``folder``; ``status`` answers questions about the process itself."""
        self._folder, self._status = folder, status
        self._secret = secrets.token_urlsafe(32)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._jobs: queue.PriorityQueue[tuple[bool, int, Job]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._open = 0
        self._strangers: list[socket.socket] = []
        self._count = threading.Lock()
        self.situation = ""
        """What the process is doing now; sent to waiting clients."""
        self.stop_asked = threading.Event()
        self.unload_asked = threading.Event()
        self.last_asked = time.monotonic()

    def __enter__(self) -> Server:
        """Start listening, then write the contact file."""
        threading.Thread(target=self._accept, daemon=True).start()
        host, port = self._socket.getsockname()
        protocol.write_contact(self._folder, protocol.Contact(host, port, self._secret))
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop listening; fail the questions still in the queue."""
        protocol.remove_contact(self._folder)
        with contextlib.suppress(OSError):
            self._socket.close()
        end = RunError("The live model has been stopped.", "Try again; it restarts by itself.")
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()[2].fail(end)
        deadline = time.monotonic() + 2
        while self._open and time.monotonic() < deadline:  # let the last events out
            time.sleep(0.02)

    @property
    def waiting(self) -> int:
        """Number of queued questions."""
        return self._jobs.qsize()

    def next(self, timeout_s: float) -> Job | None:
        """Return the next question, quick ones first, else in the order in which they came.

        None if none came in time or its client has disconnected.
        """
        try:
            _, _, job = self._jobs.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self.last_asked = time.monotonic()
        return None if job.gone.is_set() else job

    def put(self, job: Job) -> None:
        """Queue a question; one that was put before takes its old place."""
        if job.number < 0:
            job.number = next(self._numbers)
        self._jobs.put((not job.is_quick, job.number, job))

    @property
    def hurried(self) -> bool:
        """Whether a quick question is waiting whose client is still there."""
        with self._jobs.mutex:
            return any(not later and not job.gone.is_set() for later, _, job in self._jobs.queue)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    return
                time.sleep(0.1)  # no file handle is free: others are about to be closed
                continue
            with self._count:
                while len(self._strangers) >= MOST_STRANGERS:
                    with contextlib.suppress(OSError):  # its own thread then closes it
                        self._strangers.pop(0).shutdown(socket.SHUT_RDWR)
                self._strangers.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Authenticate a connection, then count it and answer its question."""
        with connection, contextlib.suppress(OSError):
            try:
                try:
                    kind, values = self._hello(connection)
                finally:
                    with self._count, contextlib.suppress(ValueError):
                        self._strangers.remove(connection)
                with self._counted():
                    connection.settimeout(SEND_S)
                    self._answer(connection, kind, values)
            except DepthcutError as error:
                protocol.send(connection, protocol.error_event(error))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count one open request; raises `RunError` if there are too many."""
        with self._count:
            if self._open >= MOST_CONNECTIONS:
                raise RunError(f"Too many open requests ({MOST_CONNECTIONS}).", "Try again later.")
            self._open += 1
        try:
            yield
        finally:
            with self._count:
                self._open -= 1

    def _hello(self, connection: socket.socket) -> tuple[str, dict[str, Any]]:
        """Read the question and check its secret."""
        message: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            message = protocol.first_message(connection, HELLO_S)
        given = str(message.pop("secret", ""))
        if not hmac.compare_digest(given.encode(errors="replace"), self._secret.encode()):
            raise InputError(
                "Wrong secret for the live model.",
                "Read it from the run's own contact file, .run/live.json.",
            )
        return str(message.pop("ask", "")), message

    def _answer(self, connection: socket.socket, kind: str, values: dict[str, Any]) -> None:
        if kind == "status":
            protocol.send(connection, to_event(self._status()))
        elif kind == "stop":
            self.stop_asked.set()
            protocol.send(connection, to_event(Done()))
        elif kind == "unload":
            self.unload_asked.set()
            while self.unload_asked.is_set():
                time.sleep(0.02)
            protocol.send(connection, to_event(self._status()))
        elif kind in protocol.QUESTIONS:
            job = Job(kind, build(protocol.QUESTIONS[kind], values))
            self.put(job)
            try:
                self._pass_on(connection, job)
            finally:
                job.gone.set()
        else:
            known = ", ".join((*protocol.QUESTIONS, "status", "unload", "stop"))
            raise InputError(f"Unknown request '{kind}'.", f"Known requests: {known}.")

    def _pass_on(self, connection: socket.socket, job: Job) -> None:
        """Send the job's events until the last one, or until the client disconnects."""
        sent = time.monotonic()
        while True:
            event: dict[str, Any] | None = None
            with contextlib.suppress(queue.Empty):
                event = job.events.get(timeout=0.05)
            if select.select([connection], [], [], 0)[0]:
                return  # closed: a client sends nothing after its question
            if event is None:
                if time.monotonic() - sent < protocol.QUIET_S:
                    continue
                event = to_event(Waiting(why=self.situation))
            sent = time.monotonic()
            protocol.send(connection, event)
            if event["event"] in ("done", "error"):
                return
