"""The files of a generate run: summary.json, and generated.jsonl with a row for each prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data import generated
from core.data.columns import Row
from core.data.diversity import Diversity
from core.data.readers import file_rows
from core.errors import DataError
from core.runs.results import JsonResult, from_dict

if TYPE_CHECKING:
    from core.runs.run import Run

OWN, REFERENCE = "own", "reference"


@dataclass(frozen=True, kw_only=True)
class Summary(JsonResult):
    """summary.json of a generate run."""

    checkpoint: str = ""
    checkpoint_key: str = ""
    prompts: str = ""
    content: str = ""
    """Identifies the prompts' source."""
    kind: str = ""
    """instruction, messages or text."""
    template: str = ""
    check: str = ""
    temperature: float = 0.0
    max_tokens: int = 0
    batch: int = 0
    seed: int = 0
    rows: int = 0
    """Rows of generated.jsonl."""
    own: int = 0
    """Rows with the model's own answer."""
    references: int = 0
    """Rows with the reference, because the model's own answer failed the check."""
    dropped: int = 0
    """Prompts whose answer failed and that have no reference."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why answers failed, as in `core.generate.checks.REASONS` -> how many."""
    skipped: int = 0
    too_long: int = 0
    too_short: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    own_text: Diversity = Diversity()
    """Of all the model's own answers."""
    reference_text: Diversity = Diversity()
    parameters: int | None = None
    seconds: float | None = None
    """Of writing alone."""
    tokens_per_s: float | None = None
    """New tokens of all rows together."""
    flops_per_s: float | None = None
    device: str = ""
    dtype: str = ""
    peak_memory_mib: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row of generated.jsonl as pages show it."""

    prompt: str = ""
    own: str = ""
    reference: str = ""
    kept: str = ""
    """own or reference."""
    why: str = ""
    """Why the own answer was not kept, as in `core.generate.checks.REASONS`."""


def write_rows(run: Run, rows: Iterable[tuple[Row, Pair, str]]) -> None:
    """Write generated.jsonl: rows to train on, each with its `Pair` and template."""
    lines = [
        json.dumps({**row, **vars(pair), "template": template}, ensure_ascii=False)
        for row, pair, template in rows
    ]
    run.write_text(generated.FILE, "".join(line + "\n" for line in lines))


def read_pairs(folder: Path, first: int = 0, most: int | None = None) -> Sequence[Pair]:
    """Return rows of a run as pairs; empty if there are none, or they cannot be read."""
    path = folder / generated.FILE
    if not path.is_file():
        return ()
    end = None if most is None else first + most
    try:
        lines: list[dict[str, Any]] = list(itertools.islice(file_rows(path), first, end))
    except DataError:
        return ()
    return tuple(pair for line in lines if (pair := from_dict(Pair, line)))
