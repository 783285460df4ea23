"""Execute one spec inside a run directory: bookkeeping, device, cancellation, errors.

The same function serves the foreground command line and detached processes started by a page.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from core.commands import Command
from core.errors import Cancelled, DepthcutError, HandedOver, OutputError
from core.runs import devices, processes, workspace
from core.runs import status as statuses
from core.runs.device_lock import DeviceLock
from core.runs.failures import as_known
from core.runs.memory_guard import MemoryGuard
from core.runs.progress import Progress
from core.runs.ranks import ALONE, Ranks, places
from core.runs.spec import DeviceOptions, RunSpec, to_arguments, to_dict
from core.runs.workspace import BOOKKEEPING, ON

DETACHED = "DEPTHCUT_DETACHED"
"""Environment variable of a detached run: the ``--out`` it was started for."""
JOB = "DEPTHCUT_JOB"
"""Environment variable of a run that SLURM started: the number of its job."""
CONTINUES = "DEPTHCUT_CONTINUES"
"""How many further jobs may continue such a run after its time limit."""
NO_LOCK = "DEPTHCUT_NO_DEVICE_LOCK"
"""Set where a scheduler hands out devices, so that runs do not wait for each other's locks."""
STATUS_EVERY_S = 0.25
KILLED = "Killed: the run did not stop within the grace period."
GONE = "The run's folder was deleted."
HUNG_UP = "Cancelled: the terminal or the connection was closed."
TIME_LIMIT = "Stopped before the time limit of its job; completed results were kept."
RESERVE = "reserve"
"""A file in the bookkeeping that is given up at the end, so that a full disk can be recorded."""
RESERVE_BYTES = 64 * 1024
OWN_FILES = (
    *("status.json", "heartbeat", "metrics.jsonl", "log.txt", "cancel", "launch.json"),
    *("lock", ".launch.lock", RESERVE),
)
"""What the machinery itself writes into the bookkeeping, spec.json apart."""


class RunProgress(Progress):
    """Progress that is written into the run directory and to standard error."""

    def __init__(self, run: Run) -> None:
        """Report on ``run``."""
        self._run = run
        self._written = 0.0
        self._metrics = run.book / "metrics.jsonl"

    def step(
        self, done: int, total: int, message: str = "", *, left_s: float | None = None
    ) -> None:
        """Record progress: at most four times a second, and always at the end of a phase."""
        self.check_cancel()
        now, clock = time.time(), time.monotonic()
        step = self._run.status.get("progress") or {}
        if step.get("total") != total or done < (step.get("done") or 0) or not step:
            step = {"since": now, "since_clock": clock, "first": done}
        step = {**step, "done": done, "total": total, "message": message, "left_s": left_s}
        self._run.status["progress"] = {**step, "at": now, "at_clock": clock}
        if clock - self._written >= STATUS_EVERY_S or done >= total:
            self._written = clock
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
        """Raise `Cancelled` after a cancel request or a stop signal, or if the folder is gone."""
        if self._run.is_gone():
            raise Cancelled(GONE)
        if self._run.cancel_requested():
            raise Cancelled("Cancelled.", "Completed results were kept.")

    def _show(self, done: int, total: int, message: str) -> None:
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            with contextlib.suppress(OSError):  # the terminal was closed
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
        self.ranks: Ranks = ALONE
        """This process among those that share the run's work."""
        self.kill_others: Callable[[], None] = lambda: None
        """Kills the other processes; called before this one leaves by force."""
        self._more_locks: list[DeviceLock] = []
        self.detached = is_detached(folder)
        self._lock = threading.Lock()
        self._stop_signal = 0
        self._inode: int | None = None
        self._opened = False
        self._cancel_seen: float | None = None
        self._ended = threading.Event()
        self.progress: Progress = RunProgress(self)

    def path(self, name: str) -> Path:
        """Return the path of a result file."""
        return self.dir / name

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON result atomically, with its schema version."""
        self.note(name)
        workspace.write_json(self.dir / name, value)

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV result atomically."""
        self.note(name)
        workspace.write_csv(self.dir / name, columns, rows)

    def write_text(self, name: str, text: str) -> None:
        """Write a text result atomically."""
        self.note(name)
        workspace.write_text(self.dir / name, text)

    def note(self, name: str) -> None:
        """Record that this run wrote ``name``, so that a later run in this folder replaces it."""
        if self.is_gone():
            raise Cancelled(GONE)
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
        known = self._inode is not None
        if known and self.is_gone():
            raise OutputError(GONE)
        value = dict(self.status)
        workspace.write_json(self.book / "status.json", value, durable=False, parents=not known)
        self._inode = self._inode or statuses.inode_of(self.book)

    def is_gone(self) -> bool:
        """Whether the run's folder was deleted, or replaced, after the run had begun.

        What the run writes while its folder is being deleted can keep the folder: without
        spec.json it is what is left of the run, not the run.
        """
        if self._inode is None:
            return False
        if self._inode != statuses.inode_of(self.book):
            return True
        return self._opened and not (self.book / "spec.json").exists()

    def opened(self) -> None:
        """Record that the bookkeeping is complete."""
        self._opened = True

    def remove_rest(self) -> None:
        """Remove what this run has written into a folder while that was being deleted."""
        if self._inode != statuses.inode_of(self.book):
            return
        with contextlib.suppress(OSError):
            workspace.sweep(self.book)
            for name in OWN_FILES:
                (self.book / name).unlink(missing_ok=True)
            self.book.rmdir()
            self.dir.rmdir()

    def reserve(self) -> None:
        """Take a little disk space, which `give_up_reserve` frees; without success if it is full.

        The bytes are written, since some file systems store a hole or zeros without using space.
        """
        with contextlib.suppress(OSError), (self.book / RESERVE).open("wb") as handle:
            handle.write(os.urandom(RESERVE_BYTES))

    def give_up_reserve(self) -> None:
        """Free the reserved disk space: the end of the run is about to be recorded."""
        with contextlib.suppress(OSError):
            (self.book / RESERVE).unlink()

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
        return bool(self._stop_signal) or (self.book / "cancel").exists()

    @property
    def why_cancelled(self) -> str:
        """Why this run stops, in one sentence."""
        if self.is_gone():
            return GONE
        return _WHY.get(self._stop_signal, "Cancelled.")

    @property
    def is_continued(self) -> bool:
        """Whether this run stops for its job's time limit, and another job continues it."""
        left = os.environ.get(CONTINUES, "")
        more = left.isdigit() and int(left) > 0
        more = more and (hasattr(self.spec, "resume") or self.command.name in workspace.CHAINS)
        return self._stop_signal == signal.SIGUSR1 and more and not self.is_gone()

    def stop_signal(self, number: int, _: Any = None) -> None:
        """Handle a signal to stop: at the next step; a second SIGTERM or SIGINT stops at once.

        A closing terminal sends SIGHUP more than once: the shell passes it on, then the kernel.
        """
        if self._stop_signal:
            if number in (signal.SIGHUP, signal.SIGUSR1):
                return
            raise KeyboardInterrupt
        self._stop_signal = number
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # print is not allowed in a signal handler
                os.write(2, b"Stopping at the next step. Press Ctrl-C again to stop at once.\n")

    def take_device(self, device: str, still: Callable[[str], None] | None = None) -> DeviceLock:
        """Queue for ``device`` and hold it until the run ends.

        ``still`` is called while waiting, with what is ahead, and may raise to stop waiting.
        """
        owner = {"run": str(self.dir), "command": self.command.name, "since": time.time()}
        lock = DeviceLock(device, owner)
        if os.environ.get(NO_LOCK):
            self.write_status(state="running", device=device, waiting_for="")
            return lock
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

    def take_devices(self, names: Sequence[str]) -> None:
        """Queue for several devices, one lock each, and hold them until the run ends.

        All runs take them in the same order, so that none waits for another in a circle.
        """
        several = sorted(dict.fromkeys(names), key=devices.lock_name)
        for name in several:
            if self.device_lock:
                self._more_locks.append(self.device_lock)
            self.take_device(name)
        if len(several) > 1:
            self.write_status(device=", ".join(dict.fromkeys(names)))

    def beat(self) -> None:
        """Touch the heartbeat until the run ends; kill a cancelled run that does not stop."""
        beat, memory = self.book / "heartbeat", MemoryGuard()
        while not self._ended.wait(workspace.HEARTBEAT_S):
            if memory.is_stuck((self.status.get("progress") or {}).get("at_clock")):
                self.end_by_force("failed", memory.error())
            with contextlib.suppress(OSError):
                beat.touch()
            if not (self.cancel_requested() or self.is_gone()):
                continue
            self._cancel_seen = self._cancel_seen or time.monotonic()
            if time.monotonic() - self._cancel_seen > self.command.grace_s:
                self.end_by_force("cancelled", Cancelled(KILLED))

    def end_by_force(self, state: str, why: DepthcutError) -> None:
        """Record the end and leave the process, whatever its main thread is doing."""
        try:
            self.log(str(why))
            self.kill_others()
            self.finish(state, error=why.message, hint=why.hint)
        finally:
            os._exit(why.exit_status)

    def finish(self, state: str, error: str = "", hint: str = "") -> None:
        """Write the final state and release the device; only the first call has an effect."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            self.status.update(statuses.ending(self.status, state, error, hint))
            # write the final state last, so that a reader who sees it also sees the finished folder
            try:
                if self.is_gone():
                    self.remove_rest()
                    return
                self.give_up_reserve()
                (self.book / "cancel").unlink(missing_ok=True)
                self._put_final_status()
            except (OutputError, OSError) as problem:  # the run will be shown as lost
                with contextlib.suppress(OSError):
                    print(f"Cannot write the final state {state}: {problem}", file=sys.stderr)
            finally:
                for lock in (self.device_lock, *self._more_locks):
                    if lock:
                        lock.release()

    def hand_over(self) -> None:
        """Leave the run to the job that continues it: it waits, and has no process."""
        with self._lock:
            if not self._ended.is_set():
                self._ended.set()
                self.status.update(state="queued", pid=None, device="", continues=True)
                self.give_up_reserve()
                self._put_status()

    def _put_final_status(self) -> None:
        """Write the status; on a full disk into the old file, which needs no new space."""
        try:
            self._put_status()
        except OutputError:
            if self.is_gone():
                raise
            text = workspace.to_json({"schema": workspace.SCHEMA, **self.status})
            with (self.book / "status.json").open("r+", encoding="utf-8") as handle:
                handle.write(text)
                handle.truncate()


_WHY: dict[int, str] = {signal.SIGHUP: HUNG_UP, signal.SIGUSR1: TIME_LIMIT}


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
            raise busy(folder, f" ({record.command}, {record.state})")
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
        refuse_link(folder)
        (folder / BOOKKEEPING).mkdir(parents=True, exist_ok=True)
        workspace.unlink_links(folder / BOOKKEEPING)
    except OSError as error:
        raise workspace.cannot_write(folder, error) from error


def refuse_link(folder: Path) -> None:
    """Raise `OutputError` if a folder's bookkeeping is a link, beyond which nothing is written."""
    if (folder / BOOKKEEPING).is_symlink():
        raise OutputError(f"{folder / BOOKKEEPING} is a link.", "Delete it, or give another --out.")


def _is_own(folder: Path, record: workspace.RunRecord | None) -> bool:
    """Whether the run that ``folder`` announces is the one this process was started for."""
    if record is None or not record.is_live:
        return False
    pid, job = record.status.get("pid"), os.environ.get(JOB)
    if job and record.status.get("job") == job and is_detached(folder):
        return True  # SLURM has started the job again
    return pid == os.getpid() or (pid is None and is_detached(folder))


def busy(folder: Path, what: str = "") -> OutputError:
    """Return the error for a folder with a live run; ``what`` names it."""
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
            raise busy(folder) from None
        except OSError:
            pass  # on a file system without locks, the status is the only guard
        yield


def clear(folder: Path, status: dict[str, Any]) -> None:
    """Remove an earlier run's results in ``folder``, so that they do not mix with ours."""
    for name in status.get("files") or []:
        if path := workspace.own_file(folder, name):
            path.unlink(missing_ok=True)
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
        with _signals(run):
            _open(run, resume=resume)
            threading.Thread(target=run.beat, daemon=True).start()
            return _carry_out(command, spec, run)


def _open(run: Run, *, resume: bool) -> None:
    """Write the bookkeeping of a new run.

    Mark the run as running before deleting earlier results: a crash in between then shows a lost
    run, not a finished one with missing files.
    """
    before = statuses.cleaned(workspace.read_json(run.book / "status.json") or {})
    old = before.get("files") or []
    born = statuses.born(run.book)
    if run.detached:  # the run began when it was announced
        born |= {key: before[key] for key in ("created", "clock") if key in before}
    job = {"job": os.environ[JOB]} if run.detached and os.environ.get(JOB) else {}
    run.write_status(state="running", **born, files=old, **processes.identity(), **job)
    run.reserve()
    try:
        if not run.detached:  # a page may have asked a detached run to stop while it started
            (run.book / "cancel").unlink(missing_ok=True)
        if not resume:
            (run.book / "metrics.jsonl").unlink(missing_ok=True)
            clear(run.dir, before)
        (run.book / "heartbeat").touch()
    except OSError as error:
        raise workspace.cannot_write(run.dir, error) from error
    save_spec(run.dir, run.command, run.spec, on=_asked_of_place() if run.detached else None)
    run.opened()
    if old and not resume:
        run.write_status(files=[])


def _carry_out(command: Command, spec: RunSpec, run: Run) -> int:
    try:
        module = command.load()
        # report bad input immediately instead of after the device queue
        if hasattr(module, "check"):
            module.check(spec)
        if command.takes_device(to_dict(spec)):
            asked = cast(DeviceOptions, spec).device
            if asked == "auto":
                for gpu in devices.unusable():
                    run.log(str(gpu))
            run.take_devices(places(asked, processes_of(spec)))
        result = _computed(module, spec, run)
        run.finish("done")
        if result:
            _print_json(result)
        return 0
    except (Cancelled, KeyboardInterrupt):
        run.give_up_reserve()
        run.log(run.why_cancelled, plain=True)
        if run.is_continued:
            run.hand_over()
            return Cancelled.exit_status
        run.finish("cancelled", error=run.why_cancelled)
        return Cancelled.exit_status
    except HandedOver as error:
        run.log(str(error))
        run.hand_over()
        return error.exit_status
    except BaseException as error:
        run.give_up_reserve()
        known = error if isinstance(error, DepthcutError) else as_known(error, folder=run.dir)
        if known is not error and not isinstance(known, OutputError):  # not for a full disk
            run.log(traceback.format_exc().rstrip())
        run.log(f"Error: {known}", plain=True)
        run.finish("failed", error=known.message, hint=known.hint)
        return known.exit_status


def processes_of(spec: Any) -> int:
    """Return how many processes share a run with these options."""
    return int(getattr(spec, "processes", 1))


def _computed(module: Any, spec: RunSpec, run: Run) -> Any:
    """Run the command: alone, or with other processes that share its work."""
    size = processes_of(spec)
    if size == 1:
        return module.run(spec, run)
    from core.runs import rank_start

    asked = cast(DeviceOptions, spec).device
    with rank_start.together(run, spec, places(asked, size)) as own:
        return module.run(own, run)


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Route SIGTERM, SIGINT and SIGHUP to the run while it works (main thread only).

    SIGHUP stays ignored if it was, as under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    routed = {signal.SIGTERM, signal.SIGINT}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        routed.add(signal.SIGHUP)
    if os.environ.get(JOB):  # SLURM's notice that the time limit is near
        routed.add(signal.SIGUSR1)
    old = {number: signal.signal(number, run.stop_signal) for number in routed}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def save_spec(
    folder: Path,
    command: Command,
    spec: RunSpec,
    cwd: Path | None = None,
    on: Mapping[str, Any] | None = None,
) -> None:
    """Write spec.json: the command, its options, the equivalent argv and the start folder.

    ``on`` is what a launch asked of another place.
    """
    argv = ["python", "-m", "core", command.name, *to_arguments(spec), *place_words(on or {})]
    value: dict[str, Any] = {"command": command.name, "spec": to_dict(spec), "argv": argv}
    value["cwd"] = str(cwd or os.getcwd())
    if on:
        value["on"] = dict(on)
    workspace.write_json(folder / BOOKKEEPING / "spec.json", value)


def place_words(on: Mapping[str, Any]) -> list[str]:
    """Return the options of the command line that ask for a place."""
    flags = {"place": "--on", "gpus": "--gpus", "nodes": "--nodes", "time": "--time"}
    return [word for key, flag in flags.items() if on.get(key) for word in (flag, str(on[key]))]


def _asked_of_place() -> dict[str, Any] | None:
    """Return what the launch of this process asked of its place, if it was started at one."""
    try:
        found = json.loads(os.environ.get(ON) or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, default=str))
