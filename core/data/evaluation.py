"""Text to evaluate on: one token stream, cut into windows according to a protocol."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from core import outside
from core.data import files
from core.data.calibration import BETWEEN, check_join
from core.data.facts import TextFacts
from core.data.fit import unfit_share
from core.data.readers import kind_of_file, source_file
from core.data.sources import kind_of, open_rows, preset, split_field, texts
from core.errors import DataError

BOS_PROTOCOLS = ("once", "window", "extra")


def evaluation_stream(source: str) -> str:
    """Return the text to evaluate on: a .txt as it is, or documents joined by blank lines."""
    return BETWEEN.join(evaluation_documents(source)[0])


def evaluation_documents(source: str) -> tuple[list[str], int]:
    """Return the documents to evaluate on, and the number of rows skipped as they have no text.

    A .txt is one document, as it is. The published protocol keeps WikiText-2's blank rows, so those
    of a ``text`` column on the Hub are kept.
    """
    name, field = split_field(source)
    name = preset(name)
    if not name.startswith("hub:") and not field and kind_of_file(outside.path_of(name)) == ".txt":
        text = files.text(source_file(name))
        if not text.strip():
            raise DataError(f"There is no text in {source}.", "Give a file with text in it.")
        return [text], 0
    blanks = name.startswith("hub:")
    rows = open_rows(source, "heldout", want=("text",), stream=False, blanks=blanks)
    found = list(texts(rows))
    if not any(text.strip() for text in found):
        raise DataError(f"There is no text in {source}.", "Give a source with text in it.")
    return found, rows.skipped


def evaluation_tokens(
    source: str, tokenizer: Any, join: str = "auto"
) -> tuple[list[list[int]], TextFacts]:
    """Return the token streams of a SOURCE, without special tokens, and how they were obtained.

    One stream for all documents, as in the published protocol; with ``join`` off one for each.
    Rows of ``input_ids`` are taken as they are. Raises `DataError` as `open_rows` does.
    """
    check_join(join)
    if kind_of(source) == "input_ids":
        rows = open_rows(source, "heldout", stream=False)
        streams = [row["input_ids"] for row in rows]
        if join != "off":
            streams = [list(itertools.chain.from_iterable(streams))]
        return streams, TextFacts(joined=join != "off", skipped=rows.skipped)
    documents, skipped = evaluation_documents(source)
    several = len(documents) > 1
    if join != "off":
        documents = [BETWEEN.join(documents)]
    streams = [
        list(tokenizer.encode(text, add_special_tokens=False, verbose=False)) for text in documents
    ]
    unfit = unfit_share(streams, tokenizer)
    return streams, TextFacts(joined=several and join != "off", skipped=skipped, unfit=unfit)


def token_stream(source: str, tokenizer: Any) -> list[int]:
    """Return all tokens of a SOURCE as one stream, without special tokens."""
    return evaluation_tokens(source, tokenizer)[0][0]


def windows_of(
    streams: Sequence[Sequence[int]], window: int, bos: str, bos_id: int | None
) -> list[list[int]]:
    """Return the windows of every stream, as `evaluation_windows` cuts them.

    Of several streams those that are too short are left out. Raises `DataError` if all are.
    """
    if len(streams) == 1:
        return evaluation_windows(streams[0], window, bos, bos_id)
    found: list[list[int]] = []
    for stream in streams:
        if len(stream) >= window:
            found += evaluation_windows(stream, window, bos, bos_id)
    if not found:
        longest = max(map(len, streams), default=0)
        raise DataError(
            f"None of the {len(streams):,} rows has a window of {window} tokens; the longest has "
            f"{longest}.",
            "Use a smaller --window, or join the rows: --join auto.",
        )
    return found


def evaluation_windows(
    ids: Sequence[int], window: int, bos: str, bos_id: int | None
) -> list[list[int]]:
    """Cut a token stream into non-overlapping windows of ``window`` tokens; drop the remainder.

    ``bos`` names the protocol: ``once`` puts one BOS before the stream, ``window`` one at the
    start of every window (which then holds ``window - 1`` tokens of text), and ``extra`` one in
    front of every window of ``window`` tokens of text (which then has ``window + 1``, as in the
    public code of Shortened LLaMA). A tokenizer without a
    BOS token gets none.
    """
    if bos not in BOS_PROTOCOLS:
        raise DataError(
            f"There is no BOS protocol '{bos}'.", f"Choose from: {', '.join(BOS_PROTOCOLS)}."
        )
    if window < 2:
        raise DataError(f"A window of {window} tokens has nothing to predict.", "Give at least 2.")
    head = [] if bos_id is None else [bos_id]
    stream = head + list(ids) if bos == "once" else list(ids)
    front = head if bos in ("window", "extra") else []
    step = window if bos == "extra" else window - len(front)
    starts = range(0, len(stream) - step + 1, step)
    windows = [front + stream[start : start + step] for start in starts]
    if not windows:
        raise DataError(
            f"The text has {len(stream)} tokens, {step - len(stream)} short of one window of "
            f"{window}.",
            "Give more text or a smaller --window.",
        )
    return windows
