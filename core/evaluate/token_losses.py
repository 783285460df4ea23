"""The loss of each token of a text, and the likeliest tokens in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from core.errors import DataError, NotFiniteError
from core.evaluate.token_view import LIKELIEST, TokenView
from core.model.memory import out_of_memory_explained
from core.model.precision import not_finite_hint
from core.model.tokens import check_ids, embedded

ROWS = 64
"""Places whose logits are held at once."""


@torch.inference_mode()
def token_view(model: Any, tokenizer: Any, ids: Sequence[int], source: str = "") -> TokenView:
    """Return a text of at least two tokens as ``model`` reads it, in one pass.

    Raises:
        DataError: there are fewer tokens, or one is outside the model's vocabulary.
        NotFiniteError: a loss is NaN or infinite.
    """
    if len(ids) < 2:
        raise DataError("The text has fewer than two tokens.", "Give a longer text.")
    check_ids([ids], embedded(model))
    device = model.get_input_embeddings().weight.device
    row = torch.tensor([list(ids)], device=device)
    losses: list[float] = []
    top: list[tuple[tuple[int, float], ...]] = []
    with out_of_memory_explained("reading a text token by token"):
        hidden = model.model(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
        for states, wanted in zip(hidden.split(ROWS), row[0, 1:].split(ROWS), strict=True):
            scores = model.lm_head(states).float().log_softmax(dim=-1)
            losses += (-scores.gather(1, wanted[:, None])[:, 0]).tolist()
            best = scores.topk(min(LIKELIEST, scores.shape[-1]), dim=-1)
            for values, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                top.append(tuple((n, math.exp(v)) for n, v in zip(numbers, values, strict=True)))
    if not all(map(math.isfinite, losses)):
        raise NotFiniteError(
            "The loss of a token is NaN or infinite.", not_finite_hint(model.dtype)
        )
    guesses = [
        tuple((_after(tokenizer, ids[at], number), round(share, 5)) for number, share in places)
        for at, places in enumerate(top)
    ]
    return TokenView(
        source=source,
        ids=tuple(ids),
        pieces=pieces(tokenizer, ids),
        nll=(None, *(round(loss, 4) for loss in losses)),
        top=((), *guesses),
    )


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of every token, so that all together are the text.

    A token is decoded behind what is before it, which determines its leading space. The tokens of
    one character have it together: the first all of it, the others nothing.
    """
    found: list[str] = []
    before = at = 0
    while at < len(ids):
        end = at + 1
        text = _between(tokenizer, ids[before:end], at - before)
        while text.endswith("\ufffd") and end < min(len(ids), at + 4):
            end += 1
            text = _between(tokenizer, ids[before:end], at - before)
        found += [text, *[""] * (end - at - 1)]
        before, at = at, end
    return tuple(found)


def _between(tokenizer: Any, ids: Sequence[int], first: int) -> str:
    """Return the text that the tokens from ``first`` on add to those before."""
    known = tokenizer.decode(ids[:first], skip_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    return str(whole[len(known) :])


def _after(tokenizer: Any, before: int, token: int) -> str:
    return _between(tokenizer, [before, token], 1)
