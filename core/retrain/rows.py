"""Token rows with labels, from a SOURCE: rows to train on, and held-out rows to evaluate on.

Rows are tokenised only here, so a preview shows exactly what training uses. This module does not
import torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.checkpoint.chat import ChatTemplate, Messages
from core.data import generated, sources
from core.data.columns import as_instruction, as_messages
from core.data.templates import prompt_of
from core.errors import DataError, OptionError
from core.retrain.encoders import Encoder
from core.retrain.spec import RetrainSpec

IGNORED = -100
"""Label of a token without loss."""
HOLDOUT_SEED = 402
"""Chooses the held-out rows of a file. Fixed, so that all seeds are evaluated on the same rows."""


@dataclass(frozen=True)
class Row:
    """One training row; ``labels`` are ids, or `IGNORED` without a loss (always the first)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def items(self) -> int:
        """Number of predicted tokens."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class RowSet:
    """Rows to train on, rows to evaluate on, and how they were made."""

    train: list[Row]
    heldout: list[Row]
    kind: str
    """instruction, messages, text or input_ids."""
    source_rows: int
    cut: int
    """Training rows shortened to the cutoff (instructions) or split at it (text)."""
    dropped: int
    """Training rows skipped: no usable text, no predicted token within the cutoff, equal to a
    held-out row, or not accepted by the chat template."""
    data: dict[str, str]
    heldout_data: dict[str, str]
    template: str = ""
    """chat, alpaca or plain; empty for text and ids."""
    refused: str = ""
    """How many of the dropped rows the chat template did not accept, and its first reason."""
    also: dict[str, list[Row]] = field(default_factory=dict)
    """Rows of other sources to evaluate on; none of them is in the training data."""


def instruction_row(row: dict[str, str], encoder: Encoder, template: str) -> Row:
    """Tokenise one instruction row, uncut; the loss covers the response and the end token.

    Prompt and response are tokenised together. The tokens that they share with the prompt alone are
    masked; a token that spans the border belongs to the response.
    """
    prompt = prompt_of(row, template)
    ids = encoder.encode(prompt + row["output"])
    alone = encoder.encode(prompt)
    border = next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), None)
    border = min(len(ids), len(alone)) if border is None else border
    border = max(1, border)
    ids = ids if encoder.eos_id is None else [*ids, encoder.eos_id]
    return Row(tuple(ids), (*[IGNORED] * border, *ids[border:]))


def chat_row(messages: Messages, encoder: Encoder, template: ChatTemplate) -> Row:
    """Tokenise one conversation, uncut; the loss covers the assistant's answers.

    The token that ends an answer belongs to it. If the template ends the last answer with none,
    the tokenizer's end token is added. A token that spans the border of an answer belongs to it.

    Raises `DataError` if the template does not accept the conversation.
    """
    found = template.answers(messages)
    tokens = encoder.encode_spans(found.text, start=template is encoder.plain_chat)
    ids, labels = [], []
    spans = iter([*found.answers, (len(found.text) + 1, len(found.text) + 1)])
    start, end = next(spans)
    for id_, first, last in tokens:
        while first >= end and end <= len(found.text):
            start, end = next(spans)
        ids.append(id_)
        labels.append(id_ if last > start and ids[1:] else IGNORED)
    last_end = found.answers[-1][1] if found.answers else 0
    open_ended = found.text[:last_end].endswith(messages[-1]["content"].strip())
    if encoder.eos_id is not None and last_end == len(found.text.rstrip()) and open_ended:
        ids, labels = [*ids, encoder.eos_id], [*labels, encoder.eos_id]
    return Row(tuple(ids), tuple(labels))


def template_of(spec: RetrainSpec, kind: str, source: str, encoder: Encoder) -> str:
    """Return how rows of ``kind`` are written, as `template_for` does."""
    return template_for(spec.template, kind, source, encoder)


def template_for(choice: str, kind: str, source: str, encoder: Encoder) -> str:
    """Return how rows of ``kind`` are written: chat, alpaca or plain; empty for text and ids.

    ``choice`` is the option; auto keeps the layout of prompts that a model has answered.

    Raises `OptionError` for a chat template that the tokenizer does not have.
    """
    if kind not in ("instruction", "messages"):
        return ""
    if choice == "chat" and encoder.chat is None:
        raise OptionError(
            "--template chat: the tokenizer has no chat template.",
            "Use --template plain or alpaca, or a checkpoint whose tokenizer has one.",
        )
    if choice != "auto":
        return choice
    if (written := generated.template_of(source)) in ("alpaca", "plain"):
        return written
    if encoder.chat is not None:
        return "chat"
    return "plain" if source == "demo" or kind == "messages" else "alpaca"


def text_pieces(ids: Sequence[int], cutoff: int) -> list[Row]:
    """Split a text's ids into rows of up to ``cutoff`` tokens, with a loss on all but the first."""
    pieces = (tuple(ids[at : at + cutoff]) for at in range(0, len(ids), cutoff))
    return [Row(piece, (IGNORED, *piece[1:])) for piece in pieces if len(piece) > 1]


def kind_of(spec: RetrainSpec, source: str) -> str:
    """Return the kind of the rows of ``source``."""
    if spec.format != "auto":
        return spec.format
    return sources.kind_of(source)


def prepare(
    spec: RetrainSpec, encoder: Encoder, *, vocab: int, context: int, most: int | None = None
) -> RowSet:
    """Return the rows of a spec; with ``most``, only of that many source rows (for estimates).

    Raises:
        DataError: wrong columns, empty responses, ids outside the vocabulary, nothing left.
        OptionError: the cutoff is longer than the model's context.
    """
    if spec.cutoff > context:
        raise OptionError(
            f"--cutoff {spec.cutoff} is longer than the model's context of {context} tokens.",
            f"The maximum is --cutoff {context}.",
        )
    kind = kind_of(spec, spec.data)
    raw, skipped = _raw(spec.data, kind, "train")
    total = len(raw)
    if spec.holdout_data or spec.data in sources.BUNDLED:
        source = spec.holdout_data or spec.data
        held_kind = kind_of(spec, source)
        held, _ = _raw(source, held_kind, "heldout")
        random.Random(HOLDOUT_SEED).shuffle(held)
        held = held[: spec.holdout]
    else:
        source, held_kind = spec.data, kind
        order = list(range(total))
        random.Random(HOLDOUT_SEED).shuffle(order)
        count = min(spec.holdout, max(1, total // 10))
        held = [raw[i] for i in order[:count]]
        raw = [raw[i] for i in sorted(order[count:])]
    heldout = _rows(held, held_kind, source, spec, encoder, vocab).rows
    made = _rows(raw[:most] if most else raw, kind, spec.data, spec, encoder, vocab)
    held_ids = {row.ids for row in heldout}
    clean = [row for row in made.rows if row.ids not in held_ids]
    dropped = made.dropped + len(made.rows) - len(clean) + skipped
    if not clean:
        why = f" {made.refused}" if made.refused else ""
        raise DataError(
            f"{spec.data} has no usable rows to train on: none of its {total} rows has a target "
            f"token within the first {spec.cutoff} tokens and is not held out.{why}",
            "Give more rows, or a longer --cutoff.",
        )
    if not heldout:
        raise DataError(
            f"{source} has no usable rows to evaluate on: none of its {len(held)} held-out rows "
            f"has a target token within the first {spec.cutoff} tokens.",
            "Give more rows, or a longer --cutoff.",
        )
    trained = {row.ids for row in clean}
    also = {name: _also(name, spec, encoder, vocab, trained) for name in spec.also}
    about = sources.describe(spec.data), sources.describe(source)
    template = template_of(spec, kind, spec.data, encoder)
    return RowSet(
        clean, heldout, kind, total, made.cut, dropped, *about, template, made.refused, also
    )


def _also(
    source: str, spec: RetrainSpec, encoder: Encoder, vocab: int, trained: set[tuple[int, ...]]
) -> list[Row]:
    """Return the rows of another source to evaluate on, as its columns say, otherwise as text."""
    kind = sources.kind_of(source)
    raw, _ = _raw(source, kind, "heldout")
    random.Random(HOLDOUT_SEED).shuffle(raw)
    made = _rows(raw[: spec.holdout], kind, source, spec, encoder, vocab)
    rows = [row for row in made.rows if row.ids not in trained]
    if not rows:
        raise DataError(
            f"--also {source} has no usable rows to evaluate on: all are in the training data or "
            "too short.",
            "Give another source.",
        )
    return rows


def _raw(source: str, kind: str, use: sources.Use) -> tuple[list[Any], int]:
    """Return the rows of a source as ``kind``, and the number of rows without what it needs."""
    rows = sources.open_rows(source, use, want=(kind,), stream=False)
    if kind == "text":
        return list(sources.texts(rows)), rows.skipped
    if rows.kind == "messages" and kind == "instruction":
        return list(map(as_instruction, rows)), rows.skipped
    if rows.kind != kind:
        raise DataError(
            f"{source} has {rows.kind} rows, not {kind} rows.",
            "Give other data, or --format auto.",
        )
    if kind == "input_ids":
        return [row["input_ids"] for row in rows], rows.skipped
    return list(rows), rows.skipped


@dataclass(frozen=True)
class _Made:
    """Tokenised rows, and what became of the others."""

    rows: list[Row]
    cut: int
    dropped: int
    refused: str
    """How many rows the chat template did not accept, and why; empty if it accepted all."""


def _whole(item: Any, kind: str, template: str, encoder: Encoder) -> Row:
    """Tokenise an instruction or a conversation, uncut."""
    if template == "chat" and encoder.chat:
        return chat_row(as_messages(item)["messages"], encoder, encoder.chat)
    if kind == "messages" and template == "plain":
        return chat_row(item["messages"], encoder, encoder.plain_chat)
    return instruction_row(as_instruction(item) if kind == "messages" else item, encoder, template)


def _rows(
    raw: Sequence[Any], kind: str, source: str, spec: RetrainSpec, encoder: Encoder, vocab: int
) -> _Made:
    """Tokenise the rows of a source."""
    rows: list[Row] = []
    cut = dropped = refused = 0
    reason = ""
    template = template_of(spec, kind, source, encoder)
    for number, item in enumerate(raw, 1):
        if template:
            try:
                whole = _whole(item, kind, template, encoder)
            except DataError as error:
                refused, reason = refused + 1, reason or f"Row {number}: {error.message}"
                continue
            pieces = [Row(whole.ids[: spec.cutoff], whole.labels[: spec.cutoff])]
            cut += len(whole.ids) > spec.cutoff
        else:
            ids = list(item) if kind == "input_ids" else _with_end(encoder.encode(item), encoder)
            pieces = text_pieces(ids, spec.cutoff)
            cut += len(ids) > spec.cutoff
        kept = [row for row in pieces if row.items]
        dropped += not kept
        for row in kept:
            if min(row.ids) < 0 or max(row.ids) >= vocab:
                wrong = min(row.ids) if min(row.ids) < 0 else max(row.ids)
                raise DataError(
                    f"{source}: row {number} has token id {wrong}, but the model has {vocab}.",
                    "Tokenise with the tokenizer of this model, or give text.",
                )
        rows.extend(kept)
    if refused:
        count = "1 row is" if refused == 1 else f"{refused:,} rows are"
        reason = f"{count} skipped. {reason}"
    return _Made(rows, cut, dropped + refused, reason)


def _with_end(ids: list[int], encoder: Encoder) -> list[int]:
    return ids if encoder.eos_id is None else [*ids, encoder.eos_id]


def preview(row: Row, encoder: Encoder) -> list[dict[str, Any]]:
    """Return a row as spans of text, masked or not, to show before a launch."""
    spans: list[dict[str, Any]] = []
    for id_, label in zip(row.ids, row.labels, strict=True):
        masked = label == IGNORED
        if not spans or spans[-1]["masked"] != masked:
            spans.append({"masked": masked, "ids": []})
        spans[-1]["ids"].append(id_)
    return [
        {"masked": r["masked"], "text": "".join(encoder.pieces(r["ids"])), "tokens": len(r["ids"])}
        for r in spans
    ]
