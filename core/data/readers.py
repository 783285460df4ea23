"""Reads the rows of a local file, one by one: text, JSON, CSV or Parquet, each also gzipped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core import outside
from core.data import files, tables
from core.errors import DataError

FILE_KINDS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")

RawRow = dict[str, Any]
"""Columns of one row, as the file has them."""


def kind_of_file(path: Path) -> str:
    """Return the suffix that says how a file is read: that before .gz, if there is one."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def source_file(source: str) -> Path:
    """Return the file that a SOURCE names; raises `DataError` if there is none that can be read."""
    path = outside.path_of(source)
    if not outside.is_file(path):
        raise DataError(
            f"No text source '{outside.brief(source, 200)}': there is no such file.",
            "Give english, demo, c4, wikitext2, hub:NAME, a folder saved by datasets, or a file "
            f"({', '.join(FILE_KINDS)}, also with .gz).",
        )
    if kind_of_file(path) not in FILE_KINDS:
        raise DataError(
            f"{path.name}: files ending in '{path.suffix}' are not supported.",
            f"Give one of {', '.join(FILE_KINDS)}, also with .gz.",
        )
    return path


def file_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file; only what has been asked for is read.

    Raises `DataError` for a file that is damaged, ragged or not UTF-8, with the line number.
    """
    kind = kind_of_file(path)
    if kind == ".parquet":
        return tables.parquet_rows(path)
    if kind == ".txt":
        return _text_rows(path)
    return tables.csv_rows(path) if kind in (".csv", ".tsv") else _json_rows(path)


def _text_rows(path: Path) -> Iterator[RawRow]:
    for line in files.lines(path):
        yield from ({"text": part.strip()} for part in line.splitlines() if part.strip())


def _json_rows(path: Path) -> Iterator[RawRow]:
    """Yield one object per line, the items of an array, or those of the only list in an object."""
    start = "".join(itertools.islice(files.pieces(path), 1)).lstrip()[:1]
    if start == "[":
        yield from _array_rows(path)
        return
    first = True
    for number, line in enumerate(files.lines(path), 1):
        if not line.strip():
            continue
        try:
            value = outside.loads(line)
        except outside.Malformed:
            value = None
        if first and start == "{" and not isinstance(value, dict):
            found = _listed(path)
            if found is not None:
                yield from found
                return
        first = False
        if not isinstance(value, dict):
            raise DataError(
                f"{path.name}: line {number} is not a JSON object.",
                "Write one object per line, or one array of objects.",
            )
        yield value


def _listed(path: Path) -> list[RawRow] | None:
    """Return the rows in an object such as ``{"data": [...]}``; None if it has not one list."""
    if path.stat().st_size > outside.LARGEST_JSON:
        return None
    try:
        value = outside.loads(files.text(path))
    except outside.Malformed:
        return None
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    if len(lists) != 1 or not all(isinstance(item, dict) for item in lists[0]):
        return None
    return list(lists[0])


def _array_rows(path: Path) -> Iterator[RawRow]:
    """Yield the objects of a JSON array without holding more than a few of them."""
    decode = json.JSONDecoder().raw_decode
    source = files.pieces(path)
    text, at, number, ended = "", 0, 0, False

    def more() -> bool:
        """Add at least as much text as is left, so that a long item is not parsed too often."""
        nonlocal text, at, ended
        found, wanted = [text[at:]], max(1, len(text) - at)
        while wanted > 0 and not ended:
            piece = next(source, None)
            ended = piece is None
            found.append(piece or "")
            wanted -= len(found[-1])
        grown = sum(map(len, found)) > len(found[0])
        text, at = "".join(found), 0
        return grown

    def character() -> str:
        """Return the next character that is not white space, or nothing at the end."""
        nonlocal at
        while True:
            rest = len(text)
            while at < rest and text[at] in " \n\t\r":
                at += 1
            if at < rest or not more():
                return text[at : at + 1]

    def wrong(reason: str) -> DataError:
        return DataError(
            f"{path.name}: item {number} of the array {reason}.",
            "Write one array of objects, or one object per line.",
        )

    character()
    at += 1  # the opening bracket
    while (mark := character()) != "]":
        if number:
            if mark != ",":
                raise wrong("is not followed by a comma" if mark else "is the last: it is cut off")
            at += 1
        number += 1
        if character() != "{":
            raise wrong("is not a JSON object")
        while True:
            try:
                end = decode(text, at)[1]
                value = outside.loads(text[at:end])
                break
            except (ValueError, RecursionError) as error:
                malformed = isinstance(error, (outside.Malformed, RecursionError))
                if malformed or len(text) - at > outside.LARGEST_JSON or not more():
                    raise wrong("is not valid JSON") from None
        at = end
        yield value
