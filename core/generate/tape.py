"""Answers that a run has written so far, so that it continues after a kill. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import OptionError
from core.runs import tape

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
        lines = tape.read(path, lambda line: isinstance(line, dict), _is_batch) if resume else []
        if lines and lines[0] != head:
            others = [name for name in head if lines[0].get(name) != head[name]]
            raise OptionError(
                f"--resume: the answers in {path.parent.parent} were written with another "
                f"{' and '.join(others) or 'version'}.",
                "Resume with the same options, or leave --resume out to begin again.",
            )
        for line in lines[1:]:
            self._take(line)
        tape.begin(path, [head, *lines[1:]])  # without a line that a kill has cut short

    def add(self, answers: Mapping[int, Answer], seconds: float) -> None:
        """Record a batch: answers by the number of their prompt."""
        rows = [[number, list(one.ids), one.why] for number, one in answers.items()]
        line = {"answers": rows, "seconds": seconds}
        tape.append(self.path, line)
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        for number, ids, why in line["answers"]:
            self.answers[number] = Answer(tuple(ids), why)
        self.seconds += line["seconds"]


def _is_batch(line: Any) -> bool:
    try:
        return isinstance(line["seconds"], float | int) and all(
            type(number) is int and all(type(i) is int for i in ids) and isinstance(why, str)
            for number, ids, why in line["answers"]
        )
    except (KeyError, TypeError, ValueError):
        return False
