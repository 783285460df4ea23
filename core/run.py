"""Carry out one spec inside a run directory: bookkeeping, device, cancel, errors.

The same function serves the foreground command line and a detached process started by a page.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from core import processes, workspace
from core.commands import Command
from core.device_lock import DeviceLock
from core.errors import Cancelled, DepthcutError, OutOfMemoryError, OutputError
from core.progress import Progress
from core.spec import to_arguments, to_dict
from core.workspace import BOOKKEEPING

DETACHED = "DEPTHCUT_DETACHED"
STATUS_EVERY_S = 0.25


class RunProgress(Progress):
    """Progress that is written into the run directory and to standard error."""

    def __init__(self, run: Run) -> None:
        """Report on ``run``."""
        self._run = run
        self._written = 0.0
        self._phase = ""
        self._metrics = run.book / "metrics.jsonl"

    def step(self, done: int, total: int, message: str = "") -> None:
        """Record progress, at most four times a second but always at the end of a phase."""
        self.check_cancel()
        now = time.time()
        step = self._run.status.get("progress") or {}
        if step.get("total") != total or done < (step.get("done") or 0) or not step:
            step = {"since": now, "first": done}
        step = {**step, "done": done, "total": total, "message": message, "at": now}
        self._run.status["progress"] = step
        if now - self._written >= STATUS_EVERY_S or done >= total:
            self._written = now
            self._run.write_status()
        self._show(done, total, message)

    def metric(self, **values: float | int | str | None) -> None:
        """Append one JSON line; a single write, so a reader sees whole lines."""
        import json

        line = json.dumps({"time": round(time.time(), 3), **values})
        with self._metrics.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    def log(self, message: str) -> None:
        """Write one line to the log and to standard error."""
        self._run.log(message)

    def check_cancel(self) -> None:
        """Raise `Cancelled` when a cancel request or a stop signal has come."""
        if self._run.cancel_requested():
            raise Cancelled("Cancelled on request.", "What was complete is kept.")

    def _show(self, done: int, total: int, message: str) -> None:
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r\033[K[{done}/{total}] {message}", end=end, file=sys.stderr, flush=True)


class Run:
    """What a runner is given: its folder, its progress, and atomic writing."""

    def __init__(self, command: Command, spec: Any, folder: Path) -> None:
        """Bind a command and its spec to ``folder``; nothing is written yet."""
        self.command = command
        self.spec = spec
        self.dir = folder
        self.book = folder / BOOKKEEPING
        self.status: dict[str, Any] = {}
        self.device_lock: DeviceLock | None = None
        self._lock = threading.Lock()
        self._stop_signal = False
        self._cancel_seen: float | None = None
        self._ended = threading.Event()
        self.progress: Progress = RunProgress(self)

    def path(self, name: str) -> Path:
        """Return the path of a result file."""
        return self.dir / name

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON result atomically, with its schema version."""
        workspace.write_json(self.dir / name, value)

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV result atomically."""
        workspace.write_csv(self.dir / name, columns, rows)

    def write_status(self, **changes: Any) -> None:
        """Update status.json."""
        with self._lock:
            self.status.update(changes)
            workspace.write_json(self.book / "status.json", dict(self.status))

    def log(self, message: str) -> None:
        """Write one line to the run's log, and to standard error in the foreground."""
        line = f"{time.strftime('%H:%M:%S')} {message}"
        print(line, file=sys.stderr, flush=True)
        if not os.environ.get(DETACHED):
            with (self.book / "log.txt").open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")

    def cancel_requested(self) -> bool:
        """Whether someone asked this run to stop."""
        return self._stop_signal or (self.book / "cancel").exists()

    def stop_signal(self, *_: Any) -> None:
        """Handle SIGTERM and SIGINT: ask the run to stop at its next step; twice ends it."""
        if self._stop_signal:
            raise KeyboardInterrupt
        self._stop_signal = True

    def take_device(self, device: str) -> DeviceLock:
        """Wait in line for ``device`` and hold it until the run ends."""
        owner = {"run": str(self.dir), "command": self.command.name, "since": time.time()}
        lock = DeviceLock(device, owner)
        said = ""

        def on_wait(ahead: str) -> None:
            nonlocal said
            self.progress.check_cancel()
            if ahead != said:
                said = ahead
                self.log(f"Waiting for {device}, behind {ahead}.")
                self.write_status(state="queued", device=device, waiting_for=ahead)

        lock.acquire(on_wait)
        self.device_lock = lock
        self.write_status(state="running", device=device, waiting_for="")
        return lock

    def beat(self) -> None:
        """Touch the heartbeat until the run ends; end a cancelled run that does not stop."""
        beat = self.book / "heartbeat"
        while not self._ended.wait(workspace.HEARTBEAT_S):
            with contextlib.suppress(OSError):
                beat.touch()
            if not self.cancel_requested():
                continue
            self._cancel_seen = self._cancel_seen or time.time()
            if time.time() - self._cancel_seen > self.command.grace_s:
                self.finish("cancelled", error="Ended by force: it did not stop when asked.")
                os._exit(Cancelled.exit_status)

    def finish(self, state: str, error: str = "", hint: str = "") -> None:
        """Write the final state and free the device."""
        self._ended.set()
        self.write_status(state=state, error=error, hint=hint, finished=time.time(), waiting_for="")
        (self.book / "cancel").unlink(missing_ok=True)
        if self.device_lock:
            self.device_lock.release()


def prepare(folder: Path, *, overwrite: bool = False) -> None:
    """Check that ``folder`` may take a run's results; raises `OutputError` where not.

    Free are: a new folder, an empty one, one that a page has just made for this run, and one whose
    run failed, was cancelled or lost (it can be started again). A finished result is kept unless
    ``overwrite`` is given.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file.", "Give a folder with --out.")
    record = workspace.read_run(folder) if folder.is_dir() else None
    ours = record and record.status.get("pid") in (None, os.getpid())
    if record and record.is_live and not ours:
        raise OutputError(
            f"A run is going on in {folder} ({record.command}, {record.state}).",
            "Wait for it, cancel it, or give another --out.",
        )
    occupied = folder.is_dir() and any(p.name != BOOKKEEPING for p in folder.iterdir())
    restart = record is not None and record.state in ("failed", "cancelled", "lost")
    if occupied and not restart and not overwrite:
        raise OutputError(
            f"{folder} exists and is not empty.", "Give another --out, or add --overwrite."
        )
    try:
        (folder / BOOKKEEPING).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Cannot write to {folder}: {error.strerror}.",
            "Give a folder that you may write to with --out.",
        ) from error


def execute(command: Command, spec: Any, *, overwrite: bool = False) -> int:
    """Carry out ``spec`` in its ``out`` folder and return the exit status.

    Expected errors are written to the status and printed as one sentence; unexpected ones leave
    their traceback in the log.
    """
    folder = Path(spec.out)
    resume = bool(getattr(spec, "resume", False) or getattr(spec, "overwrite", False))
    prepare(folder, overwrite=overwrite or resume)
    run = Run(command, spec, folder)
    created = (workspace.read_json(run.book / "status.json") or {}).get("created")
    fresh = (workspace.read_json(run.book / "launch.json") or {}).get("pid") == os.getpid()
    if not fresh:
        (run.book / "cancel").unlink(missing_ok=True)
    if not resume:
        (run.book / "metrics.jsonl").unlink(missing_ok=True)
    save_spec(folder, command, spec)
    (run.book / "heartbeat").touch()
    run.write_status(
        state="running",
        created=created if fresh and created else time.time(),
        host=socket.gethostname(),
        **processes.identity(),
    )
    threading.Thread(target=run.beat, daemon=True).start()
    with _signals(run):
        return _carry_out(command, spec, run)


def _carry_out(command: Command, spec: Any, run: Run) -> int:
    try:
        module = command.load()
        if command.computes:
            from core.model import resolve_device

            run.take_device(str(resolve_device(spec.device)))
        result = module.run(spec, run)
        run.finish("done")
        if result:
            _print_json(result)
        return 0
    except (Cancelled, KeyboardInterrupt):
        run.finish("cancelled", error="Cancelled on request.")
        print("Cancelled on request.", file=sys.stderr)
        return Cancelled.exit_status
    except DepthcutError as error:
        run.finish("failed", error=error.message, hint=error.hint)
        run.log(f"Error: {error}")
        return error.exit_status
    except BaseException as error:
        known = _as_known(error)
        run.log(traceback.format_exc())
        run.finish("failed", error=known.message, hint=known.hint)
        run.log(f"Error: {known}")
        return known.exit_status


def _as_known(error: BaseException) -> DepthcutError:
    """Turn an unexpected exception into one sentence with a way out."""
    name = type(error).__name__
    text = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "out of memory" in text:
        return OutOfMemoryError(
            f"Out of memory: {text or name}.",
            "Use a smaller dtype, fewer samples or shorter rows, or another device.",
        )
    return DepthcutError(f"Unexpected {name}: {text}.", "The log has the traceback.")


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Route SIGTERM and SIGINT to the run while it works (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {s: signal.signal(s, run.stop_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def save_spec(folder: Path, command: Command, spec: Any) -> None:
    """Write spec.json: the command, its options, and the argv that gives them."""
    argv = ["python", "-m", "core", command.name, *to_arguments(spec)]
    value = {"command": command.name, "spec": to_dict(spec), "argv": argv}
    workspace.write_json(folder / BOOKKEEPING / "spec.json", value)


def _print_json(value: dict[str, Any]) -> None:
    import json

    print(json.dumps(value, indent=2, default=str))
