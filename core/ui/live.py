"""Perplexities and text from the live model, requested in the background so clicks never wait.

`desk()` is shared by all sessions of this dashboard: it caches answers by checkpoint content, text
and set of blocks, and requests those that a page needs. `core.ui.live_panel` decides which.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.live import client
from core.live.protocol import model_values
from core.live.replies import Measured, Part, Token, Waiting
from core.runs.workspace import Workspace

ON = ("device", "dtype")
"""What a question's text may ask of the live model itself."""
KEPT = 4096
"""Answers that a dashboard caches."""


@dataclass
class Question:
    """One set of blocks evaluated on one text, and the progress of its answer.

    A ``text`` with a ``prompt`` is continued instead. Its ``device`` and ``dtype``, if it has them,
    are those of the live model.
    """

    checkpoint: str
    skip: Removal
    text: dict[str, Any]
    ppl: float | None = None
    windows: int = 0
    of: int = 0
    dense_ppl: float | None = None
    """The whole model's on the same windows."""
    stderr: float | None = None
    """Standard error of ``log(ppl / dense_ppl)``."""
    tokens_per_s: float = 0.0
    """Rate of the whole model, as the live process measured it."""
    written: str = ""
    """What continues the prompt so far."""
    done: bool = False
    error: str = ""
    waiting: str = ""
    seconds: float = 0.0
    device: str = ""
    dtype: str = ""
    stop: threading.Event = field(default_factory=threading.Event, repr=False)


Key = tuple[str, str, Removal]


def key_of(info: CheckpointInfo, text: Mapping[str, Any], skip: Removal) -> Key:
    """Return what an answer depends on: checkpoint content, text, and what is skipped."""
    return info.key or info.path, repr(sorted(text.items())), skip.ordered


class Desk:
    """Questions and answers of one dashboard process."""

    def __init__(self, ask: Callable[[Question], None] | None = None) -> None:
        """Answer questions with ``ask`` (default: the workspace's live process)."""
        self._ask = ask or ask_live
        self._known: dict[Key, Question] = {}
        self._latest: dict[tuple[str, str], Key] = {}
        self._lock = threading.Lock()

    def known(self, key: Key) -> Question | None:
        """Return a finished answer, without requesting one."""
        found = self._known.get(key)
        return found if found and found.done and not found.error else None

    def settled(self, key: Key) -> bool:
        """Whether this question has ended, successfully or not."""
        found = self._known.get(key)
        return found is not None and found.done

    def want(self, owner: str, key: Key, question: Question) -> Question:
        """Return the question in its current state; if it is new, ask it in the background.

        The previous question of the same ``owner`` on this text is given up if it is pending. A
        question that failed is asked again if its owner has asked a different one since.
        """
        place = (owner, key[1])
        with self._lock:
            before = self._latest.get(place)
            if before != key:
                self._release(place)
            self._latest[place] = key
            found = self._known.get(key)
            if found and not (found.error and before != key):
                return found
            self._known[key] = question
            for old in list(self._known)[: max(0, len(self._known) - KEPT)]:
                if self._known[old].done and old not in self._latest.values():
                    del self._known[old]
        threading.Thread(target=self._run, args=(question,), daemon=True).start()
        return question

    def give_up(self, owner: str, but: Iterable[Key]) -> None:
        """Stop pending questions of ``owner`` other than ``but``: they would delay the rest."""
        wanted = set(but)
        with self._lock:
            for place, key in list(self._latest.items()):
                if place[0] == owner and key not in wanted:
                    self._release(place)

    def _release(self, place: tuple[str, str]) -> None:
        """Forget the question at ``place``, and stop it if nobody else is waiting for it."""
        key = self._latest.pop(place, None)
        found = self._known.get(key) if key else None
        if key and found and not found.done and key not in self._latest.values():
            del self._known[key]
            found.stop.set()

    def _run(self, question: Question) -> None:
        try:
            self._ask(question)
        except DepthcutError as error:
            question.error = str(error)
        except Exception as error:
            question.error = f"Unexpected {type(error).__name__}: {error}."
        question.done = True

    def answers(self, info: CheckpointInfo, text: Mapping[str, Any]) -> list[tuple[Removal, float]]:
        """Return everything that was skipped on ``text``, with the perplexity measured."""
        place = key_of(info, text, Removal())[:2]
        return [
            (key[2], question.ppl)
            for key, question in list(self._known.items())
            if key[:2] == place and question.done and question.ppl and not question.error
        ]

    def forget(self, key: Key) -> None:
        """Drop an answer, so that the next request asks again."""
        with self._lock:
            self._latest = {place: k for place, k in self._latest.items() if k != key}
            self._known.pop(key, None)


class _Superseded(Exception):
    pass


def ask_live(question: Question) -> None:
    """Ask the workspace's live process, starting it if none is running."""

    def wait(why: str) -> None:
        question.waiting = why
        if question.stop.is_set():
            raise _Superseded

    on = {name: question.text[name] for name in ON if name in question.text}
    started = {"checkpoint": question.checkpoint, **on}
    try:
        record = client.ensure(Workspace(), started, on_wait=wait)
    except _Superseded:
        return
    began = time.perf_counter()
    values = {
        **model_values(question.checkpoint, question.skip),
        **{name: value for name, value in question.text.items() if name not in ON},
    }
    kind = "generate" if "prompt" in question.text else "perplexity"
    for reply in client.events(record, kind, values, stop=question.stop):
        question.waiting = reply.why if isinstance(reply, Waiting) else ""
        question.seconds = time.perf_counter() - began
        if isinstance(reply, Part):
            question.dense_ppl, question.stderr = reply.dense_ppl, reply.stderr
            question.windows, question.of = reply.windows, reply.of
            question.ppl = reply.ppl
        if isinstance(reply, Measured):
            question.device, question.dtype = reply.device, reply.dtype
            question.tokens_per_s = reply.tokens_per_s
        if isinstance(reply, Token):
            question.written += "".join(reply.texts[:1])


@st.cache_resource(show_spinner=False)
def desk() -> Desk:
    """Return this dashboard's desk."""
    return Desk()
