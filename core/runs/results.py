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
    for name, (hint, required) in _fields(kind).items():
        value = _convert(values[name], hint) if name in values else MISSING
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
    hints = {name: hint for name, (hint, _) in _fields(kind).items()}
    rows = (
        from_dict(kind, {n: _parsed(line[n], h) for n, h in hints.items() if n in line})
        for line in lines
    )
    return tuple(row for row in rows if row is not None)


@_kept(256)
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Return annotation and whether it is required of every field."""
    hints = typing.get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in dataclasses.fields(kind)
    }


def _convert(value: Any, hint: Any) -> Any:
    """Return ``value`` as ``hint`` says; MISSING if it is of another type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        options = (_convert(value, option) for option in inner)
        return next((v for v in options if v is not MISSING), MISSING)
    if hint is Any:
        return value
    if hint is float:
        try:
            return float(value) if type(value) in (int, float) else MISSING
        except OverflowError:  # an integer beyond the largest float
            return MISSING
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if dataclasses.is_dataclass(hint):
        found = from_dict(hint, value) if isinstance(value, dict) else None  # type: ignore[arg-type]
        return MISSING if found is None else found
    if origin in (tuple, list) and isinstance(value, list | tuple):
        alike = origin is list or inner[1:] == (...,)
        kinds = [inner[0]] * len(value) if alike else list(inner)
        items = [_convert(v, k) for v, k in zip(value, kinds, strict=False)]
        return MISSING if MISSING in items or len(value) != len(kinds) else origin(items)
    if origin is dict and isinstance(value, dict):
        entries = {k: _convert(v, inner[1]) for k, v in value.items()}
        return MISSING if MISSING in entries.values() else entries
    return value if type(value) is (origin or hint) else MISSING


def _parsed(text: str | None, hint: Any) -> Any:
    """Return a CSV cell as the type that ``hint`` names: a number, true, false, None or text."""
    kinds = typing.get_args(hint) or (hint,)
    if not text:
        return "" if hint is str else None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds or (kind is float and int in kinds):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
