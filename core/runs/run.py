"""Execute one spec inside a run directory: bookkeeping, device, cancellation, errors.

The same function serves the foreground command line and detached processes started by a page.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from core.commands import Command
from core.errors import Cancelled, DepthcutError, OutOfMemoryError, OutputError, RunError
from core.runs import devices, processes, workspace
from core.runs.device_lock import DeviceLock
from core.runs.progress import Progress
from core.runs.spec import DeviceOptions, RunSpec, to_arguments, to_dict
from core.runs.workspace import BOOKKEEPING

DETACHED = "DEPTHCUT_DETACHED"
"""Environment variable of a detached run: the ``--out`` it was started for."""
STATUS_EVERY_S = 0.25
KILLED = "Killed: the run did not stop within the grace period."


class RunProgress(Progress):
    """Progress that is written into the run directory and to standard error."""

    def __init__(self, run: Run) -> None:
        """Report on ``run``."""
        self._run = run
        self._written = 0.0
        self._metrics = run.book / "metrics.jsonl"

    def step(self, done: int, total: int, message: str = "") -> None:
        """Record progress: at most four times a second, and always at the end of a phase."""
        self.check_cancel()
        now = time.time()
        step = self._run.status.get("progress") or {}
        if step.get("total") != total or done < (step.get("done") or 0) or not step:
            step = {"since": now, "first": done}
        step = {**step, "done": done, "total": total, "message": message, "at": now}
        self._run.status["progress"] = step
        if now - self._written >= STATUS_EVERY_S or done >= total:
            self._written = now
            with contextlib.suppress(OutputError):  # writing the results reports a full disk
                self._run.write_status()
        self._show(done, total, message)

    def metric(self, **values: float | int | str | None) -> None:
        """Append one JSON line in a single write, so that readers only see whole lines."""
        line = workspace.to_json({"time": round(time.time(), 3), **values})
        try:
            with self._metrics.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        except OSError as error:
            raise workspace.cannot_write(self._metrics, error) from error

    def log(self, message: str) -> None:
        """Write one line to the log and to standard error."""
        self._run.log(message)

    def check_cancel(self) -> None:
        """Raise `Cancelled` after a cancel request or a stop signal."""
        if self._run.cancel_requested():
            raise Cancelled("Cancelled.", "Completed results were kept.")

    def _show(self, done: int, total: int, message: str) -> None:
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r\033[K[{done}/{total}] {message}", end=end, file=sys.stderr, flush=True)


class Run:
    """What a runner works with: its folder, its progress, and atomic writes."""

    def __init__(self, command: Command, spec: RunSpec, folder: Path) -> None:
        """Bind a command and its spec to ``folder``; nothing is written yet."""
        self.command = command
        self.spec = spec
        self.dir = folder
        self.book = folder / BOOKKEEPING
        self.status: dict[str, Any] = {}
        self.device_lock: DeviceLock | None = None
        self.detached = is_detached(folder)
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
        self._note(name)
        workspace.write_json(self.dir / name, value)

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV result atomically."""
        self._note(name)
        workspace.write_csv(self.dir / name, columns, rows)

    def write_text(self, name: str, text: str) -> None:
        """Write a text result atomically."""
        self._note(name)
        workspace.write_text(self.dir / name, text)

    def _note(self, name: str) -> None:
        """Record that this run wrote ``name``, so that a later run in this folder replaces it."""
        files = self.status.setdefault("files", [])
        if name not in files:
            files.append(name)
            self.write_status()

    def write_status(self, **changes: Any) -> None:
        """Update status.json; changes after the run has ended are ignored."""
        with self._lock:
            if not self._ended.is_set():
                self.status.update(changes)
                self._put_status()

    def _put_status(self) -> None:
        workspace.write_json(self.book / "status.json", dict(self.status), durable=False)

    def log(self, message: str, *, plain: bool = False) -> None:
        """Write one line to the run's log, and to standard error (``plain``: without the time)."""
        line = f"{time.strftime('%H:%M:%S')} {message}"
        with contextlib.suppress(OSError):  # a full disk, or a closed terminal
            shown = message if plain and not self.detached else line
            print(shown, file=sys.stderr, flush=True)
        if not self.detached:  # a detached run's standard error is the log
            with (
                contextlib.suppress(OSError),
                (self.book / "log.txt").open("a", encoding="utf-8") as handle,
            ):
                handle.write(line + "\n")

    def cancel_requested(self) -> bool:
        """Whether someone asked this run to stop."""
        return self._stop_signal or (self.book / "cancel").exists()

    def stop_signal(self, number: int, _: Any = None) -> None:
        """Handle SIGTERM and SIGINT: stop at the next step; a second signal stops at once."""
        if self._stop_signal:
            raise KeyboardInterrupt
        self._stop_signal = True
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # print is not allowed in a signal handler
                os.write(2, b"Stopping at the next step. Press Ctrl-C again to stop at once.\n")

    def take_device(self, device: str, still: Callable[[str], None] | None = None) -> DeviceLock:
        """Queue for ``device`` and hold it until the run ends.

        ``still`` is called while waiting, with what is ahead, and may raise to stop waiting.
        """
        owner = {"run": str(self.dir), "command": self.command.name, "since": time.time()}
        lock = DeviceLock(device, owner)
        logged = ""

        def on_wait(ahead: str) -> None:
            nonlocal logged
            self.progress.check_cancel()
            if still:
                still(ahead)
            if ahead != logged:
                logged = ahead
                self.log(f"Waiting for {device}, behind {ahead}.")
                self.write_status(state="queued", device=device, waiting_for=ahead)

        lock.acquire(on_wait)
        self.device_lock = lock
        self.write_status(state="running", device=device, waiting_for="")
        return lock

    def beat(self) -> None:
        """Touch the heartbeat until the run ends; kill a cancelled run that does not stop."""
        beat = self.book / "heartbeat"
        while not self._ended.wait(workspace.HEARTBEAT_S):
            with contextlib.suppress(OSError):
                beat.touch()
            if not self.cancel_requested():
                continue
            self._cancel_seen = self._cancel_seen or time.time()
            if time.time() - self._cancel_seen > self.command.grace_s:
                try:
                    self.log(KILLED)
                    self.finish("cancelled", error=KILLED)
                finally:
                    os._exit(Cancelled.exit_status)

    def finish(self, state: str, error: str = "", hint: str = "") -> None:
        """Write the final state and release the device; only the first call has an effect."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            self.status.update(
                state=state, error=error, hint=hint, finished=time.time(), waiting_for=""
            )
            # write the final state last, so that a reader who sees it also sees the finished folder
            try:
                (self.book / "cancel").unlink(missing_ok=True)
                self._put_status()
            except (OutputError, OSError):  # e.g. a full disk: the run will be shown as lost
                print(f"Cannot write the final state {state}.", file=sys.stderr)
            finally:
                if self.device_lock:
                    self.device_lock.release()


def is_detached(folder: Path) -> bool:
    """Whether this process was started by a launcher for a run in ``folder``."""
    return os.environ.get(DETACHED) == str(folder)


def prepare(folder: Path, *, overwrite: bool = False, command: str = "") -> None:
    """Check that a run may write its results to ``folder``; raises `OutputError` if not.

    Accepted: a new folder, an empty one, one that a page has just created for this run, and one
    whose run failed, was cancelled or was lost (it can be started again). A finished result is
    kept unless ``overwrite`` is given; results of another ``command`` are never mixed with ours.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file.", "Give a folder with --out.")
        record = workspace.read_run(folder) if folder.is_dir() else None
        if record and record.is_live and not _is_own(folder, record):
            raise _busy(folder, f" ({record.command}, {record.state})")
        occupied = folder.is_dir() and any(p.name != BOOKKEEPING for p in folder.iterdir())
        restart = record is not None and record.state in ("failed", "cancelled", "lost")
        if occupied and not (restart or overwrite or _is_own(folder, record)):
            raise OutputError(
                f"{folder} exists and is not empty.", "Give another --out, or add --overwrite."
            )
        if occupied and record and command not in ("", record.command):
            raise OutputError(
                f"{folder} already contains {_article(record.command)} {record.command} run.",
                "Give another --out, or delete it.",
            )
        (folder / BOOKKEEPING).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise workspace.cannot_write(folder, error) from error


def _is_own(folder: Path, record: workspace.RunRecord | None) -> bool:
    """Whether the run that ``folder`` announces is the one this process was started for."""
    if record is None or not record.is_live:
        return False
    pid = record.status.get("pid")
    return pid == os.getpid() or (pid is None and is_detached(folder))


def _busy(folder: Path, what: str = "") -> OutputError:
    return OutputError(
        f"A run is already in progress in {folder}{what}.",
        "Wait for it, cancel it, or give another --out.",
    )


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's own kernel lock, so that two runs cannot start in it at once."""
    try:
        handle = (folder / BOOKKEEPING / "lock").open("a")
    except OSError as error:
        raise workspace.cannot_write(folder, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(folder) from None
        except OSError:
            pass  # on a file system without locks, the status is the only guard
        yield


def _clear(folder: Path, status: dict[str, Any]) -> None:
    """Remove an earlier run's results in ``folder``, so that they do not mix with ours."""
    for name in status.get("files") or []:
        (folder / str(name)).unlink(missing_ok=True)
    for place in (folder, folder / BOOKKEEPING):
        workspace.sweep(place)


def execute(command: Command, spec: RunSpec, *, overwrite: bool = False) -> int:
    """Execute ``spec`` in its ``out`` folder and return the exit status.

    Expected errors are written to the status and printed as one sentence; unexpected errors also
    leave a traceback in the log.
    """
    folder = Path(spec.out)
    resume = bool(getattr(spec, "resume", False))
    replace = overwrite or resume or bool(getattr(spec, "overwrite", False))
    prepare(folder, overwrite=replace, command=command.name)
    with _only_one(folder):
        run = Run(command, spec, folder)
        _open(run, resume=resume)
        threading.Thread(target=run.beat, daemon=True).start()
        with _signals(run):
            return _carry_out(command, spec, run)


def _open(run: Run, *, resume: bool) -> None:
    """Write the bookkeeping of a new run.

    Mark the run as running before deleting earlier results: a crash in between then shows a lost
    run, not a finished one with missing files.
    """
    before = workspace.read_json(run.book / "status.json") or {}
    created = before.get("created") if run.detached else None
    old = list(before.get("files") or [])
    run.write_status(
        state="running",
        created=created or time.time(),
        host=socket.gethostname(),
        files=old,
        **processes.identity(),
    )
    try:
        if not run.detached:  # a page may have asked a detached run to stop while it started
            (run.book / "cancel").unlink(missing_ok=True)
        if not resume:
            (run.book / "metrics.jsonl").unlink(missing_ok=True)
            _clear(run.dir, before)
        (run.book / "heartbeat").touch()
    except OSError as error:
        raise workspace.cannot_write(run.dir, error) from error
    save_spec(run.dir, run.command, run.spec)
    if old and not resume:
        run.write_status(files=[])


def _carry_out(command: Command, spec: RunSpec, run: Run) -> int:
    try:
        module = command.load()
        # report bad input immediately instead of after the device queue
        if hasattr(module, "check"):
            module.check(spec)
        if command.computes:
            asked = cast(DeviceOptions, spec).device
            if asked == "auto":
                for gpu in devices.unusable():
                    run.log(str(gpu))
            run.take_device(devices.resolve(asked))
        result = module.run(spec, run)
        run.finish("done")
        if result:
            _print_json(result)
        return 0
    except (Cancelled, KeyboardInterrupt):
        run.log("Cancelled.", plain=True)
        run.finish("cancelled", error="Cancelled.")
        return Cancelled.exit_status
    except BaseException as error:
        known = error if isinstance(error, DepthcutError) else as_known(error)
        if known is not error:
            run.log(traceback.format_exc().rstrip())
        run.log(f"Error: {known}", plain=True)
        run.finish("failed", error=known.message, hint=known.hint)
        return known.exit_status


def as_known(error: BaseException, hint: str = "See the log for the traceback.") -> DepthcutError:
    """Turn an unexpected exception into one sentence and a hint."""
    name = type(error).__name__
    text = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "out of memory" in text:
        return OutOfMemoryError(
            f"Out of memory: {text or name}.",
            "Use a smaller dtype, fewer samples or shorter rows, or another device.",
        )
    return RunError(f"Unexpected {name}: {text or 'no message'}.", hint)


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


def save_spec(folder: Path, command: Command, spec: RunSpec, cwd: Path | None = None) -> None:
    """Write spec.json: the command, its options, the equivalent argv and the start folder."""
    argv = ["python", "-m", "core", command.name, *to_arguments(spec)]
    value = {"command": command.name, "spec": to_dict(spec), "argv": argv}
    value["cwd"] = str(cwd or os.getcwd())
    workspace.write_json(folder / BOOKKEEPING / "spec.json", value)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, default=str))
