"""Text of a data file, gzipped or not, piece by piece and within bounds."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from core import outside
from core.errors import DataError

PIECE = 1 << 18
"""Bytes read at a time."""
INFLATED_BYTES = 256 * outside.MIB
INFLATED_GROWTH = 100
"""A compressed file may hold this many times its own bytes, and `INFLATED_BYTES` more."""


def chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, decompressed if its name ends in .gz.

    Raises `DataError` if it cannot be read, is damaged, or holds far more than its size suggests.
    """
    packed = path.suffix.lower() == ".gz"
    try:
        most = INFLATED_BYTES + INFLATED_GROWTH * path.stat().st_size
        taken = 0
        with gzip.open(path, "rb") if packed else open(path, "rb") as handle:
            while piece := handle.read(PIECE):
                taken += len(piece)
                if packed and taken > most:
                    raise DataError(
                        f"{path.name} has {path.stat().st_size:,} bytes but holds more than "
                        f"{most:,}.",
                        "Split it into smaller files.",
                    )
                yield piece
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"Cannot read {path.name} as gzip: {outside.brief(str(error), 200)}.",
            "Download or compress it again.",
        ) from error
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror}.", "Check that the file is readable."
        ) from error


def pieces(path: Path) -> Iterator[str]:
    r"""Yield a file's text, without a byte order mark and with every line end as ``\n``.

    Raises `DataError` as `chunks` does, and if the file is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    before, line, first = 0, 1, True
    for chunk in _with_end(path):
        kept = len(utf8.getstate()[0])
        try:
            text = decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise DataError(
                f"{path.name} is not UTF-8 text (byte {before - kept + error.start}, line {line}).",
                _encoding_hint(path),
            ) from None
        before += len(chunk or b"")
        line += text.count("\n")
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text


def _with_end(path: Path) -> Iterator[bytes | None]:
    yield from chunks(path)
    yield None


def _encoding_hint(path: Path) -> str:
    head = next(chunks(path), b"")[:4]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"It is UTF-16: iconv -f UTF-16 -t UTF-8 {path.name} > utf8{path.suffix}"
    return "Save it as UTF-8; for Western European text, iconv -f WINDOWS-1252 -t UTF-8 does that."


def lines(path: Path) -> Iterator[str]:
    """Yield a file's lines without their ends; raises as `pieces`."""
    pending: list[str] = []
    for piece in pieces(path):
        first, *others = piece.split("\n")
        pending.append(first)
        if others:
            yield "".join(pending)
            yield from others[:-1]
            pending = [others[-1]]
    if last := "".join(pending):
        yield last


def text(path: Path) -> str:
    """Return a file's whole text; raises as `pieces`."""
    return "".join(pieces(path))
