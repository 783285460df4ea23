"""One text read by two models through the live process, in a background thread. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from core.errors import DepthcutError
from core.live import client
from core.live.replies import Reply, Scored, Waiting
from core.runs.workspace import Workspace

Asker = Callable[[dict[str, Any], threading.Event], Iterator[Reply]]
"""Yields the replies to one question of the kind ``tokens``."""


@dataclass
class TokenPair:
    """Two readings of a text, asked one after the other."""

    text: str
    titles: tuple[str, str]
    questions: tuple[dict[str, Any], dict[str, Any]]
    """The fields of two `core.live.protocol.Tokens`, without the text."""
    where: Workspace
    on: dict[str, Any] = field(default_factory=dict)
    """Device and dtype of the live model, if it matters."""
    ask: Asker | None = None
    readings: list[Scored] = field(default_factory=list)
    note: str = ""
    """What it is waiting for."""
    error: str = ""

    def start(self) -> TokenPair:
        """Ask in the background."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    @property
    def running(self) -> bool:
        """Whether a reading is still to come."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ask no more; an open question is cancelled."""
        self._stop.set()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until both readings are there, or an error."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            for question in self.questions:
                for reply in (self.ask or self._live)({**question, "text": self.text}, self._stop):
                    self.note = reply.why if isinstance(reply, Waiting) else ""
                    if isinstance(reply, Scored):
                        self.readings.append(reply)
        except DepthcutError as error:
            self.error = str(error)
        except Exception as error:
            self.error = f"Unexpected {type(error).__name__}: {error}."

    def _live(self, question: dict[str, Any], stop: threading.Event) -> Iterator[Reply]:
        def wait(why: str) -> None:
            self.note = why

        record = client.ensure(self.where, self.on, on_wait=wait)
        yield from client.events(record, "tokens", question, stop=stop)
