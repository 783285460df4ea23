"""Answers that a run has written so far, so that it continues after a kill. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import outside
from core.errors import OptionError
from core.runs import workspace

TAPE = "answers.jsonl"
"""In the run's bookkeeping."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote after one prompt."""

    ids: tuple[int, ...]
    why: str
    """How it ended, as in `core.model.decode.Written`."""


class Tape:
    """One line of settings, then one line for each batch of answers."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Begin a tape, or continue the one at ``path``.

        Raises `OptionError` if that was recorded with other settings: its answers are not ours.
        """
        self.path = path
        self.answers: dict[int, Answer] = {}
        self.seconds = 0.0
        head = json.loads(json.dumps(settings))
        lines = _lines(path) if resume else []
        if lines and lines[0] != head:
            others = [name for name in head if lines[0].get(name) != head[name]]
            raise OptionError(
                f"--resume: the answers in {path.parent.parent} were written with another "
                f"{' and '.join(others) or 'version'}.",
                "Resume with the same options, or leave --resume out to begin again.",
            )
        for line in lines[1:]:
            self._take(line)
        beside = path.with_name(f".{path.name}.new")
        try:
            beside.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines[1:]]))
            beside.replace(path)  # without a line that a kill has cut short
        except OSError as error:
            raise workspace.cannot_write(path, error) from error

    def add(self, answers: Mapping[int, Answer], seconds: float) -> None:
        """Record a batch: answers by the number of their prompt."""
        rows = [[number, list(one.ids), one.why] for number, one in answers.items()]
        line = {"answers": rows, "seconds": seconds}
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        except OSError as error:
            raise workspace.cannot_write(self.path, error) from error
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        for number, ids, why in line["answers"]:
            self.answers[number] = Answer(tuple(ids), why)
        self.seconds += line["seconds"]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a tape, up to the first that is damaged."""
    found: list[dict[str, Any]] = []
    if not outside.is_file(path):
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and (_is_batch(line) if found else True)):
            break
        found.append(line)
    return found


def _is_batch(line: dict[str, Any]) -> bool:
    try:
        return isinstance(line["seconds"], float | int) and all(
            type(number) is int and all(type(i) is int for i in ids) and isinstance(why, str)
            for number, ids, why in line["answers"]
        )
    except (KeyError, TypeError, ValueError):
        return False
