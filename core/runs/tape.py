"""A tape: JSON lines that a run adds to as it goes, so that it continues after a kill. No torch.

The first line says what the others belong to. A kill cuts off at most the last line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from core import outside
from core.runs import workspace

Line = dict[str, Any]


def read(path: Path, is_head: Callable[[Any], bool], is_line: Callable[[Any], bool]) -> list[Line]:
    """Return the whole lines of a tape, up to the first that is damaged; empty without one."""
    found: list[Line] = []
    if not outside.is_file(path):
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (is_line(line) if found else is_head(line)):
            break
        found.append(line)
    return found


def begin(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a tape of these lines, which replaces the one at ``path`` at once.

    Raises `OutputError` if it cannot be written, as `append` does.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        beside.replace(path)
    except OSError as error:
        raise workspace.cannot_write(path, error) from error


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line."""
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
    except OSError as error:
        raise workspace.cannot_write(path, error) from error
