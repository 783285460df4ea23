"""Rows of CSV and Parquet files."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core import outside
from core.data import files
from core.errors import DataError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_HEAD = 64
"""Lines that the delimiter is detected from."""
_BATCH = 256
_ROW_BYTES = 400
"""Of a Parquet row in memory, besides its values."""


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV or TSV file; the first line names the columns.

    Raises `DataError`, with the line number, for a row that is not as wide as the header.
    """
    csv.field_size_limit(1 << 30)
    lines = (line + "\n" for line in files.lines(path))
    head = list(itertools.islice(lines, _HEAD))
    delimiter = delimiter_of(head)
    reader = csv.reader(itertools.chain(head, lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    before = 0
    while (cells := _next(reader, path, before)) is not None:
        number, before = before + 1, reader.line_num
        if not any(cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{path.name}: line {number} has {_count(cells, 'cell')}, but the header has "
                f"{_count(header, 'column')}.",
                f"Put text that contains {DELIMITERS[delimiter]} or line breaks in quotes.",
            )
        yield dict(zip(header, cells, strict=True))


def _next(reader: Any, path: Path, before: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(
            f"Cannot read {path.name} as CSV: line {before + 1}: {error}.",
            "Check the quotes from that line on, or export the file again.",
        ) from error


def _count(items: Sequence[str], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def delimiter_of(head: Sequence[str]) -> str:
    """Return the delimiter of a table's first lines: one that splits the header.

    If several do, the one for which most of the following rows are as wide as the header.
    """
    first = next((at for at, line in enumerate(head) if line.strip()), None)
    if first is None:
        return ","

    def fits(delimiter: str) -> tuple[int, int]:
        widths = [len(row) for row in _lenient(head[first:], delimiter) if row]
        return sum(width == widths[0] for width in widths[1:]), widths[0]

    found = [d for d in DELIMITERS if len(next(_lenient(head[first:], d), [])) > 1]
    return max(found, key=fits) if found else ","


def _lenient(lines: Sequence[str], delimiter: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, delimiter=delimiter)
    except csv.Error:
        return


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, batch by batch."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            "Reading .parquet needs pyarrow, which is not installed.", "Give a .jsonl file."
        ) from None
    size = path.stat().st_size
    most = files.INFLATED_BYTES + files.INFLATED_GROWTH * size
    packed = path.suffix.lower() == ".gz"
    whole = pyarrow.BufferReader(b"".join(files.chunks(path))) if packed else path
    taken = 0
    try:
        with parquet.ParquetFile(whole) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                taken += batch.nbytes + _ROW_BYTES * batch.num_rows
                if taken > most:
                    break
                yield from batch.to_pylist()
    except Exception as error:
        reason = outside.brief(str(error), 200)
        raise DataError(
            f"Cannot read {path.name} as Parquet: {reason}.", "Re-export the file."
        ) from error
    if taken > most:
        raise DataError(
            f"{path.name} has {size:,} bytes but holds more than {most:,}.",
            "Split it into smaller files.",
        )
