"""Files and JSON from outside, bounded before they are parsed.

Configs, headers, scores and records come from the Hub, from other programs and from URLs. What a
few bytes say must not take the machine, so every reader of such a file starts here: `text` and
`data` read a file up to a size, `loads` parses JSON up to a depth and a number of items, and
`is_file`, `is_folder` and `path_of` accept any string as a name.
"""

from __future__ import annotations

import csv
import io
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

MIB = 1 << 20
LARGEST_JSON = 64 * MIB
"""Bytes of a JSON file; the largest tokenizer.json of the supported families has 11 MiB."""
LARGEST_TABLE = 64 * MIB
"""Bytes of a CSV file of results; a row takes about 100."""
MOST_CELLS = 5_000_000
"""Rows times columns of a CSV file of results."""
DEEPEST = 64
"""Levels of nesting in JSON; config.json and tokenizer.json have up to 8."""
MOST_ITEMS = 4_000_000
"""Values in one JSON document; a tokenizer with 256,000 tokens and its merges has 2 million."""


class Malformed(ValueError):
    """A file is not what it should be; the text names the reason in a few words."""


def loads(text: str | bytes, *, most_items: int = MOST_ITEMS, finite: bool = True) -> Any:
    """Parse JSON; with ``finite``, NaN and Infinity are refused, as strict JSON does.

    Raises `Malformed` if it is not JSON, nested deeper than `DEEPEST`, has more than ``most_items``
    values, or contains text that is not Unicode (half of a surrogate pair).
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(f"byte {error.start} is not UTF-8") from error
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > most_items:
        raise Malformed(f"it has more than {most_items:,} values")
    try:
        value = json.loads(text, parse_constant=_not_finite if finite else None)
    except RecursionError:
        raise Malformed(_TOO_DEEP) from None
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(str(error)) from error
    if opened > DEEPEST:
        _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Malformed("it contains half of a surrogate pair") from None
    return value


_TOO_DEEP = f"it is nested deeper than {DEEPEST} levels"


def _not_finite(name: str) -> float:
    raise Malformed(f"{name} is not valid in JSON")


def _check_depth(value: Any) -> None:
    """Raise `Malformed` beyond `DEEPEST`: what is deeper breaks whatever walks through it."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for item in level:
            values = item.values() if type(item) is dict else item if type(item) is list else ()
            inner += [v for v in values if type(v) in (dict, list)]
        if not inner:
            return
        level = inner
    raise Malformed(_TOO_DEEP)


def data(path: Path, most_bytes: int = LARGEST_JSON) -> bytes:
    """Return a file's bytes.

    Raises `Malformed` if there are more than ``most_bytes``, if it is not a regular file (a pipe
    would never end) or if its name is impossible; `OSError` if it cannot be read.
    """
    try:
        state = os.stat(path)
    except ValueError as error:
        raise Malformed(f"its name is impossible ({error})") from error
    if not stat.S_ISREG(state.st_mode):
        raise Malformed("it is not a regular file")
    if state.st_size > most_bytes:
        raise Malformed(f"it has {state.st_size:,} bytes, more than the {most_bytes:,} allowed")
    with open(path, "rb") as handle:
        found = handle.read(state.st_size + 1)
        if len(found) <= state.st_size:
            return found
        grown = bytearray(found)  # it grows, or does not tell its size
        while piece := handle.read(MIB):
            grown += piece
            if len(grown) > most_bytes:
                raise Malformed(f"it has more than the {most_bytes:,} bytes allowed")
    return bytes(grown)


def text(path: Path, most_bytes: int = LARGEST_JSON) -> str:
    """Return a file's text without a byte order mark; raises as `data`, also if it is not UTF-8."""
    found = data(path, most_bytes)
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed(f"byte {error.start} is not UTF-8") from error


def read_json(path: Path, most_bytes: int = LARGEST_JSON) -> Any:
    """Return a JSON file's value; raises as `data` and `loads` do."""
    return loads(data(path, most_bytes))


def table(path: Path) -> list[dict[str, str | None]]:
    """Return the rows of a CSV file of results, column -> cell; None for a cell that is missing.

    Raises as `data`, also for a table of more than `MOST_CELLS` cells or one that is not CSV.
    """
    found = text(path, LARGEST_TABLE)
    lines = found.count("\n") + found.count("\r") + 1
    columns = found[: found.find("\n")].count(",") + 1
    if max(lines * columns, found.count(",")) > MOST_CELLS:
        raise Malformed(f"it has more than {MOST_CELLS:,} cells")
    try:
        rows = list(csv.DictReader(io.StringIO(found, newline="")))
    except csv.Error as error:
        raise Malformed(str(error)) from error
    return [{k: v for k, v in row.items() if k is not None} for row in rows]


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; False for a name that no file can have."""
    return os.path.isfile(path)  # pathlib raises for a name that is too long or not readable


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; False for a name that no folder can have."""
    return os.path.isdir(path)


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder; False for a name that none can have."""
    return os.path.exists(path)


def path_of(name: str) -> Path:
    """Return the path that a user wrote, with ~ expanded if it names a home folder."""
    return Path(os.path.expanduser(name))


def whole(value: Any, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """Return ``value`` if it is a whole number from ``low`` to ``high``; else raise `Malformed`."""
    if type(value) is not int or not low <= value <= high:
        raise Malformed(f"{quoted(value)} is not a whole number from {low:,} to {high:,}")
    return value


def brief(value: Any, most: int = 60) -> str:
    """Return a value as text for a message: shortened, with control characters escaped."""
    shown = value if isinstance(value, str) and value.isprintable() else quoted(value, most)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def quoted(value: Any, most: int = 60) -> str:
    """Return a value as Python writes it, with quotes around text, shortened for a message."""
    shown = _SHORT.repr(value)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
