"""Result files as frozen dataclasses: a file's keys or columns are the fields' names.

Reading is tolerant, so that runs of other versions still open and a corrupt file never breaks a
page: unknown keys are ignored, and a missing key or a value of the wrong type takes the field's
default. A field without a default is required: without it the whole object, or the row of a table,
counts as unreadable. Values are converted as the annotations say: int, float, str, bool, Any,
unions with None, tuples, lists, dictionaries and other dataclasses.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

from core import outside
from core.runs import workspace

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
OBJECTS_KEPT = 16_384
"""Objects in memory: several files of each of thousands of runs, which pages read in one draw."""
ROWS_KEPT = 500_000
"""Rows of all tables in memory together; some tables have a row per tensor or sample."""


def _kept(size: int) -> Callable[[F], F]:
    """Return `functools.lru_cache` with the signature kept: mypy calls type[T] unhashable."""
    return functools.lru_cache(maxsize=size)  # type: ignore[return-value]


class Writer(Protocol):
    """What writes result files: a `core.runs.run.Run`, or whatever stands in for one."""

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file atomically, with the schema number in front."""

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV file atomically."""


@dataclass(frozen=True)
class JsonResult:
    """Base of a dataclass that is one JSON file of a run directory."""

    FILE: ClassVar[str] = "summary.json"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in the order of the file's keys."""
        return _plain(self)

    def write(self, run: Writer) -> None:
        """Write the file atomically, with the schema number in front."""
        run.write_json(self.FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the file in ``folder``; None if it is absent, unreadable or incomplete.

        Kept in memory until the file changes.
        """
        path = folder / cls.FILE
        state = _state(path)
        return _read_object(cls, path, state) if state else None


@dataclass(frozen=True)
class CsvRow:
    """Base of a dataclass that is one row of a CSV file of a run directory."""

    FILE: ClassVar[str]

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the file's columns in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def write(cls, run: Writer, rows: Iterable[Self]) -> None:
        """Write the table atomically; None becomes an empty cell, booleans true and false."""
        names = cls.columns()
        run.write_csv(cls.FILE, names, [[_cell(getattr(r, n)) for n in names] for r in rows])

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, ...]:
        """Return the rows in ``folder`` that have all required cells; empty without a table.

        Kept in memory until the file changes.
        """
        path = folder / cls.FILE
        state = _state(path)
        return _tables.get(cls, path, state) if state else ()


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T | None:
    """Build the dataclass ``kind`` from parsed JSON; None if a required field is missing."""
    found: dict[str, Any] = {}
    for name, (read, _, required) in _fields(kind).items():
        value = read(values[name]) if name in values else MISSING
        if value is not MISSING:
            found[name] = value
        elif required:
            return None
    return kind(**found)


def _plain(value: Any) -> Any:
    """Return dataclasses as dictionaries and tuples as lists, all the way down."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written; None if there is no file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@_kept(OBJECTS_KEPT)
def _read_object(kind: type[T], path: Path, _: tuple[int, int, int]) -> T | None:
    values = workspace.read_json(path)
    return None if values is None else from_dict(kind, values)


class _Tables:
    """The tables used last, up to `ROWS_KEPT` rows together."""

    def __init__(self) -> None:
        self._found: dict[tuple[type, Path], tuple[tuple[int, int, int], tuple[Any, ...]]] = {}
        self._rows = 0
        self._lock = threading.Lock()

    def get(self, kind: type[T], path: Path, state: tuple[int, int, int]) -> tuple[T, ...]:
        """Return the rows of the file, read if they are not in memory in this state."""
        key = (kind, path)
        with self._lock:
            kept = self._found.pop(key, None)
            if kept and kept[0] == state:
                self._found[key] = kept  # now the one used last
                return kept[1]
            self._rows -= len(kept[1]) if kept else 0
        rows = _read_table(kind, path)
        with self._lock:
            before = self._found.pop(key, None)  # another thread may have read it meanwhile
            self._rows += len(rows) - (len(before[1]) if before else 0)
            self._found[key] = (state, rows)
            while self._rows > ROWS_KEPT and len(self._found) > 1:
                self._rows -= len(self._found.pop(next(iter(self._found)))[1])
        return rows


_tables = _Tables()


def _read_table(kind: type[T], path: Path) -> tuple[T, ...]:
    try:
        lines = outside.table(path)
    except (OSError, outside.Malformed):
        return ()
    parsers = [(name, parse) for name, (_, parse, _) in _fields(kind).items()]
    rows = (
        from_dict(kind, {n: parse(line[n]) for n, parse in parsers if n in line}) for line in lines
    )
    return tuple(row for row in rows if row is not None)


@_kept(256)
def _fields(
    kind: type,
) -> dict[str, tuple[Callable[[Any], Any], Callable[[str | None], Any], bool]]:
    """Return of every field what reads it from JSON and from CSV, and whether it is required."""
    hints = typing.get_type_hints(kind)
    return {
        f.name: (
            _reader(hints[f.name]),
            _parser(hints[f.name]),
            f.default is MISSING and f.default_factory is MISSING,
        )
        for f in dataclasses.fields(kind)
    }


def _reader(hint: Any) -> Callable[[Any], Any]:
    """Return what makes a parsed value one that ``hint`` says; MISSING if it is of another type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return functools.partial(_first, tuple(map(_reader, inner)))
    if hint is Any:
        return lambda value: value
    if hint is float:
        return _float
    if hint is int:
        return _int
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return functools.partial(_object, hint)
    if origin in (tuple, list) and (origin is list or inner[1:] == (...,)):
        return functools.partial(_alike, origin, _reader(inner[0]))
    if origin is tuple:
        return functools.partial(_row, tuple(map(_reader, inner)))
    if origin is dict:
        return functools.partial(_entries, _reader(inner[1]))
    return functools.partial(_only, origin or hint)


def _first(options: tuple[Callable[[Any], Any], ...], value: Any) -> Any:
    for option in options:
        if (found := option(value)) is not MISSING:
            return found
    return MISSING


def _float(value: Any) -> Any:
    try:
        return float(value) if type(value) in (int, float) else MISSING
    except OverflowError:  # an integer beyond the largest float
        return MISSING


def _int(value: Any) -> Any:
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else MISSING


def _object(kind: type, value: Any) -> Any:
    found = from_dict(kind, value) if isinstance(value, dict) else None
    return MISSING if found is None else found


def _alike(origin: Callable[[list[Any]], Any], item: Callable[[Any], Any], value: Any) -> Any:
    """Return a list or tuple whose items are all of one type."""
    if not isinstance(value, list | tuple):
        return MISSING
    items = [item(v) for v in value]
    return MISSING if any(v is MISSING for v in items) else origin(items)


def _row(kinds: tuple[Callable[[Any], Any], ...], value: Any) -> Any:
    """Return a tuple with a type for each place."""
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        return MISSING
    items = tuple(kind(v) for kind, v in zip(kinds, value, strict=True))
    return MISSING if any(v is MISSING for v in items) else items


def _entries(item: Callable[[Any], Any], value: Any) -> Any:
    if not isinstance(value, dict):
        return MISSING
    entries = {k: item(v) for k, v in value.items()}
    return MISSING if any(v is MISSING for v in entries.values()) else entries


def _only(kind: type, value: Any) -> Any:
    return value if type(value) is kind else MISSING


def _parser(hint: Any) -> Callable[[str | None], Any]:
    """Return what makes a CSV cell what ``hint`` names: a number, true, false, None or text."""
    kinds = typing.get_args(hint) or (hint,)
    empty = "" if hint is str else None
    numbers = tuple(k for k in (int, float) if k in kinds or (k is float and int in kinds))
    return functools.partial(_parsed, empty, bool in kinds, numbers)


def _parsed(empty: str | None, flag: bool, numbers: tuple[type, ...], text: str | None) -> Any:
    if not text:
        return empty
    if flag and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in numbers:
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
