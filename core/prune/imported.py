"""Published or other people's block scores, uploaded as CSV and kept beside a study.

``imported-scores/STUDY/NAME.csv`` in the workspace has the columns ``block`` and a criterion. What
was uploaded may have any layout that `core.prune.scores` reads; a file that does not name its
criterion, such as a removal order, gets the one that the user says it is.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from core import outside
from core.criteria import COLUMNS
from core.errors import DataError
from core.prune import scores
from core.runs import workspace
from core.runs.workspace import Workspace

FOLDER = "imported-scores"
MOST_BYTES = 4 << 20
"""Of an upload: a table with a row for each block."""
CRITERIA = tuple(dict.fromkeys(COLUMNS.values()))
"""What an uploaded column can be."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def listed(where: Workspace, study: str) -> list[Path]:
    """Return the imported files of a study, newest first."""
    found = [p for p in (where.root / FOLDER / study).glob("*.csv") if outside.is_file(p)]
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)


def guessed(name: str) -> str:
    """Return the criterion that a file's name speaks of; the first one if it names none."""
    plain = name.lower().replace("_", "-")
    return next((c for c in CRITERIA if c in plain), CRITERIA[0])


def keep(
    given: str, data: bytes, criterion: str, blocks: int, where: Workspace, study: str
) -> Path:
    """Store uploaded scores for a checkpoint with ``blocks`` blocks; return the file.

    ``criterion`` is what scores without a name are. Raises `DataError` for a file that does not
    hold scores of that many blocks, and `OutputError` if the workspace cannot be written.
    """
    name = re.split(r"[/\\]", given)[-1]
    if len(data) > MOST_BYTES:
        raise DataError(
            f"{name} has {len(data):,} bytes; scores of blocks may have up to {MOST_BYTES:,}.",
            "Choose the file with one row for each block.",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.csv"
        path.write_bytes(data)
        try:
            found = scores.load(path)
        except DataError as error:
            raise DataError(error.message.replace(str(path), name), error.hint) from None
    columns = {
        criterion if column == scores.GENERIC else column: values
        for column, values in found.columns.items()
    }
    if not columns:
        raise DataError(f"{name} has no scores of whole blocks.", "Upload one row for each block.")
    if found.blocks != blocks:
        raise DataError(
            f"{name} has scores of {found.blocks} blocks, but the checkpoint has {blocks}.",
            "Choose the checkpoint that was scored, or another file.",
        )
    kept = where.root / FOLDER / study / f"{_UNSAFE.sub('-', Path(name).stem).strip('-.')[:60]}.csv"
    rows = [(block, *(_cell(v[block]) for v in columns.values())) for block in range(blocks)]
    workspace.write_csv(kept, ("block", *(c.replace("-", "_") for c in columns)), rows)
    return kept


def _cell(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def columns_of(path: Path) -> Mapping[str, tuple[float | None, ...]]:
    """Return criterion -> score of every block of an imported file; raises `DataError`."""
    return scores.load(path).columns
