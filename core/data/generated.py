"""Folders of text that a model wrote (``python -m core generate``), as a source of rows.

A row has the columns of its kind (instruction, messages or text), and beside them the model's own
answer, the reference, which of the two was kept, and the prompt's template.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from core import outside
from core.data.readers import file_rows
from core.errors import DataError

FILE = "generated.jsonl"


def is_generated(path: Path) -> bool:
    """Whether a folder holds text that a model wrote."""
    return outside.is_file(path / FILE)


def template_of(source: str) -> str:
    """Return the template that the prompts of a SOURCE were written with; empty if unknown."""
    path = outside.path_of(source)
    if not is_generated(path):
        return ""
    try:
        first = next(itertools.islice(file_rows(path / FILE), 1), {})
    except DataError:
        return ""
    found = first.get("template")
    return found if isinstance(found, str) else ""
