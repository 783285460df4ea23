"""Reads the rows of a local file: .txt, .jsonl, .csv or .parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core import outside
from core.errors import DataError

FILE_KINDS = (".txt", ".jsonl", ".csv", ".parquet")

Row = dict[str, Any]

_PARQUET_BYTES = 256 * outside.MIB
_PARQUET_GROWTH = 100
"""A Parquet file may hold this many times its own bytes, and `_PARQUET_BYTES` more: repeated rows
take next to nothing in the file."""
_PARQUET_BATCH = 256
_ROW_BYTES = 400
"""Of a row in memory, besides its values."""


def source_file(source: str) -> Path:
    """Return the file that a SOURCE names; raises `DataError` if there is none that can be read."""
    path = outside.path_of(source)
    if not outside.is_file(path):
        raise DataError(
            f"No text source '{outside.brief(source, 200)}': there is no such file.",
            "Give demo, a .txt, .jsonl, .csv or .parquet file, or hub:NAME.",
        )
    if path.suffix.lower() not in FILE_KINDS:
        raise DataError(
            f"{path.name}: files ending in '{path.suffix}' are not supported.",
            f"Give one of {', '.join(FILE_KINDS)}.",
        )
    return path


def read_text(path: Path) -> str:
    """Return a file's text; raises `DataError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror}.", "Check that the file is readable."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8."
        ) from None


def file_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a .txt, .jsonl, .csv or .parquet file."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    text = read_text(path)
    if suffix == ".txt":
        yield from ({"text": line.strip()} for line in text.splitlines() if line.strip())
    elif suffix == ".csv":
        yield from _csv_rows(path, text)
    else:
        yield from _json_rows(path, text)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    for number, row in enumerate(_csv_lines(path, text), 1):
        values: Row = {column: cell for column, cell in row.items() if column is not None}
        if len(values) < len(row):
            raise DataError(
                f"{path.name}: row {number} has more cells than there are columns.",
                "Put text with commas in quotes.",
            )
        if "input_ids" in values:
            cell = str(values["input_ids"])
            try:
                values["input_ids"] = [int(i) for i in cell.strip("[] ").split(",")]
            except ValueError:
                raise DataError(
                    f"{path.name}: input_ids '{outside.brief(cell)}' are not whole numbers.",
                    "Write them as 1,2,3.",
                ) from None
        yield values


def _csv_lines(path: Path, text: str) -> Iterator[dict[str | None, Any]]:
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise DataError(
            f"Cannot read {path.name} as CSV: {error}.", "Re-export the file."
        ) from error


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = outside.loads(line)
        except outside.Malformed:
            value = None
        if not isinstance(value, dict):
            raise DataError(
                f"{path.name}: line {number} is not a JSON object.", "Write one object per line."
            )
        yield value


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            "Reading .parquet needs pyarrow, which is not installed.", "Give a .jsonl file."
        ) from None
    most = _PARQUET_BYTES + _PARQUET_GROWTH * path.stat().st_size
    rows: list[Row] = []
    taken = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                taken += batch.nbytes + _ROW_BYTES * batch.num_rows
                if taken > most:
                    break
                rows += batch.to_pylist()
    except Exception as error:
        reason = outside.brief(str(error), 200)
        raise DataError(
            f"Cannot read {path.name} as Parquet: {reason}.", "Re-export the file."
        ) from error
    if taken > most:
        raise DataError(
            f"{path.name} has {path.stat().st_size:,} bytes but holds more than {most:,}.",
            "Split it into smaller files.",
        )
    return rows
