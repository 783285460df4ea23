"""Text to calibrate on, to judge by and to retrain on: one SOURCE grammar for all three.

    demo                                the bundled world: stories and instructions, made on the fly
    FILE.txt                            evaluation takes it whole; calibration its non-empty lines
    FILE.jsonl | .csv | .parquet        column ``text``, or ``instruction,input,output``,
                                        or exact ``input_ids`` rows
    hub:NAME[/CONFIG][:SPLIT][:FIELD]   a data set of the Hub, through ``datasets``
    wikitext2 | ptb                     presets; ptb is no longer on the Hub: give a file

Sampling follows Shortened LLaMA (arXiv 2402.02834): rows of at least the wanted number of tokens,
in an order drawn by the seed, a random crop of each.
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
        DataError: no such source, wrong columns, wrong encoding, or nothing in it.
    """
    if source == "demo":
        return [{"text": story} for story in _demo_stories(use)]
    source = preset(source)
    is_hub = source.startswith("hub:")
    rows = hub_rows(source) if is_hub else list(file_rows(source_file(source)))
    if not rows:
        raise DataError(f"There is nothing in {source}.", "Give a source with text in it.")
    return rows


@functools.cache
def _demo_stories(use: Use) -> tuple[str, ...]:
    """Return the demo's stories; making them takes seconds, so they are made once."""
    from core.demo import world

    return tuple(world.stories(DEMO_ROWS[use], DEMO_SEED, use))


def text_rows(source: str, use: Use = "calibration") -> list[str]:
    """Return the texts of a SOURCE: its ``text`` column, or a .txt file's non-empty lines."""
    rows = rows_of(source, use)
    if "text" not in rows[0]:
        raise DataError(
            f"{source} has no column 'text' (it has {', '.join(rows[0])}).",
            "Name another field, or give a .txt file.",
        )
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{source}: row {number} has no text.", "Remove or mend that row.")
        if row["text"].strip():
            texts.append(row["text"])
    if not texts:
        raise DataError(f"Every text in {source} is empty.", "Give a source with text in it.")
    return texts


def instruction_rows(source: str, use: Use = "train") -> list[dict[str, str]]:
    """Return rows of ``instruction``, ``input`` and ``output``; empty responses are refused."""
    if source == "demo":
        from core.demo import world

        return list(world.instructions(DEMO_INSTRUCTIONS[use], DEMO_SEED, use))
    rows = rows_of(source, use)
    missing = [c for c in ("instruction", "output") if c not in rows[0]]
    if missing:
        raise DataError(
            f"{source} lacks the column(s) {', '.join(missing)} (it has {', '.join(rows[0])}).",
            "Instruction data has the columns instruction, input (may be empty) and output.",
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
    """Return what the rows are: ``input_ids``, ``instruction`` or ``text``."""
    if source == "demo":
        return "text"
    first = rows_of(source)[0]
    return next((k for k in ("input_ids", "instruction") if k in first), "text")


def describe(source: str) -> dict[str, str]:
    """Return what results say of their data: the source's name and a hash of its content."""
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
    """Return the SOURCE that a preset's name stands for, any other unchanged."""
    if source == "ptb":
        raise DataError(
            "ptb is a script data set, which the Hub no longer serves.",
            "Give the Penn Treebank validation text as a .txt file.",
        )
    return PRESETS.get(source, source)
