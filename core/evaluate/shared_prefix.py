"""Log-likelihoods of many continuations, with the tokens that they share computed once.

The choices of a question usually share its text (for WinoGrande, the text up to the blank). They
are laid out in one row: the shared tokens, then what each choice adds, with a mask that keeps the
choices from seeing each other and with the position that every token has in its own sequence. The
head sees only the positions that predict a continuation. The arithmetic is otherwise that of the
LM Evaluation Harness, so the results equal its own up to rounding; `tests/evaluate` compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.model.blocks import additive_mask

LOGITS = 2**24
"""Logits held at once: 64 MiB in float32. Chosen, not measured."""

Tokens = tuple[int, ...]
Answer = tuple[float, bool]
"""Log-likelihood of the continuation, and whether greedy decoding produces it."""


@dataclass
class Group:
    """Sequences in one row: their first ``shared`` tokens are the same."""

    sequences: list[Tokens] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """The request of each sequence."""
    shared: int = 0

    def __len__(self) -> int:
        """Return the number of tokens in the row."""
        return self.shared + sum(len(one) - self.shared for one in self.sequences)

    def shared_with(self, sequence: Tokens) -> int:
        """Return how many tokens the row would share if ``sequence`` joined it."""
        if not self.sequences:
            return len(sequence)
        first = self.sequences[0]
        most = min(self.shared, len(sequence))
        return next((i for i in range(most) if first[i] != sequence[i]), most)

    def add(self, number: int, sequence: Tokens, shared: int) -> None:
        """Put ``sequence``, request ``number``, into the row."""
        self.sequences.append(sequence)
        self.numbers.append(number)
        self.shared = shared


def grouped(sequences: Sequence[Tokens], longest: int) -> list[Group]:
    """Return rows of at most ``longest`` tokens; a sequence joins the row before it if that saves.

    Only neighbours are compared: the harness asks for the choices of one question in a row.
    """
    groups: list[Group] = []
    for number, sequence in enumerate(sequences):
        last = groups[-1] if groups else Group()
        shared = last.shared_with(sequence)
        separate = len(last) + len(sequence)
        joint = shared + sum(len(one) - shared for one in (*last.sequences, sequence))
        if not groups or joint >= separate or joint > longest:
            groups.append(Group([sequence], [number], len(sequence)))
        else:
            last.add(number, sequence, shared)
    return groups


def is_possible(model: Any, tokens: int) -> bool:
    """Whether ``model`` takes masks of our own for rows of ``tokens`` tokens.

    It must have a body and a head as the families of `core.checkpoint.families` have, use
    attention that takes a mask, and attend over whole rows.
    """
    window = getattr(model.config, "sliding_window", None)
    return (
        hasattr(model, "model")
        and hasattr(model, "lm_head")
        and getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")
        and (window is None or window >= tokens)
    )


def answers(
    model: Any,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    context: int,
    rows: int,
    softmax_dtype: torch.dtype | None = None,
) -> Iterator[list[tuple[int, Answer]]]:
    """Yield the answers to ``requests``, batch by batch, each with its request's number.

    Args:
        model: a causal language model for which `is_possible` holds.
        requests: tokens of the context and of the continuation, neither empty.
        context: longest sequence of the model in tokens; longer ones lose their first tokens.
        rows: rows per batch.
        softmax_dtype: dtype of the log-softmax; None for the model's own.
    """
    sequences = [(*before, *ending)[-(context + 1) :][:-1] for before, ending in requests]
    groups = sorted(grouped(sequences, context), key=len, reverse=True)
    for first in range(0, len(groups), rows):
        batch = groups[first : first + rows]
        with torch.inference_mode():
            yield _answer(model, batch, requests, softmax_dtype)


def _answer(
    model: Any,
    batch: Sequence[Group],
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    softmax_dtype: torch.dtype | None,
) -> list[tuple[int, Answer]]:
    device = model.get_input_embeddings().weight.device
    ids, positions, mask = _laid_out(batch)
    options: dict[str, Any] = {}
    if mask is not None:
        options["attention_mask"] = mask.to(device)
        options["position_ids"] = positions.to(device)
        if model.config._attn_implementation != "sdpa":
            like = model.get_input_embeddings().weight
            options["attention_mask"] = additive_mask(options["attention_mask"], like.dtype)
    hidden = model.model(input_ids=ids.to(device), use_cache=False, **options).last_hidden_state
    wanted = [
        (number, row, places)
        for row, group in enumerate(batch)
        for number, places in _predicting(group, requests)
    ]
    at_row = torch.tensor([row for _, row, places in wanted for _ in places], device=device)
    at = torch.tensor([place for _, _, places in wanted for place in places], device=device)
    targets = torch.tensor(
        [token for number, _, _ in wanted for token in requests[number][1]], device=device
    )
    likelihood, greedy = _scored(model, hidden[at_row, at], targets, softmax_dtype)
    found: list[tuple[int, Answer]] = []
    done = 0
    for number, _, places in wanted:
        piece = slice(done, done + len(places))
        found.append((number, (float(likelihood[piece].sum()), bool(greedy[piece].all()))))
        done += len(places)
    return found


def _laid_out(batch: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return token ids and positions [rows, tokens], and the mask [rows, 1, tokens, tokens].

    The mask is None if no row holds more than one sequence: plain causal attention then does, since
    nothing follows the padding.
    """
    longest = max(len(group) for group in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    positions = torch.zeros(len(batch), longest, dtype=torch.long)
    branch = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, group in enumerate(batch):
        shared = group.shared
        tokens = list(group.sequences[0][:shared])
        at = list(range(shared))
        of = [0] * shared
        for number, sequence in enumerate(group.sequences, 1):
            tokens += sequence[shared:]
            at += range(shared, len(sequence))
            of += [number] * (len(sequence) - shared)
        ids[row, : len(tokens)] = torch.tensor(tokens)
        positions[row, : len(at)] = torch.tensor(at)
        branch[row, : len(of)] = torch.tensor(of)
    if all(len(group.sequences) == 1 for group in batch):
        return ids, positions, None
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    return ids, positions, (same & causal)[:, None]


def _predicting(
    group: Group, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[int, list[int]]]:
    """Yield each request with the places in the row that predict its continuation."""
    start = group.shared
    for number, sequence in zip(group.numbers, group.sequences, strict=True):
        first = len(sequence) - len(requests[number][1])
        yield (
            number,
            [
                at if at < group.shared else start + at - group.shared
                for at in range(first, len(sequence))
            ],
        )
        start += len(sequence) - group.shared


def _scored(
    model: Any, hidden: Tensor, targets: Tensor, softmax_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of every target, and whether it is the likeliest token."""
    size = max(1, LOGITS // model.lm_head.weight.shape[0])
    likelihood, greedy = [], []
    for first in range(0, len(targets), size):
        piece = targets[first : first + size]
        logits = model.lm_head(hidden[first : first + size])
        logits = F.log_softmax(logits, dim=-1, dtype=softmax_dtype)
        likelihood.append(logits.gather(1, piece[:, None])[:, 0])
        greedy.append(logits.argmax(dim=-1) == piece)
    return torch.cat(likelihood), torch.cat(greedy)
