"""One run of the playground: its columns are generated one after another, in a separate thread.

Columns do not compute at the same time, so that each one's tokens per second are accurate. The page
draws the state of `Session` as often as it likes; a session that no page draws any more stops.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from core.errors import DepthcutError
from core.live import client
from core.live.replies import Begun, Reply, Token, Waiting, Written
from core.runs.workspace import Workspace

UNSEEN_S = 20.0
"""A session that no page has drawn for this long stops."""

Asker = Callable[[dict[str, Any], threading.Event], Iterator[Reply]]
"""Yields the replies of one generation."""


@dataclass
class Output:
    """What one column has generated so far."""

    title: str
    state: str = "waiting"
    """waiting, writing, done, stopped or failed."""
    note: str = ""
    """What it is waiting for, or what went wrong."""
    texts: list[str] = field(default_factory=list)
    """The text of every row, without the prompt."""
    begun: Begun | None = None
    """Reported before the first token."""
    result: Written | None = None
    """Measurements, reported at the end."""


class Session:
    """Columns to generate, one after another."""

    def __init__(
        self,
        columns: list[tuple[str, dict[str, Any]]],
        where: Workspace,
        ask: Asker | None = None,
        on: dict[str, Any] | None = None,
    ) -> None:
        """Generate ``columns``: pairs of a title and the values of a `protocol.Generate`.

        ``on``: device and dtype of the live model, if it matters.
        """
        self._on = on or {}
        self.outputs = [Output(title) for title, _ in columns]
        self._questions = [values for _, values in columns]
        self._where, self._ask = where, ask or self._ask_live
        self._stop = threading.Event()
        self._seen = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Session:
        """Begin in the background."""
        self._thread.start()
        return self

    @property
    def running(self) -> bool:
        """Whether a column is still to be generated."""
        return self._thread.is_alive()

    def look(self) -> None:
        """Note that a page still draws this session."""
        self._seen = time.monotonic()

    def stop(self) -> None:
        """Stop the current column, and generate no more."""
        self._stop.set()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until all columns are finished."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        for output, question in zip(self.outputs, self._questions, strict=True):
            if self._stop.is_set():
                output.state = "stopped"
                continue
            try:
                self._write(output, question)
            except DepthcutError as error:
                output.state, output.note = "failed", str(error)
            except Exception as error:
                output.state, output.note = "failed", f"Unexpected {type(error).__name__}: {error}."

    def _write(self, output: Output, question: dict[str, Any]) -> None:
        output.texts = [""] * int(question.get("batch", 1))
        for reply in self._ask(question, self._stop):
            if time.monotonic() - self._seen > UNSEEN_S:
                self._stop.set()
            if self._stop.is_set():
                break
            self._take(output, reply)
        if output.state != "done":
            output.state, output.note = "stopped", ""

    def _take(self, output: Output, reply: Reply) -> None:
        if isinstance(reply, Waiting):
            output.note = reply.why
        elif isinstance(reply, Written):
            output.state, output.note, output.result = "done", "", reply
        elif isinstance(reply, Begun):
            output.state, output.note, output.begun = "writing", "", reply
        elif isinstance(reply, Token):
            output.texts = [t + p for t, p in zip(output.texts, reply.texts, strict=True)]

    def _ask_live(self, question: dict[str, Any], stop: threading.Event) -> Iterator[Reply]:
        output = next(o for o in self.outputs if o.state == "waiting")

        def wait(why: str) -> None:
            output.note = why
            if stop.is_set() or time.monotonic() - self._seen > UNSEEN_S:
                raise _Stopped

        try:
            record = client.ensure(self._where, self._on, on_wait=wait)
        except _Stopped:
            return
        yield from client.events(record, "generate", question, stop=stop)


class _Stopped(Exception):
    pass
