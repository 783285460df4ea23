"""The wire protocol: one JSON object per line, one question per connection.

A client connects to the loopback address in the contact file, sends its question with the secret,
and reads events until a ``done`` or ``error`` event. Closing the connection cancels the question.

    -> {"secret": "...", "ask": "perplexity", "checkpoint": "demo", "skip": [3, 5]}
    <- {"event": "waiting", "for": "loading demo"}
    <- {"event": "part", "ppl": 2.51, "windows": 8, "of": 210}
    <- {"event": "done", "ppl": 2.48, "windows": 210, "of": 210, ...}

Questions are ``perplexity``, ``generate``, ``tokens``, ``status``, ``unload`` (free the models) and
``stop`` (end the process). No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import outside
from core.checkpoint import chat
from core.checkpoint.drop import Removal
from core.data.calibration import JOINS
from core.data.evaluation import BOS_PROTOCOLS
from core.errors import DepthcutError, InputError, RunError
from core.prune import toggle
from core.runs.spec import option
from core.runs.workspace import BOOKKEEPING, located, read_json

CONTACT = "live.json"
LINE_BYTES = 2**22
"""The longest line that either side accepts."""
LOOK_S = 0.05
"""How often a client that waits for a message looks whether it is still wanted."""
QUIET_S = 1.0
"""A server with nothing to say sends a ``waiting`` event after this long."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint without some blocks, or parts of blocks."""

    checkpoint: str = option(help="Folder, run, Hub id, smollm2, or demo.")
    skip: tuple[int, ...] = option((), help="Blocks to skip.")
    attention: tuple[int, ...] = option((), help="Blocks whose attention to skip.")
    mlp: tuple[int, ...] = option((), help="Blocks whose MLP to skip.")
    mlp_width: tuple[str, ...] = option(
        (), help="MLPs to run with fewer neurons, as block:neurons, e.g. 3:768."
    )
    neurons: str = option("", help="Budget run that ranked the neurons, for mlp_width.")

    @property
    def removal(self) -> Removal:
        """All that is skipped."""
        width = toggle.width_from_text(",".join(self.mlp_width))
        return Removal(self.skip, self.attention, self.mlp, width, self.neurons)


def model_values(checkpoint: str, removal: Removal) -> dict[str, Any]:
    """Return the fields of a `Model`, with which a question begins."""
    return {
        "checkpoint": checkpoint,
        "skip": sorted(removal.drop),
        "attention": sorted(removal.attention),
        "mlp": sorted(removal.mlp),
        "mlp_width": [f"{block}:{count}" for block, count in removal.width],
        "neurons": str(located(removal.order) or removal.order) if removal.width else "",
    }


@dataclass(frozen=True, kw_only=True)
class Perplexity(Model):
    """The perplexity of a text without some blocks, or parts of blocks."""

    source: str = option("auto", help="Text to evaluate on, as for evaluate --perplexity.")
    window: int = option(128, help="Tokens in a window.", low=2, high=1048576, unit="tokens")
    bos: str = option(
        "once", help="BOS once, or in every window; see evaluate.", choices=BOS_PROTOCOLS
    )
    samples: int | None = option(
        None, help="Evaluate on this many calibration rows, as in importance.", low=1, high=100000
    )
    seed: int = option(1234, help="Seed for drawing the calibration rows.", low=0)
    join: str = option("auto", help="Join short rows, as for evaluate.", choices=JOINS)
    chat_template: str = option("auto", help="Of calibration rows.", choices=chat.CHOICES)
    tokens: int | None = option(
        None,
        help="Evaluate on only the first N tokens. Default: as many as take a few seconds.",
        low=2,
        unit="tokens",
    )
    quick: bool = option(
        False, help="Evaluate on the beginning of the text, to answer in a fraction of a second."
    )
    spread: bool = option(
        False, help="Windows spread evenly over the text, not its beginning, if not all are used."
    )
    paired: bool = option(
        False, help="Evaluate the whole model on the same windows too, and compare them."
    )
    fresh: bool = option(False, help="Discard what earlier answers computed.")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text is generated."""

    max_tokens: int = option(
        64, help="Maximum number of new tokens.", low=1, high=65536, unit="tokens"
    )
    temperature: float = option(
        0.8,
        help="0 always takes the most likely token; higher values are more random.",
        low=0.0,
        high=5.0,
    )
    top_k: int = option(50, help="Sample from the k most likely tokens; 0: from all.", low=0)
    top_p: float = option(
        0.95,
        help="Sample from the most likely tokens whose probabilities add up to this share.",
        low=0.01,
        high=1.0,
    )
    seed: int = option(1234, help="The same seed gives the same text.", low=0, high=2**31)
    batch: int = option(1, help="Number of texts generated side by side.", low=1, high=256)


@dataclass(frozen=True, kw_only=True)
class Generate(Model, Sampling):
    """Generated continuation of a prompt, without some blocks, or parts of blocks."""

    prompt: str = option(help="Text to continue.")
    chat: bool = option(False, help="Send the prompt as a user message in the chat template.")


@dataclass(frozen=True, kw_only=True)
class Tokens(Model):
    """The loss of each token of a text, without some blocks, or parts of blocks."""

    text: str = option(help="Text to read.")


QUESTIONS: dict[str, type] = {"perplexity": Perplexity, "generate": Generate, "tokens": Tokens}
"""Kinds of question to the model -> the spec of their fields."""


class LiveGone(RunError):
    """The live process has ended or does not respond."""


@dataclass(frozen=True)
class Contact:
    """Address of a live process, and the secret that it expects first."""

    host: str
    port: int
    secret: str


def write_contact(folder: Path, contact: Contact) -> None:
    """Write the contact file of a run directory, readable only by its owner."""
    path = folder / BOOKKEEPING / CONTACT
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(contact.__dict__, file)
    temporary.replace(path)


def read_contact(folder: Path) -> Contact | None:
    """Return the contact of a run; None if it is not listening (yet)."""
    found = read_json(folder / BOOKKEEPING / CONTACT) or {}
    try:
        return Contact(str(found["host"]), int(found["port"]), str(found["secret"]))
    except (KeyError, ValueError, TypeError):
        return None


def remove_contact(folder: Path) -> None:
    """Remove the contact file: the run no longer listens."""
    with contextlib.suppress(OSError):
        (folder / BOOKKEEPING / CONTACT).unlink(missing_ok=True)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message; raises `OSError` if the other side has closed the connection."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def lines(
    connection: socket.socket, stop: threading.Event | None = None
) -> Iterator[dict[str, Any]]:
    """Yield messages until the other side closes, or ``stop`` is set.

    Raises `OSError` (`TimeoutError` if no bytes came within the connection's timeout), and
    `ValueError` for a line that is too long or not a JSON object.
    """
    silence_s, data = connection.gettimeout(), bytearray()
    while True:
        deadline = None if silence_s is None else time.monotonic() + silence_s
        while not select.select([connection], [], [], LOOK_S)[0]:
            if stop is not None and stop.is_set():
                return
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError("no message arrived in time")
        if stop is not None and stop.is_set():
            return
        piece = connection.recv(65536)
        data += piece
        *whole, rest = bytes(data).split(b"\n")
        for line in whole:
            yield _parsed(line)
        data = bytearray(rest)
        if len(data) > LINE_BYTES:
            raise ValueError("the line is too long")
        if not piece:
            if data:
                yield _parsed(bytes(data))
            return


def first_message(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    """Return a connection's first message; all of it must arrive within ``timeout_s``.

    Raises `OSError` (`TimeoutError` for the time), and `ValueError` for a line that is too long or
    not a JSON object.
    """
    deadline, line = time.monotonic() + timeout_s, bytearray()
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the message did not arrive in time")
        connection.settimeout(left)
        piece = connection.recv(65536)
        line += piece
        if len(line) > LINE_BYTES:
            raise ValueError("the line is too long")
        if not piece:
            break
    return _parsed(bytes(line))


def _parsed(line: bytes) -> dict[str, Any]:
    """Return a line's JSON object; raises `ValueError` for anything else."""
    message = outside.loads(line, finite=False)
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    return message


def error_event(error: DepthcutError) -> dict[str, Any]:
    """Return the event that reports ``error`` to a client."""
    return {
        "event": "error",
        "message": error.message,
        "hint": error.hint,
        "input": isinstance(error, InputError),
    }


def error_of(event: dict[str, Any]) -> DepthcutError:
    """Return the error that an event reports."""
    kind = InputError if event.get("input") else RunError
    return kind(str(event.get("message", "The request failed.")), str(event.get("hint", "")))
