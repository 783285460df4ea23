"""Text to calibrate, evaluate and retrain on: one SOURCE grammar for all three.

demo                                bundled: stories and instructions, generated on the fly
FILE.txt                            the whole text for evaluation, else its non-empty lines
FILE.jsonl | .csv | .parquet        column ``text``, or ``instruction,input,output``,
                                    or exact ``input_ids`` rows
hub:NAME[/CONFIG][:SPLIT][:FIELD]   a dataset on the Hub, through ``datasets``
wikitext2 | ptb                     presets; ptb is no longer on the Hub: give a file
"""

from __future__ import annotations

import functools
import hashlib
from typing import Literal

from core.data.hub import hub_rows
from core.data.readers import Row, file_rows, source_file
from core.errors import DataError

PRESETS = {"wikitext2": "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text"}
DEMO_SEED = 20240205
DEMO_ROWS = {"calibration": 400, "heldout": 120, "train": 4000}
DEMO_INSTRUCTIONS = {"calibration": 200, "heldout": 200, "train": 2000}

Use = Literal["train", "calibration", "heldout"]


def rows_of(source: str, use: Use = "calibration") -> list[Row]:
    """Return the rows of a SOURCE, each with ``text``, ``input_ids`` or instruction columns.

    Args:
        source: see the module docstring.
        use: ``calibration`` or ``heldout`` (disjoint in the demo world) or ``train``.

    Raises:
        DataError: there is no such source, it is empty, or it has wrong columns or encoding.
    """
    if source == "demo":
        return [{"text": story} for story in _demo_stories(use)]
    source = preset(source)
    is_hub = source.startswith("hub:")
    rows = hub_rows(source) if is_hub else list(file_rows(source_file(source)))
    if not rows:
        raise DataError(f"There is no text in {source}.", "Give a source with text in it.")
    return rows


@functools.cache
def _demo_stories(use: Use) -> tuple[str, ...]:
    """Return the demo's stories; generating them takes seconds, so the result is cached."""
    from core.demo import world

    return tuple(world.stories(DEMO_ROWS[use], DEMO_SEED, use))


def text_rows(source: str, use: Use = "calibration") -> list[str]:
    """Return the texts of a SOURCE: its ``text`` column, or a .txt file's non-empty lines."""
    rows = rows_of(source, use)
    if "text" not in rows[0]:
        raise DataError(
            f"{source} has no column 'text' (its columns: {', '.join(rows[0])}).",
            "Name another field, or give a .txt file.",
        )
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{source}: row {number} has no text.", "Remove or fix that row.")
        if row["text"].strip():
            texts.append(row["text"])
    if not texts:
        raise DataError(f"Every text in {source} is empty.", "Give a source with text in it.")
    return texts


def instruction_rows(source: str, use: Use = "train") -> list[dict[str, str]]:
    """Return rows of ``instruction``, ``input`` and ``output``; an empty output is an error."""
    if source == "demo":
        from core.demo import world

        return list(world.instructions(DEMO_INSTRUCTIONS[use], DEMO_SEED, use))
    rows = rows_of(source, use)
    missing = [c for c in ("instruction", "output") if c not in rows[0]]
    if missing:
        raise DataError(
            f"{source}: missing columns: {', '.join(missing)} (its columns: {', '.join(rows[0])}).",
            "Instruction data needs the columns instruction, input (may be empty) and output.",
        )
    clean = []
    for number, row in enumerate(rows, 1):
        values = {c: str(row.get(c) or "") for c in ("instruction", "input", "output")}
        if not values["output"].strip():
            raise DataError(
                f"{source}: row {number} has an empty response.", "Fill or remove that row."
            )
        clean.append(values)
    return clean


def kind_of(source: str) -> str:
    """Return the kind of rows: ``input_ids``, ``instruction`` or ``text``."""
    if source == "demo":
        return "text"
    first = rows_of(source)[0]
    return next((k for k in ("input_ids", "instruction") if k in first), "text")


def describe(source: str) -> dict[str, str]:
    """Return what results record about their data: its source and a hash of the content."""
    if source == "demo":
        return {"source": "demo", "content": f"generator seed {DEMO_SEED}"}
    source = preset(source)
    if source.startswith("hub:"):
        return {"source": source, "content": "as downloaded"}
    path = source_file(source)
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"source": path.name, "content": f"sha256:{digest[:16]}"}


def preset(source: str) -> str:
    """Return the SOURCE that a preset stands for; any other source is returned unchanged."""
    if source == "ptb":
        raise DataError(
            "ptb is a script-based dataset; the Hub no longer supports those.",
            "Give the Penn Treebank validation text as a .txt file.",
        )
    return PRESETS.get(source, source)
