"""Whether text and tokenizer fit: the share of tokens that are unknown or single bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

MOST = 20_000
"""Tokens that are looked at."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_USUAL = {"<0x09>", "<0x0A>", "<0x0D>"}
"""Tab and line ends: bytes in many vocabularies, however well the text fits."""


def unfit_share(rows: Sequence[Sequence[int]], tokenizer: Any) -> float | None:
    """Return the share of unknown, byte-fallback and broken characters' tokens in ``rows``.

    A token of a byte-level vocabulary counts if it is part of a character only. None if the
    tokenizer cannot show its tokens.
    """
    if not (hasattr(tokenizer, "decode") and hasattr(tokenizer, "convert_ids_to_tokens")):
        return None
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(row[: MOST - counts.total()])
        if counts.total() >= MOST:
            break
    ids = list(counts)
    unknown = getattr(tokenizer, "unk_token_id", None)
    odd = 0
    for token, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        byte = bool(_BYTE.fullmatch(str(name))) and name not in _USUAL
        if token == unknown or byte or "\ufffd" in tokenizer.decode([token]):
            odd += counts[token]
    return round(odd / counts.total(), 4) if counts else None
