"""Text to evaluate on: one token stream, cut into windows according to a protocol."""

from __future__ import annotations

from collections.abc import Sequence

from core.data.readers import read_text, source_file
from core.data.sources import preset, rows_of, text_rows
from core.errors import DataError

BOS_PROTOCOLS = ("once", "window", "extra")


def evaluation_stream(source: str) -> str:
    """Return the text to evaluate on: a .txt as it is, or documents joined by blank lines."""
    if preset(source).endswith(".txt") and not source.startswith("hub:"):
        text = read_text(source_file(source))
        if not text.strip():
            raise DataError(f"There is no text in {source}.", "Give a file with text in it.")
        return text
    if preset(source).startswith("hub:"):  # the published protocol keeps WikiText-2's blank rows
        texts = [str(row["text"]) for row in rows_of(source, "heldout") if "text" in row]
        if any(text.strip() for text in texts):
            return "\n\n".join(texts)
    return "\n\n".join(text_rows(source, "heldout"))


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
