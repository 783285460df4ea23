"""Calibration rows: crops of equal length from a source's texts, sampled with a seed.

Sampling follows Shortened LLaMA (arXiv 2402.02834): rows with at least the requested number of
tokens, in an order shuffled with the seed, and a random crop of each. Of a large source only the
first rows are shuffled: `POOL_ROWS` rows or `POOL_CHARACTERS` characters of text, whichever comes
first. That depends on the rows alone, so every way of storing them gives the same sample, and the
rest is not read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from core.data.columns import Row, as_messages, plain_text
from core.data.facts import TextFacts
from core.data.fit import unfit_share
from core.data.sources import Rows, Use, open_rows
from core.errors import DataError, OptionError

POOL_ROWS = 100_000
POOL_CHARACTERS = 16_000_000
"""What is shuffled of a large source; WikiText-2 (11 million characters) is taken as a whole."""
JOINS = ("auto", "on", "off")
JOIN_HELP = (
    "Concatenate consecutive rows, with a blank line between, until they are long enough: on, off, "
    "or auto (only if too few single rows are long enough)."
)
SOURCE_HELP = (
    "auto (english, or the demo's stories for the demo), english, demo, c4 or wikitext2 (from the "
    "Hub), hub:NAME, a file (text, JSON, CSV or Parquet, also .gz) or a saved dataset; ::FIELD "
    "names a column."
)
BETWEEN = "\n\n"
"""Between joined rows, as between the documents of an evaluation."""


class Encoder(Protocol):
    """What sampling needs from a tokenizer (those of transformers fit)."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of ``text``."""


class Chat(Protocol):
    """Writes conversations as text; `core.checkpoint.chat.ChatTemplate` does."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a conversation as text; raises `DataError` if it does not accept it."""


@dataclass(frozen=True)
class Sample:
    """Calibration rows, and how they were obtained."""

    rows: list[list[int]]
    """Token ids; all rows have the same length."""
    facts: TextFacts = TextFacts()


def calibration_rows(
    source: str,
    tokenizer: Encoder,
    samples: int,
    length: int,
    seed: int,
    *,
    or_fewer: bool = False,
    join: str = "auto",
    chat: Chat | None = None,
) -> list[list[int]]:
    """Return the rows of `sample`."""
    return sample(
        source, tokenizer, samples, length, seed, or_fewer=or_fewer, join=join, chat=chat
    ).rows


def sample(
    source: str,
    tokenizer: Encoder,
    samples: int,
    length: int,
    seed: int,
    *,
    or_fewer: bool = False,
    join: str = "auto",
    use: Use = "calibration",
    chat: Chat | None = None,
) -> Sample:
    """Return ``samples`` rows of exactly ``length`` token ids, sampled with ``seed``.

    ``input_ids`` rows are used as they are, in order, cut to ``length``. With ``or_fewer`` fewer
    rows are enough, if at least one is long enough. ``join`` is one of `JOINS`. ``chat`` writes the
    rows of messages and instructions, which else are their parts, a line each; rows that it does
    not accept are skipped. Its text is encoded as it is: it contains its own special tokens.

    Raises:
        DataError: fewer than ``samples`` rows are long enough; the message gives the shortfall.
    """
    check_join(join)
    rows = open_rows(source, use, want=("input_ids", "text"))
    if rows.kind == "input_ids":
        found = _exact(rows, samples, length, or_fewer)
        return Sample(found, TextFacts(skipped=rows.skipped))
    writer = _Writer(chat if rows.kind in ("messages", "instruction") else None)
    texts, whole = _pool(rows, writer)
    facts = TextFacts(
        skipped=rows.skipped,
        pool=None if whole else len(texts),
        chat_template=writer.chat is not None,
        refused=writer.refused,
        refusal=writer.refusal,
    )
    if writer.refused and not texts:
        raise DataError(
            f"{source}: no row can be used. {writer.refusal}", "Use --chat-template off."
        )
    if writer.chat:
        tokenizer = _AsItIs(tokenizer)
    return sample_texts(
        texts, tokenizer, samples, length, seed, or_fewer=or_fewer, join=join, name=source,
        facts=facts,
    )  # fmt: skip


def sample_texts(
    texts: Sequence[str],
    tokenizer: Encoder,
    samples: int,
    length: int,
    seed: int,
    *,
    or_fewer: bool = False,
    join: str = "auto",
    name: str = "The texts",
    facts: TextFacts | None = None,
) -> Sample:
    """Return rows of ``texts`` as `sample` draws them from the texts of a source.

    ``name`` is the source's, for messages; ``facts`` what is known of the texts. Raises `DataError`
    as `sample` does.
    """
    facts = facts or TextFacts()
    longest = 0
    if join != "on":
        chosen, longest = _single(texts, tokenizer, samples, length, seed)
        if len(chosen) == samples or (or_fewer and chosen):
            return _with_fit(chosen, facts, tokenizer)
    if join != "off":
        chosen = _joined(texts, tokenizer, samples, length, seed)
        if len(chosen) == samples or (or_fewer and chosen):
            return _with_fit(chosen, replace(facts, joined=True), tokenizer)
    even = "" if join == "off" else ", even if short rows are joined"
    detail = f"; the longest row has {longest} tokens" if longest else ""
    raise DataError(
        f"{name}: only {len(chosen)} rows have at least {length} tokens, but {samples} are "
        f"needed ({samples - len(chosen)} short{detail}){even}.",
        "Give more text, fewer --samples or a smaller --length"
        + (", or join short rows with --join on." if join == "off" else "."),
    )


def check_join(join: str) -> None:
    """Raise `OptionError` unless ``join`` is one of `JOINS`."""
    if join not in JOINS:
        raise OptionError(f"--join: there is no '{join}'.", f"Choose from: {', '.join(JOINS)}.")


def _with_fit(rows: list[list[int]], facts: TextFacts, tokenizer: Encoder) -> Sample:
    return Sample(rows, replace(facts, unfit=unfit_share(rows, tokenizer)))


class _Writer:
    """Writes rows as text, and counts those that a chat template does not accept."""

    def __init__(self, chat: Chat | None) -> None:
        self.chat, self.refused, self.refusal = chat, 0, ""

    def text(self, row: Row) -> str | None:
        if self.chat is None:
            return plain_text(row)
        try:
            return self.chat.render(as_messages(row)["messages"])
        except DataError as error:
            self.refused, self.refusal = self.refused + 1, self.refusal or error.message
            return None


class _AsItIs:
    """A tokenizer that adds no special tokens."""

    def __init__(self, tokenizer: Encoder) -> None:
        self.tokenizer, self.bos_token_id = tokenizer, tokenizer.bos_token_id

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _pool(rows: Rows, writer: _Writer) -> tuple[list[str], bool]:
    """Return the texts to shuffle, and whether they are all there are."""
    texts: list[str] = []
    characters = 0
    for row in rows:
        if len(texts) >= POOL_ROWS or characters >= POOL_CHARACTERS:
            return texts, False
        text = writer.text(row)
        if text is not None:
            texts.append(text)
            characters += len(text)
    return texts, True


def _order(count: int, seed: int) -> tuple[list[int], random.Random]:
    order, draw = list(range(count)), random.Random(seed)
    draw.shuffle(order)
    return order, draw


def _single(
    texts: Sequence[str], tokenizer: Encoder, samples: int, length: int, seed: int
) -> tuple[list[list[int]], int]:
    """Return crops of single rows, and the tokens of the longest row looked at."""
    chosen: list[list[int]] = []
    longest = 0
    order, draw = _order(len(texts), seed)
    for index in order:
        if len(chosen) == samples:
            break
        ids = tokenizer.encode(texts[index], add_special_tokens=True)
        longest = max(longest, len(ids))
        if len(ids) >= length:
            chosen.append(_crop(ids, length, draw))
    return chosen, longest


def _crop(ids: list[int], length: int, draw: random.Random) -> list[int]:
    start = draw.randint(0, len(ids) - length)
    return ids[start : start + length]


def _joined(
    texts: Sequence[str], tokenizer: Encoder, samples: int, length: int, seed: int
) -> list[list[int]]:
    """Return crops of consecutive rows; each starts at a row in shuffled order, none is reused."""
    chosen: list[list[int]] = []
    used = [False] * len(texts)
    order, draw = _order(len(texts), seed)
    for start in order:
        if len(chosen) == samples:
            break
        end = start
        ids: list[int] = []
        while len(ids) < length and end < len(texts) and not used[end]:
            step = 1 if not ids else max(1, (length - len(ids)) * (end - start) // len(ids) + 1)
            fresh = end
            while end < min(len(texts), fresh + step) and not used[end]:
                end += 1
            ids = tokenizer.encode(BETWEEN.join(texts[start:end]), add_special_tokens=True)
        if len(ids) >= length:
            used[start:end] = [True] * (end - start)
            chosen.append(_crop(ids, length, draw))
    return chosen


def _exact(rows: Rows, samples: int, length: int, or_fewer: bool) -> list[list[int]]:
    chosen: list[list[int]] = []
    for row in rows:
        if len(row["input_ids"]) >= length:
            chosen.append(row["input_ids"][:length])
        if len(chosen) == samples:
            break
    if len(chosen) < samples and not (or_fewer and chosen):
        raise DataError(
            f"{rows.source}: only {len(chosen)} input_ids rows have at least {length} tokens, but "
            f"{samples} are needed ({samples - len(chosen)} short).",
            "Give more rows, fewer --samples or a smaller --length.",
        )
    return chosen
