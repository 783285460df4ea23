"""Reads the rows of a local file: .txt, .jsonl, .csv or .parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import DataError

FILE_KINDS = (".txt", ".jsonl", ".csv", ".parquet")

Row = dict[str, Any]


def source_file(source: str) -> Path:
    """Return the file that a SOURCE names; raises `DataError` if there is none that can be read."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(
            f"No text source '{source}': there is no such file.",
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
    for row in csv.DictReader(io.StringIO(text, newline="")):
        if "input_ids" in row:
            try:
                row["input_ids"] = [int(i) for i in str(row["input_ids"]).strip("[] ").split(",")]
            except ValueError:
                raise DataError(
                    f"{path.name}: input_ids '{row['input_ids'][:40]}' are not whole numbers.",
                    "Write them as 1,2,3.",
                ) from None
        yield dict(row)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
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
    try:
        return parquet.read_table(path).to_pylist()
    except Exception as error:
        raise DataError(
            f"Cannot read {path.name} as Parquet: {error}.", "Re-export the file."
        ) from error
