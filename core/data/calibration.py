"""Calibration rows: crops of equal length from a source's texts, sampled with a seed.

Sampling follows Shortened LLaMA (arXiv 2402.02834): rows with at least the requested number of
tokens, in an order shuffled with the seed, and a random crop of each.
"""

from __future__ import annotations

import random
from typing import Protocol

from core.data.readers import Row
from core.data.sources import rows_of, text_rows
from core.errors import DataError

HIGHEST_ID = (1 << 31) - 1
"""Of a token."""


class Encoder(Protocol):
    """What sampling needs from a tokenizer (those of transformers fit)."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of ``text``."""


def calibration_rows(
    source: str,
    tokenizer: Encoder,
    samples: int,
    length: int,
    seed: int,
    *,
    or_fewer: bool = False,
) -> list[list[int]]:
    """Return ``samples`` rows of exactly ``length`` token ids, sampled with ``seed``.

    ``input_ids`` rows are used as they are, in order, cut to ``length``. With ``or_fewer`` fewer
    rows are enough, if at least one is long enough.

    Raises:
        DataError: fewer than ``samples`` rows are long enough; the message gives the shortfall.
    """
    rows = rows_of(source)
    if "input_ids" in rows[0]:
        return _exact_rows(source, rows, samples, length, or_fewer)
    texts = text_rows(source)
    order = list(range(len(texts)))
    draw = random.Random(seed)
    draw.shuffle(order)
    chosen: list[list[int]] = []
    longest = 0
    for index in order:
        if len(chosen) == samples:
            break
        ids = tokenizer.encode(texts[index], add_special_tokens=True)
        longest = max(longest, len(ids))
        if len(ids) >= length:
            start = draw.randint(0, len(ids) - length)
            chosen.append(ids[start : start + length])
    if len(chosen) < samples and not (or_fewer and chosen):
        raise DataError(
            f"{source}: only {len(chosen)} rows have at least {length} tokens, but {samples} are "
            f"needed ({samples - len(chosen)} short; the longest row has {longest} tokens).",
            "Give more text, fewer --samples or a smaller --length.",
        )
    return chosen


def _exact_rows(
    source: str, rows: list[Row], samples: int, length: int, or_fewer: bool = False
) -> list[list[int]]:
    chosen = []
    for number, row in enumerate(rows, 1):
        ids = row.get("input_ids")
        if not isinstance(ids, list) or not all(
            type(i) is int and 0 <= i <= HIGHEST_ID for i in ids
        ):
            raise DataError(
                f"{source}: 'input_ids' of row {number} is not a list of token ids.",
                "Token ids are whole numbers of at least 0.",
            )
        if len(ids) >= length:
            chosen.append(ids[:length])
    if len(chosen) < samples and not (or_fewer and chosen):
        raise DataError(
            f"{source}: only {len(chosen)} input_ids rows have at least {length} tokens, but "
            f"{samples} are needed ({samples - len(chosen)} short).",
            "Give more rows, fewer --samples or a smaller --length.",
        )
    return chosen[:samples]
