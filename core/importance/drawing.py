"""Calibration rows as a command's options ask for them. No torch."""

from __future__ import annotations

from typing import Any, Protocol

from core.checkpoint import chat
from core.data.calibration import Sample, sample
from core.runs.progress import Progress


class Asked(Protocol):
    """The options that every command with calibration text has."""

    @property
    def seed(self) -> int:
        """Draws the rows and the crops."""

    @property
    def join(self) -> str:
        """Whether short rows are joined: auto, on or off."""

    @property
    def chat_template(self) -> str:
        """Whether messages are written with the tokenizer's template: auto, on or off."""


def drawn_rows(
    asked: Asked,
    source: str,
    tokenizer: Any,
    samples: int,
    length: int,
    progress: Progress,
    *,
    or_fewer: bool = False,
) -> Sample:
    """Draw ``samples`` rows of ``length`` tokens from ``source``, and log what is said of them.

    With ``or_fewer``, a text with fewer rows is enough; else that raises `DataError`.
    """
    found = sample(
        source,
        tokenizer,
        samples,
        length,
        asked.seed,
        or_fewer=or_fewer,
        join=asked.join,
        chat=chat.for_text(asked.chat_template, tokenizer),
    )
    for note in found.facts.notes:
        progress.log(note)
    return found
