"""Prompts with their references, from a SOURCE, in the layout in which retraining writes rows.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from core.data import sources
from core.data.columns import Row, as_messages
from core.data.templates import prompt_of
from core.errors import DataError, OptionError
from core.generate.spec import GenerateSpec
from core.retrain.encoders import Encoder
from core.retrain.rows import template_for

LEAST = 8
"""Tokens of text that must follow a prompt, as its reference."""
STOPS = {("alpaca", ""): ("\n### ",), ("plain", "messages"): ("\nUser:", "\nSystem:")}
"""What ends an answer besides the end token: the start of a next turn, by template and kind."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, and the answer that the dataset has for it."""

    ids: tuple[int, ...]
    text: str
    """The prompt as the model reads it."""
    reference: str
    """Empty if the dataset has none."""
    row: Row
    """The row that it is from; for text, ``text`` is the prompt with the reference."""


@dataclass
class Prompts:
    """The prompts of a source, and what became of its other rows."""

    kind: str
    """instruction, messages or text."""
    template: str
    """chat, alpaca or plain; empty for text."""
    found: list[Prompt] = field(default_factory=list)
    skipped: int = 0
    """Rows without what they need, or that the chat template does not accept."""
    reason: str = ""
    too_long: int = 0
    """Prompts that leave too little room in the model's context."""
    too_short: int = 0
    """Texts without enough tokens after the prompt."""

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends an answer besides the end token."""
        found = (STOPS.get((self.template, kind), ()) for kind in ("", self.kind))
        return tuple(stop for stops in found for stop in stops)

    def notes(self, room: int) -> list[str]:
        """Return one sentence for each kind of row that is left out."""
        found = []
        if self.skipped:
            found.append(f"{_rows(self.skipped)} skipped: {self.reason}.")
        if self.too_long:
            found.append(f"{_rows(self.too_long)} skipped: longer than {room:,} tokens.")
        if self.too_short:
            found.append(f"{_rows(self.too_short)} skipped: too short to be continued.")
        return found


def _rows(count: int) -> str:
    return "1 prompt is" if count == 1 else f"{count:,} prompts are"


def read(spec: GenerateSpec, encoder: Encoder, *, vocab: int, context: int) -> Prompts:
    """Return up to ``spec.samples`` prompts of ``spec.prompts``.

    Raises:
        DataError: the source is empty or unsuitable, or all its prompts are too long or too short.
        OptionError: the answers leave no room for a prompt in the model's context.
    """
    context = context or 1 << 30
    room = context - spec.max_tokens
    if room < 1:
        raise OptionError(
            f"--max-tokens {spec.max_tokens} leaves no room for a prompt in the model's context "
            f"of {context} tokens.",
            f"Use fewer than {context}.",
        )
    source, kind = spec.prompts, _kind(spec)
    rows = sources.open_rows(source, "train", want=(kind,))
    if rows.kind != kind and not (kind == "text" and rows.kind in ("instruction", "messages")):
        raise DataError(
            f"{source} has {rows.kind} rows, not {kind} rows.", "Give other data, or --format auto."
        )
    if kind == "text" and spec.prompt_tokens:
        found = Prompts("text", "")
        made = _continued(spec, encoder, found, sources.texts(rows))
    elif kind == "text":
        found = Prompts("instruction", template_for(spec.template, "instruction", source, encoder))
        asked = ({"instruction": text, "input": "", "output": ""} for text in sources.texts(rows))
        made = _asked(encoder, found, asked)
    else:
        found = Prompts(kind, template_for(spec.template, kind, source, encoder))
        made = _asked(encoder, found, rows)
    for prompt in made:
        if len(prompt.ids) > room:
            found.too_long += 1
            continue
        _check(prompt.ids, vocab, source)
        found.found.append(prompt)
        if len(found.found) == spec.samples:
            break
    found.skipped += rows.skipped
    found.reason = found.reason or rows.reason
    if not found.found:
        raise _nothing(spec, found, room, context)
    return found


def _kind(spec: GenerateSpec) -> str:
    if spec.format != "auto":
        return spec.format
    kind = "instruction" if spec.prompts == "demo" else sources.kind_of(spec.prompts)
    if kind == "input_ids":
        raise DataError(
            f"{spec.prompts} has no prompts: its rows are token ids.",
            "Give instructions, messages or text.",
        )
    return kind


def _nothing(spec: GenerateSpec, found: Prompts, room: int, context: int) -> DataError:
    """Return why not one prompt can be used."""
    if found.too_long:
        return DataError(
            f"{spec.prompts}: every prompt is longer than the {room:,} tokens that the model's "
            f"context of {context:,} leaves beside answers of {spec.max_tokens:,}.",
            "Give shorter prompts, or a smaller --max-tokens.",
        )
    if found.too_short:
        return DataError(
            f"{spec.prompts}: no text has {spec.prompt_tokens + LEAST} tokens, "
            f"{spec.prompt_tokens} of them as the prompt.",
            "Give longer texts, or a smaller --prompt-tokens.",
        )
    why = f" ({found.reason})" if found.reason else ""
    return DataError(
        f"{spec.prompts} has no prompt that can be used{why}.",
        "Give instructions, messages or text.",
    )


def _check(ids: tuple[int, ...], vocab: int, source: str) -> None:
    largest = max(ids)
    if largest >= vocab:
        raise DataError(
            f"{source}: a prompt has token id {largest}, but the model has {vocab}.",
            "Use the tokenizer that belongs to this checkpoint.",
        )


def _asked(encoder: Encoder, found: Prompts, rows: Any) -> Iterator[Prompt]:
    """Yield the prompts of instructions or messages."""
    for number, row in enumerate(rows, 1):
        try:
            text, ids, reference = _written(encoder, found, row)
        except DataError as error:
            found.skipped += 1
            found.reason = found.reason or f"row {number}: {error.message.rstrip('.')}"
            continue
        yield Prompt(ids, text, reference, row)


def _written(encoder: Encoder, found: Prompts, row: Row) -> tuple[str, tuple[int, ...], str]:
    """Return the prompt of a row as text and tokens, and its reference."""
    if found.kind == "instruction" and found.template != "chat":
        text = prompt_of(row, found.template)
        return text, tuple(encoder.encode(text)), row["output"]
    turns = as_messages(row)["messages"]
    before, reference = turns[:-1], turns[-1]["content"]
    if not before:
        raise DataError("It begins with an answer.", "Give a message before it.")
    if found.template == "alpaca":
        asked = "\n".join(turn["content"] for turn in before)
        text = prompt_of({"instruction": asked, "input": ""}, "alpaca")
        return text, tuple(encoder.encode(text)), reference
    chat = encoder.chat if found.template == "chat" else None
    text = (chat or encoder.plain_chat).render(before, prompt=True)
    spans = encoder.encode_spans(text, start=chat is None)
    return text, tuple(id_ for id_, _, _ in spans), reference


def _continued(
    spec: GenerateSpec, encoder: Encoder, found: Prompts, texts: Iterator[str]
) -> Iterator[Prompt]:
    """Yield pieces of texts: the first tokens are the prompt, what follows is the reference."""
    start = tuple(encoder.encode(""))
    size = spec.prompt_tokens + spec.max_tokens
    for text in texts:
        tokens = encoder.encode_spans(text, start=False)
        for at in range(0, len(tokens), size):
            piece = tokens[at : at + size]
            if len(piece) < spec.prompt_tokens + LEAST:
                found.too_short += at == 0
                continue
            first, end = piece[0][1], piece[-1][2]
            cut = piece[spec.prompt_tokens][1]
            ids = (*start, *(id_ for id_, _, _ in piece[: spec.prompt_tokens]))
            row = {"text": text[first:end]}
            yield Prompt(ids, text[first:cut], text[cut:end], row)
