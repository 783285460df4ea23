"""Ask the live process of a workspace: find it, start it, ask, stop it. No torch.

    record = client.ensure(Workspace(), {"checkpoint": "demo"})
    answer = client.answer(record, "perplexity", {"checkpoint": "demo", "skip": [3, 5]})
    for event in client.events(record, "generate", {...}): ...

One live process serves a workspace; all dashboards and sessions on it share that one.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from core.errors import DepthcutError, RunError
from core.live import protocol
from core.live.protocol import Contact, LiveGone
from core.live.replies import LAST, Done, Reply, Status, from_event
from core.runs import devices, jobs
from core.runs.workspace import RunRecord, Workspace, cannot_write, read_run

START_S = 120.0
"""How long a live model's process may take to start. Chosen: imports from a slow disk."""
SILENCE_S = 60.0
"""Without an event for this long, the process counts as hung (it sends one every second)."""
CONNECT_S = 3.0
"""How long connecting may take. Chosen; the process is on this machine."""

_GONE = "The live model's process has ended: it was stopped, killed, or ran out of memory."
_AGAIN = "Try again; the next request restarts it."


def running(where: Workspace) -> RunRecord | None:
    """Return the workspace's newest live run that is still running, or None."""
    return next((r for r in where.runs("live") if r.is_live), None)


def last(where: Workspace) -> RunRecord | None:
    """Return the workspace's newest live run, whatever its state."""
    return next(iter(where.runs("live")), None)


def ensure(
    where: Workspace,
    values: dict[str, Any] | None = None,
    *,
    patience_s: float = START_S,
    on_wait: Callable[[str], None] | None = None,
) -> RunRecord:
    """Return a live run that is listening; start one if there is none.

    One that runs on another device or in another precision than ``values`` ask for is stopped
    first; ``auto``, or nothing, takes any.

    ``on_wait`` gets the reason for waiting and may raise to give up. Time in the device's queue
    does not count towards ``patience_s``.

    Raises:
        RunError: It could not be started, or did not come up in time.
    """
    record = _one(where, values)
    deadline = time.monotonic() + patience_s
    while protocol.read_contact(record.path) is None or not record.is_live:
        if not record.is_live:
            raise RunError(
                f"The live model could not be started: {record.error or record.state}.",
                record.hint or f"See the log of {record.id}.",
            )
        queued = record.state == "queued"
        if on_wait:
            on_wait(f"waiting behind {record.waiting_for}" if queued else "starting the live model")
        if queued:
            deadline = time.monotonic() + patience_s
        elif time.monotonic() > deadline:
            raise RunError(
                f"The live model did not come up in {patience_s:.0f} s.",
                f"See the log of {record.id}.",
            )
        time.sleep(0.1)
        record = read_run(record.path) or record
    return record


def _one(where: Workspace, values: dict[str, Any] | None) -> RunRecord:
    """Return the live run, starting it if necessary; concurrent callers start only one."""
    try:
        where.root.mkdir(parents=True, exist_ok=True)
        handle = (where.root / ".live.lock").open("a")
    except OSError as error:
        raise cannot_write(where.root, error) from error
    with handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        found = running(where)
        if found and _is_elsewhere(found, values or {}):
            stop(found)
            found = None
        return found or jobs.launch("live", values or {}, where)


def _is_elsewhere(record: RunRecord, values: dict[str, Any]) -> bool:
    """Whether a live run has not the device or the precision that is asked for."""
    device, dtype = (str(values.get(name) or "auto") for name in ("device", "dtype"))
    if dtype not in ("auto", record.spec.get("dtype", "auto")):
        return True
    if device == "auto":
        return False
    return devices.meant(device) != devices.meant(str(record.spec.get("device") or "auto"))


def events(
    record: RunRecord,
    ask: str,
    values: dict[str, Any] | None = None,
    *,
    stop: threading.Event | None = None,
    silence_s: float = SILENCE_S,
) -> Iterator[Reply]:
    """Ask one question and yield its replies; the last is of the kind that `LAST` names.

    Closing the generator, or setting ``stop``, cancels the question on the server too.

    Raises:
        LiveGone: The process has ended, or does not respond.
        InputError | RunError: The error that the server reported.
    """
    contact = protocol.read_contact(record.path)
    if contact is None:
        raise LiveGone(_GONE, _AGAIN)
    with _connect(contact) as connection:
        connection.settimeout(silence_s)
        try:
            protocol.send(connection, {"secret": contact.secret, "ask": ask, **(values or {})})
            for event in protocol.lines(connection, stop):
                if event.get("event") == "error":
                    raise protocol.error_of(event)
                reply = from_event(ask, event)
                yield reply
                if type(reply) is LAST.get(ask, Done):
                    return
        except TimeoutError as error:
            raise LiveGone(
                f"The live model has not responded for {silence_s:.0f} s.",
                "Stop it; the next request restarts it.",
            ) from error
        except (OSError, ValueError) as error:
            raise LiveGone(_GONE, _AGAIN) from error
    if stop is not None and stop.is_set():
        return
    raise LiveGone(_GONE, _AGAIN)


def _connect(contact: Contact) -> socket.socket:
    try:
        return socket.create_connection((contact.host, contact.port), CONNECT_S)
    except OSError as error:
        raise LiveGone(_GONE, _AGAIN) from error


def answer(
    record: RunRecord, ask: str, values: dict[str, Any] | None = None, **options: Any
) -> Reply:
    """Ask one question and return its last reply."""
    *_, last = (Done(), *events(record, ask, values, **options))
    return last


def status(record: RunRecord) -> Status | None:
    """Return the live process's models and memory; None if it does not answer at once."""
    try:
        found = answer(record, "status", silence_s=CONNECT_S)
    except DepthcutError:
        return None
    return found if isinstance(found, Status) else None


def stop(record: RunRecord, patience_s: float = 10.0) -> None:
    """End the live process, which frees all its memory; kill it if it does not respond."""
    try:
        answer(record, "stop", silence_s=CONNECT_S)
    except DepthcutError:
        jobs.request_cancel(record)
    deadline = time.monotonic() + patience_s
    while (now := read_run(record.path)) and now.is_live:
        if time.monotonic() > deadline:
            jobs.cancel(now, grace_s=0)
            return
        time.sleep(0.05)
