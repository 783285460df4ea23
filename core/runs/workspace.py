"""Run directories on disk: finding them, reading their records and writing their files.

A run directory holds plain results; the program's own bookkeeping is in its ``.run`` folder (see
docs/architecture.md). Reading never changes anything; writing is atomic: a temporary file in the
same folder, flushed, then renamed.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import functools
import io
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from core import outside
from core.errors import InputError, OutputError
from core.runs import processes
from core.runs import status as statuses

T = TypeVar("T")
SCHEMA = 1
FINAL_STATES = ("done", "failed", "cancelled")
LIVE_STATES = ("starting", "queued", "running")
HEARTBEAT_S = 2.0
REMOTE_SILENCE_S = 60.0
STARTING_GRACE_S = 15.0
"""How long an announced run may take to record its process before it counts as lost."""
BOOKKEEPING = ".run"
ON = "DEPTHCUT_ON"
"""Environment variable of a run at another place (`core.places`): what its launch asked for."""
CHAINS = ("recipe", "demo")
"""Commands whose folders contain other runs: their steps."""
MAKERS = ("prune", "width", "retrain", "quantize")
"""Commands whose runs leave a checkpoint behind."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, None)
"""Error numbers with which a full disk, a quota or a limit on a file's size shows itself."""


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error for a file or folder that cannot be written, with what helps against it."""
    above = next((p for p in path.absolute().parents if os.path.lexists(p)), path)
    if not os.path.isdir(above):  # never raises
        return OutputError(f"Cannot write {path}: {above} is not a folder.", "Give another --out.")
    hint = "Give a writable --out folder."
    if error.errno in FULL:
        hint = "Free up disk space, or give a writable --out folder."
    return OutputError(f"Cannot write {path}: {error.strerror or error}.", hint)


def temporary_beside(path: Path) -> Path:
    """Return a new name beside ``path`` for a temporary file that will replace it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")


def sweep(folder: Path) -> None:
    """Remove temporary files and folders whose writer has exited.

    Those of a live process are kept: a page may be writing while the run clears its folder.
    """
    for left in folder.glob(".*.tmp"):
        writer = left.name.split(".")[-3]
        if not writer.isdigit() or not processes.is_alive(int(writer), None):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists; of a link, only the link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def own_file(folder: Path, name: object) -> Path | None:
    """Return the result file that a run's record names, if it may be removed; else None.

    A record is data: it can be copied, damaged or written by someone else. So only a file that
    lies in ``folder`` itself, outside the bookkeeping and not beyond a link, is the run's own.
    """
    parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
    if not parts or parts[0] in (os.sep, BOOKKEEPING) or ".." in parts:
        return None
    path = folder
    for part in parts:
        if path != folder and os.path.islink(path):
            return None
        path = path / part
    return path if os.path.islink(path) or os.path.isfile(path) else None


def unlink_links(book: Path) -> None:
    """Remove links from a run's bookkeeping, so that nothing is written beyond it."""
    with os.scandir(book) as entries:
        for entry in entries:
            if entry.is_symlink():
                os.unlink(entry.path)


def write_text(path: Path, text: str, *, durable: bool = True, parents: bool = True) -> None:
    """Write ``text`` as UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"), durable=durable, parents=parents)


def write_bytes(path: Path, data: bytes, *, durable: bool = True, parents: bool = True) -> None:
    """Write ``data`` atomically; raises `OutputError` if the folder cannot be written.

    ``durable`` waits until the bytes are on disk, so that results survive a power failure.
    Missing folders are created, unless ``parents`` is False.
    """
    temporary = temporary_beside(path)
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        temporary.replace(path)
        _written[0] = time.monotonic_ns()
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON: what is not finite, which JSON cannot say, becomes null."""
    try:
        return json.dumps(value, indent=indent, default=str, allow_nan=False)
    except ValueError:
        plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
        return json.dumps(plain, indent=indent)


def write_json(
    path: Path, value: dict[str, Any], *, durable: bool = True, parents: bool = True
) -> None:
    """Write a JSON object atomically, with the schema version first; see `write_text`."""
    text = to_json({"schema": SCHEMA, **value}, indent=2) + "\n"
    write_text(path, text, durable=durable, parents=parents)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically; ``None`` becomes an empty cell, floats keep every digit."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or not (yet) readable."""
    try:
        value = outside.loads(outside.data(path), finite=False)
    except (OSError, outside.Malformed):
        return None
    return value if isinstance(value, dict) else None


def located(name: str | Path) -> Path | None:
    """Return the folder or file that a name means: a path, or a run's id; None if there is none."""
    given = outside.path_of(str(name))
    if not outside.exists(given) and outside.is_folder(default_root() / str(name)):
        given = default_root() / str(name)
    return given if outside.exists(given) else None


def default_root() -> Path:
    """Return the workspace folder: ``$DEPTHCUT_WORKSPACE``, or ``workspace``."""
    return Path(os.environ.get("DEPTHCUT_WORKSPACE") or "workspace")


@dataclasses.dataclass(frozen=True)
class Remarks:
    """What a person noted about a run."""

    tags: tuple[str, ...] = ()
    note: str = ""
    starred: bool = False


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The content of a run directory at the time it was read."""

    path: Path
    command: str
    spec: dict[str, Any]
    argv: list[str]
    state: str
    """starting, queued, running, done, failed, cancelled, or lost."""
    status: dict[str, Any]

    parent: str = ""
    """Id of the recipe that this run is a step of."""
    cwd: str = ""
    """Folder from which the run was started; relative paths in its spec start there."""
    given: str = ""
    """The name that the user gave it; empty without one."""
    remarks: Remarks = Remarks()
    """What the user noted about it."""
    damage: tuple[str, str] = ("", "")
    """What is wrong with the record itself, and what to do about it."""
    on: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What its launch asked of another place: place (its name), gpus, nodes, time; mostly empty."""

    @functools.cached_property
    def id(self) -> str:
        """Path relative to the workspace: the folder name; for a step, with the recipe's id."""
        return f"{self.parent}/{self.path.name}" if self.parent else self.path.name

    @property
    def name(self) -> str:
        """The user-given name, or the id."""
        return self.given or self.id

    @functools.cached_property
    def words(self) -> str:
        """All text in the spec, to see at once what cannot be in it."""
        return "\0".join(_texts(self.spec))

    @functools.cached_property
    def checkpoints(self) -> tuple[str, ...]:
        """The checkpoints that its spec names, as they were given."""
        several = self.spec.get("checkpoints")
        given = [self.spec.get("checkpoint"), self.spec.get("dense")]
        given += several if isinstance(several, list) else []
        return tuple(str(name) for name in given if name)

    @property
    def error(self) -> str:
        """What went wrong, in one sentence; empty if nothing did."""
        lost = "The process exited without reporting a reason." if self.state == "lost" else ""
        if lost and self.place:
            lost = f"The process that followed this run at {self.place} has ended."
        return str(self.damage[0] or self.status.get("error") or lost)

    @property
    def hint(self) -> str:
        """What to do about `error`."""
        if self.damage[0]:
            return self.damage[1]
        lost = "It may have been killed or run out of memory: check its log, then restart it."
        if self.place:
            lost = "It may still be going on there: restart it to follow it again."
        return str(self.status.get("hint") or (lost if self.state == "lost" else ""))

    @property
    def device(self) -> str:
        """The device the run holds, held or is waiting for."""
        return str(self.status.get("device") or "")

    @property
    def waiting_for(self) -> str:
        """The runs ahead of a queued run."""
        return str(self.status.get("waiting_for") or "")

    @property
    def place(self) -> str:
        """The name of the place where the run is, was or will be; empty for this machine."""
        return str(self.on.get("place") or "")

    @property
    def is_elsewhere(self) -> bool:
        """Whether the run is, was or will be carried out at another place than this process."""
        return bool(self.place) and not os.environ.get(ON)

    def place_facts(self) -> dict[str, Any]:
        """Return what is known of a run at another place, read from its place.json.

        ``node`` (the machine), ``job``, ``waiting`` (why SLURM has not started it), ``trouble``
        (what is wrong with the connection) and ``folder``; all are text and may be missing.
        """
        found = read_json(self.path / BOOKKEEPING / "place.json") if self.place else None
        return {key: value for key, value in (found or {}).items() if value not in ("", None)}

    @functools.cached_property
    def started(self) -> float:
        """Seconds since the epoch when the run was created."""
        return float(self.status.get("created") or 0.0)

    @property
    def finished(self) -> float | None:
        """Seconds since the epoch when the run ended; None while it is live."""
        value = self.status.get("finished")
        return float(value) if value else None

    @property
    def progress(self) -> tuple[int, int, str]:
        """Completed steps, total steps, and a description of the current one."""
        step = self.status.get("progress") or {}
        return int(step.get("done") or 0), int(step.get("total") or 0), str(step.get("message", ""))

    @property
    def seconds(self) -> float:
        """How long the run took, or has been going on, from its creation; 0 if it is lost."""
        if self.state in FINAL_STATES:
            return statuses.took_s(self.status)
        return (statuses.age_s(self.status) or 0.0) if self.is_live else 0.0

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds left at the pace so far; None before the first step or after the end.

        Steps that a resumed run had already completed do not count towards the pace.
        """
        return statuses.eta_s(self.status) if self.state == "running" else None

    @property
    def is_live(self) -> bool:
        """Whether the run is starting, queued or running."""
        return self.state in LIVE_STATES

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the log, from its last 64 KiB."""
        try:
            with (self.path / BOOKKEEPING / "log.txt").open("rb") as handle:
                size = handle.seek(0, os.SEEK_END)
                handle.seek(max(0, size - 65536))
                text = handle.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        rows = text.rstrip().split("\n")[1 if size > 65536 else 0 :]
        # keep only the last carriage-return frame of a progress bar
        kept = [row.rstrip("\r").rsplit("\r", 1)[-1] for row in rows]
        return "\n".join(kept[-lines:])

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metric lines, without a half-written last line."""
        return list(json_lines(self.path / BOOKKEEPING / "metrics.jsonl"))

    def holds_checkpoint(self) -> bool:
        """Whether the folder itself is a checkpoint (pruned, width-pruned)."""
        return (self.path / "config.json").is_file()


def disk_bytes(folder: Path) -> int:
    """Return the total size of all files below ``folder`` in bytes."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # a file that was just deleted
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file with one per line; other lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            value = outside.loads(line, finite=False)
        except outside.Malformed:
            continue
        if isinstance(value, dict):
            yield value


def _state_of(path: Path, status: dict[str, Any]) -> str:
    """Return the state; ``lost`` if the process ended without writing a final state."""
    state = str(status.get("state") or "starting")
    if state in FINAL_STATES:
        return state
    if state not in LIVE_STATES:
        return "lost"
    if not statuses.is_here(status):
        return state if _heartbeat_age(path) < REMOTE_SILENCE_S else "lost"
    if statuses.is_copy(path / BOOKKEEPING, status):
        return "lost"
    owner = owner_of(path, status)
    if not owner:
        spec = path / BOOKKEEPING / "spec.json"
        known = status if status.get("created") else {"created": _modified(spec)}
        age = statuses.age_s(known)
        return state if age is not None and age < STARTING_GRACE_S else "lost"
    return state if processes.is_alive(owner.get("pid"), owner.get("pid_started")) else "lost"


def owner_of(path: Path, status: dict[str, Any]) -> dict[str, Any]:
    """Return pid and start time of a run's process; empty if none was started yet."""
    if status.get("pid"):
        return status
    return statuses.cleaned(read_json(path / BOOKKEEPING / "launch.json") or {})


def _heartbeat_age(path: Path) -> float:
    return time.time() - _modified(path / BOOKKEEPING / "heartbeat")


def _modified(path: Path) -> float:
    """Return when a file was last written, in Unix seconds; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read_status(book: Path) -> dict[str, Any]:
    """Read status.json; fields of the wrong type are dropped."""
    return statuses.cleaned(read_json(book / "status.json") or {})


def read_run(path: Path) -> RunRecord | None:
    """Read one run directory; None if ``path`` is not one.

    A record that cannot be read is still a run: its ``damage`` says what is wrong.
    """
    book = path / BOOKKEEPING
    spec = read_json(book / "spec.json")
    if spec is None and not any(os.path.lexists(book / n) for n in ("spec.json", "status.json")):
        return None
    status = _read_status(book)
    state = _state_of(path, status)
    if state == "lost":  # the run may have ended between the status read and the process check
        status = _read_status(book)
        state = _state_of(path, status)
    if spec is None and not _is_damaged(book, state):
        return None
    spec = spec or {}
    options, argv = spec.get("spec"), spec.get("argv")
    command, cwd = spec.get("command"), spec.get("cwd")
    given, remarks = _noted(book)
    return RunRecord(
        path=path,
        command=command if isinstance(command, str) else "",
        spec=options if isinstance(options, dict) else {},
        argv=[str(word) for word in argv] if isinstance(argv, list) else [],
        state=state,
        status=status,
        parent=path.parent.name if (path.parent / BOOKKEEPING / "spec.json").is_file() else "",
        cwd=cwd if isinstance(cwd, str) else "",
        given=given,
        remarks=remarks,
        damage=_damage(book, spec, status, state),
        on=on if isinstance(on := spec.get("on"), dict) else {},
    )


def _noted(book: Path) -> tuple[str, Remarks]:
    """Return the name and the remarks that a person gave; what is not of its type is dropped."""
    found = read_json(book / "name.json") or {}
    name, note, tags = found.get("name"), found.get("note"), found.get("tags")
    listed = [t for t in tags if isinstance(t, str) and t] if isinstance(tags, list) else []
    return name if isinstance(name, str) else "", Remarks(
        tags=tuple(dict.fromkeys(listed)),
        note=note if isinstance(note, str) else "",
        starred=found.get("starred") is True,
    )


def _is_damaged(book: Path, state: str) -> bool:
    """Whether a folder whose spec.json cannot be read is a run nevertheless.

    A run that is being announced has no spec.json yet.
    """
    if os.path.lexists(book / "spec.json"):
        return True
    return (book / "status.json").is_file() and state != "starting"


def _damage(
    book: Path, spec: dict[str, Any], status: dict[str, Any], state: str
) -> tuple[str, str]:
    """Return what is wrong with a record and what to do about it; empty if nothing is."""
    delete = "Delete the run, or restore the file."
    if book.is_symlink():
        return f"{book} is a link, so it is not this run's own record.", "Delete the run."
    if not isinstance(spec.get("command"), str):
        problem = "cannot be read" if os.path.lexists(book / "spec.json") else "is missing"
        return f"The run's settings are unknown: {book / 'spec.json'} {problem}.", delete
    if not status and os.path.lexists(book / "status.json"):
        return (
            f"How the run ended is unknown: {book / 'status.json'} cannot be read.",
            "Restart the run, or delete it.",
        )
    if state == "lost" and statuses.is_copy(book, status):
        return (
            "This folder is a copy of a run that had not ended when it was copied.",
            "Restart it to continue it here, or delete the copy.",
        )
    return "", ""


def _broken_link(path: Path, parent: str) -> RunRecord:
    """Return the record of a link that leads nowhere."""
    damage = f"{path} is a link to a folder that does not exist.", "Restore the folder, or delete."
    return RunRecord(path, "", {}, [], "lost", {}, parent, damage=damage)


class Workspace:
    """A folder of run directories."""

    def __init__(self, root: str | Path | None = None) -> None:
        """Use ``root``, `default_root` by default; the folder is created on first use."""
        self.root = Path(root) if root else default_root()

    def is_writable(self) -> bool:
        """Whether runs can be created: the folder, or the nearest one above it, takes files."""
        root = self.root.absolute()
        existing = next(p for p in (root, *root.parents) if p.exists())
        return os.access(existing, os.W_OK | os.X_OK)

    def new_dir(self, command: str) -> Path:
        """Create and return an empty run directory named after the command and the time."""
        for _ in range(10):
            stamp = time.strftime("%Y%m%d-%H%M%S")
            path = self.root / f"{command}-{stamp}-{secrets.token_hex(2)}"
            try:
                (path / BOOKKEEPING).mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise OutputError(
                    f"Cannot create a run directory in {self.root}: {error.strerror}.",
                    "Give another folder with --workspace or DEPTHCUT_WORKSPACE.",
                ) from error
            return path
        raise OutputError(f"Cannot find an unused run name in {self.root}.", "Try again.")

    def runs(self, command: str = "") -> list[RunRecord]:
        """Return the runs and their steps, newest first; only those of ``command`` if given."""
        return list(_list(self.root).get(command, ()))

    def find(self, run: str) -> RunRecord:
        """Return a run by id, by its given name or by path; raises `InputError` if not found."""
        for path in (self.root / run, Path(run)):
            record = read_run(path) if outside.is_folder(path) else None
            if record:
                return record
        named = [r for r in self.runs() if r.name == run]
        if len(named) == 1:
            return named[0]
        raise InputError(
            f"No run '{run}' in {self.root}.", "List the runs with: python -m core jobs list."
        )

    def rename(self, record: RunRecord, name: str) -> RunRecord:
        """Give a run a display name and return its new record; its folder keeps the id."""
        clean = " ".join(name.split())[:80]
        if clean and any(r.name == clean and r.path != record.path for r in self.runs()):
            raise InputError(f"Another run is already named '{clean}'.", "Choose another name.")
        return self._note(record, clean, _noted(record.path / BOOKKEEPING)[1])

    def remark(
        self,
        record: RunRecord,
        *,
        tags: Iterable[str] | None = None,
        note: str | None = None,
        starred: bool | None = None,
    ) -> RunRecord:
        """Note something about a run and return its new record; what is None stays as it is."""
        name, now = _noted(record.path / BOOKKEEPING)
        if tags is not None:
            clean = (" ".join(tag.split())[:40] for tag in tags)
            now = dataclasses.replace(now, tags=tuple(dict.fromkeys(t for t in clean if t)))
        if note is not None:
            now = dataclasses.replace(now, note=note.strip()[:4000])
        if starred is not None:
            now = dataclasses.replace(now, starred=starred)
        return self._note(record, name, now)

    def _note(self, record: RunRecord, name: str, remarks: Remarks) -> RunRecord:
        value = {"name": name, **dataclasses.asdict(remarks)}
        write_json(record.path / BOOKKEEPING / "name.json", value, parents=False)
        return dataclasses.replace(record, given=name, remarks=remarks)

    def children(
        self, record: RunRecord, among: Sequence[RunRecord] | None = None
    ) -> list[RunRecord]:
        """Return the runs whose spec names this run's folder (or something in it).

        ``among`` saves reading all runs again if the caller has just read them.
        """
        target = _real(record.path)
        among = self.runs() if among is None else among
        among = [r for r in among if target.name in r.words]
        roots = (Path(), self.root)
        return [
            r
            for r in among
            if _mentions(r.spec, target, roots) and not _real(r.path).is_relative_to(target)
        ]

    def delete(self, record: RunRecord, *, orphan: bool = False) -> None:
        """Remove a run's folder; refused while it is live or other runs build on it.

        Of a linked run, only the link is removed.
        """
        current = read_run(record.path)
        if current and current.is_live:
            raise InputError(f"Run {record.id} is {current.state}.", "Cancel it first.")
        children = self.children(record)
        if children and not orphan:
            names = ", ".join(r.name for r in children[:5])
            others = "1 other run" if len(children) == 1 else f"{len(children)} other runs"
            raise InputError(
                f"Run {record.id} is used by {others}: {names}.", "Delete those first."
            )
        doomed = record.path.with_name(f".deleted-{record.path.name}-{secrets.token_hex(2)}")
        try:
            if record.path.is_symlink():
                record.path.unlink()
                _written[0] = time.monotonic_ns()
                return
            record.path.rename(doomed)
            _written[0] = time.monotonic_ns()
        except OSError as error:
            raise OutputError(
                f"Cannot delete {record.path}: {error.strerror}.", "Check its permissions."
            ) from error
        shutil.rmtree(doomed, ignore_errors=True)


def _runs_in(folder: Path) -> list[RunRecord]:
    """Return the runs directly below a folder; each is read again only if it changed."""
    try:
        with os.scandir(folder) as entries:
            kinds = {e.name: _kind(e) for e in entries if not e.name.startswith(".")}
    except OSError:
        return []
    parent = folder.name if (folder / BOOKKEEPING / "spec.json").is_file() else ""
    found = []
    for name, kind in kinds.items():
        if kind == "folder" and (record := _read_once(f"{folder}/{name}", parent)):
            found.append(record)
        elif kind == "broken link":
            found.append(_broken_link(folder / name, parent))
    return found


def _kind(entry: os.DirEntry[str]) -> str:
    """Return whether an entry is a folder, a broken link or something else."""
    with contextlib.suppress(OSError):  # a link to itself, or a folder beyond our permissions
        if entry.is_dir():
            return "folder"
    return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "other"


_known: dict[str, tuple[tuple[int, ...], RunRecord]] = {}
KNOWN_KEPT = 10_000


def _read_once(path: str, parent: str) -> RunRecord | None:
    """Return `read_run` of ``path``; the record is cached until a file of it changes.

    Every write replaces the file with a new one, so a changed inode invalidates the record. Of a
    run that has not ended, only whether its process still exists is asked every time.
    """
    files = _files_state(path)
    kept = _known.get(path)
    if kept and kept[0] == files and kept[1].parent == parent:
        record = kept[1]
        ended = record.state in FINAL_STATES
        if ended or _state_of(record.path, record.status) == record.state:
            return record
    found = read_run(Path(path))
    if found and files:
        if len(_known) >= KNOWN_KEPT:
            _known.clear()
        _known[path] = (files, found)
    return found


def _files_state(path: str) -> tuple[int, ...]:
    """Return what changes when a run's spec, status or name is written; empty if one is missing.

    Without a name, it counts as zeros.
    """
    book = f"{path}/{BOOKKEEPING}"
    found: tuple[int, ...] = ()
    try:
        for name in ("spec.json", "status.json"):
            stat = os.stat(f"{book}/{name}")
            found += (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    except OSError:
        return ()
    try:
        stat = os.stat(f"{book}/name.json")
    except OSError:
        return (*found, 0, 0, 0)
    return (*found, stat.st_ino, stat.st_mtime_ns, stat.st_size)


DRAW_S = 2.0
"""How much a thread may compute while it shares its first look at the disk."""
LONGEST_S = 20.0
"""How long it may take over that; many sessions that draw at once wait for each other."""
_draw = threading.local()
_written = [0]
"""When this process last wrote into a workspace, by the clock of `time.monotonic_ns`."""


def begin_draw() -> None:
    """Let all that this thread asks of the disk through `Looks` be one look, which begins now.

    For `DRAW_S` of computing at most; what this process writes meanwhile is seen.
    """
    _draw.began, _draw.spent = time.monotonic_ns(), time.thread_time()


def draw() -> tuple[int, int] | None:
    """Return what identifies this thread's draw and what has been written so far, if it draws."""
    began = getattr(_draw, "began", 0)
    return (began, _written[0]) if began else None


def _asked() -> int:
    """Return the time from which on a look at the disk is recent enough for this thread."""
    now = time.monotonic_ns()
    began = getattr(_draw, "began", 0)
    if now - began < LONGEST_S * 1e9 and time.thread_time() - _draw.spent < DRAW_S:
        return max(began, _written[0])
    return now


class Looks(Generic[T]):
    """What was seen on the disk, shared by those who asked before the look began.

    Threads that ask at the same time share one look: one that waited for a look that began after it
    asked takes its result. A thread that draws a page asks when its draw begins (`begin_draw`).
    A look that takes others counts from the beginning of the earliest.
    """

    def __init__(self, kept: int) -> None:
        """Keep what was seen last under up to ``kept`` keys."""
        self._kept = kept
        self._seen: dict[Hashable, tuple[int, T]] = {}
        self._turns: dict[Hashable, threading.Lock] = {}

    def take(self, key: Hashable, look: Callable[[], T]) -> T:
        """Return what ``look`` finds, or what it found since this thread asked."""
        asked = _asked()
        seen = self._seen.get(key)
        if seen is None or seen[0] <= asked:
            with self._turns.setdefault(key, threading.Lock()):
                seen = self._seen.get(key)
                if seen is None or seen[0] <= asked:
                    seen = self._look(key, look)
        _draw.earliest = min(seen[0], getattr(_draw, "earliest", seen[0]))
        return seen[1]

    def _look(self, key: Hashable, look: Callable[[], T]) -> tuple[int, T]:
        outer = getattr(_draw, "earliest", None)
        _draw.earliest = time.monotonic_ns()
        try:
            found = look()
            seen = _draw.earliest, found
        finally:
            _draw.earliest = time.monotonic_ns() if outer is None else outer
        if key not in self._seen and len(self._seen) >= self._kept:
            self._seen.clear()
            self._turns.clear()
        self._seen[key] = seen
        return seen


_lists: Looks[dict[str, list[RunRecord]]] = Looks(1)
"""One workspace is listed at a time, and tests have many."""


def _list(root: Path) -> dict[str, list[RunRecord]]:
    """Return the runs of a workspace and their steps by command, newest first; "" has all.

    The lists are shared.
    """
    return _lists.take(root.absolute(), lambda: _listed(root))


def _listed(root: Path) -> dict[str, list[RunRecord]]:
    found = []
    for record in _runs_in(root):
        found.append(record)
        if record.command in CHAINS:
            found += _runs_in(record.path)
    found.sort(key=lambda r: (r.started, r.id), reverse=True)
    by_command = {"": found}
    for record in found:
        if record.command:
            by_command.setdefault(record.command, []).append(record)
    return by_command


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a spec value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _mentions(value: Any, target: Path, roots: Sequence[Path]) -> bool:
    """Whether a spec value is ``target`` or a path below it, relative to any of ``roots``."""
    if isinstance(value, dict):
        return any(_mentions(v, target, roots) for v in value.values())
    if isinstance(value, list):
        return any(_mentions(v, target, roots) for v in value)
    if not isinstance(value, str) or target.name not in value or "\0" in value:
        return False
    paths = [_real(root / value) for root in roots]
    return any(path == target or target in path.parents for path in paths)


def _real(path: Path) -> Path:
    """Return the path without links; unlike ``resolve``, of links that lead in circles too."""
    return Path(os.path.realpath(path))
