"""Text token by token for many prompts at once: greedy or sampled, rows leave as they end.

The tokens are those of transformers' ``generate`` on the same batch, which the tests compare. What
each token costs is small: keys and values are written into room kept for them, instead of being
copied whole at every token, and a row that has ended is no longer computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from core.errors import NotFiniteError
from core.model.caching import cache_name

FIRST_ROOM = 64
"""Tokens of room that a cache grows by at first; later it grows by half of what it holds."""

Pick = Callable[[Tensor, Sequence[int]], Tensor]
"""Chooses the next tokens [rows] from logits [rows, vocabulary] and the numbers of the rows."""
Stop = Callable[[int, Sequence[int]], str]
"""Says of a row's new tokens why it ends here: ``end``, ``loop``, or nothing to go on."""


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt."""

    ids: tuple[int, ...]
    """New tokens without the end token."""
    why: str
    """``end``: by an end token or a stop; ``loop``: it repeats itself; ``limit``: cut off."""


class _Growing(DynamicLayer):
    """A layer's keys and values [rows, heads, tokens, width] in room that grows now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Add the states of new tokens; return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        now = before + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < now:
            more = now + max(FIRST_ROOM, before // 2)
            made = []
            for new, old in ((key_states, self.keys), (value_states, self.values)):
                wide = new.new_empty((*new.shape[:-2], more, new.shape[-1]))
                if before and old is not None:
                    wide[..., :before, :] = old
                made.append(wide)
            self._room = (made[0], made[1])
        keys, values = self._room
        keys[..., before:now, :] = key_states
        values[..., before:now, :] = value_states
        self.keys, self.values = keys[..., :now, :], values[..., :now, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        super().batch_select_indices(indices)
        self._room = None


def cache_for(model: Any) -> Any:
    """Return an empty cache for ``model``; blocks with a sliding window keep their own kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_Growing() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


def greedy(logits: Tensor, _: Sequence[int]) -> Tensor:
    """Return the likeliest tokens."""
    return logits.argmax(dim=-1)


def sampler(temperature: float, seed: int, names: Sequence[int]) -> Pick:
    """Return a `Pick` that draws tokens with probabilities softmax(logits / temperature).

    Every row draws from numbers of its own, seeded with its entry in ``names``, so what it draws
    does not depend on the rows beside it.
    """
    draws = [random.Random(f"{seed} {name}") for name in names]

    def pick(logits: Tensor, rows: Sequence[int]) -> Tensor:
        shares = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
        at = torch.tensor([[draws[row].random()] for row in rows], device=shares.device)
        found = torch.searchsorted(shares, at * shares[:, -1:], right=True)[:, 0]
        return found.clamp(max=logits.shape[-1] - 1)

    return pick


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    ends: Collection[int],
    pick: Pick = greedy,
    stop: Stop | None = None,
    pad: int = 0,
    on_token: Callable[[], None] = lambda: None,
) -> list[Written]:
    """Return what ``model`` writes after each prompt, up to ``most`` tokens.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, none empty.
        most: new tokens per prompt, at least 1.
        ends: tokens that end a text.
        pick: chooses the next tokens.
        stop: may end a row before that.
        pad: an id of the vocabulary to fill short prompts with.
        on_token: called after every step, e.g. to look whether the run is cancelled.

    Raises `NotFiniteError` if the model's output is not finite.
    """
    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[pad] * gap + [*p] for gap, p in zip(gaps, prompts, strict=True)])
    ids = ids.to(device)
    seen = None  # without padding there is nothing to hide
    if any(gaps):
        seen = torch.ones(len(prompts), width + most, dtype=torch.bool, device=device)
        for row, gap in enumerate(gaps):
            seen[row, :gap] = False
    places = torch.arange(width, device=device)[None] - torch.tensor(gaps, device=device)[:, None]
    places = places.clamp(min=0)
    rows = list(range(len(prompts)))
    found: list[list[int]] = [[] for _ in prompts]
    why = ["limit"] * len(prompts)
    name, cache = cache_name(model), cache_for(model)
    for step in range(most):
        mask = None if seen is None else seen[:, : width + step]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            use_cache=True,
            logits_to_keep=1,
            **{name: cache},
        ).logits[:, -1]
        if not step and not bool(torch.isfinite(logits).all()):
            raise NotFiniteError(
                "The model's output contains NaN or infinity, so it writes nothing sensible.",
                "Use --dtype float32, or check that the checkpoint is intact.",
            )
        chosen = pick(logits, rows)
        left = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if token in ends:
                why[row] = "end"
                continue
            found[row].append(token)
            reason = stop(row, found[row]) if stop else ""
            if reason:
                why[row] = reason
            else:
                left.append(place)
        on_token()
        if not left:
            break
        ids, places = chosen[:, None], places[:, -1:] + 1
        if len(left) < len(rows):
            kept = torch.tensor(left, device=device)
            cache.batch_select_indices(kept)
            ids, places = ids[kept], places[kept]
            seen = None if seen is None else seen[kept]
            rows = [rows[place] for place in left]
    return [Written(tuple(new), reason) for new, reason in zip(found, why, strict=True)]
