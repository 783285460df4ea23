"""The bundled SOURCE ``english``: general English to calibrate and to evaluate on.

`calibration.txt` and `heldout.txt` hold original documents in many registers (news, encyclopedic
and technical prose, fiction, letters, interviews, forum threads, how-to, minutes, reviews); a line
with a percent sign separates two documents. They were written for this project, share no document,
topic or setting, and are dedicated to the public domain (CC0 1.0).
"""

from __future__ import annotations

import functools
from pathlib import Path

FOLDER = Path(__file__).parent
BETWEEN = "\n%\n"
PASSAGE = 900
"""Least characters of a passage: about 200 tokens, so that a row of 128 can be cropped from it."""


@functools.cache
def documents(part: str) -> tuple[str, ...]:
    """Return the documents of ``calibration`` or ``heldout``."""
    text = (FOLDER / f"{part}.txt").read_text(encoding="utf-8")
    return tuple(one.strip() for one in text.split(BETWEEN))


def passages(part: str) -> list[str]:
    """Return the documents in passages of whole paragraphs, each of at least `PASSAGE` characters.

    What is left at the end of a document belongs to its last passage.
    """
    found: list[str] = []
    for document in documents(part):
        own: list[str] = []
        for paragraph in document.split("\n\n"):
            if own and len(own[-1]) < PASSAGE:
                own[-1] += "\n\n" + paragraph
            else:
                own.append(paragraph)
        if len(own) > 1 and len(own[-1]) < PASSAGE:
            own[-2:] = ["\n\n".join(own[-2:])]
        found += own
    return found
