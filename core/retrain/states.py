"""What enters the first trained block, computed once for every row and kept on disk.

Partial fine-tuning changes nothing below its first trained block, so a row brings the same states
there in every epoch: with them, an epoch costs only the blocks above.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint.locate import Checkpoint
from core.retrain import row_cache
from core.retrain.batches import Pack
from core.retrain.loss import autocast, eval_mode, parts
from core.retrain.rows import Row
from core.runs.progress import Progress

VERSION = 1
KIND = row_cache.Kind(
    "The states below the first trained block",
    ("states",),
    lambda row: len(row.ids),
    "compute them at every step (--keep-states off)",
)


@dataclass(frozen=True)
class Below:
    """The states of all rows that a training reads."""

    cache: row_cache.Cache
    first: int
    """The first trained block."""

    def of(self, batch: Sequence[Pack]) -> dict[str, Any]:
        """Return the states of a micro-batch [sequences, tokens, hidden], padded with zeros."""
        lines = [torch.cat([self.cache.row(row)["states"] for row in pack]) for pack in batch]
        return {"states": nn.utils.rnn.pad_sequence(lines, batch_first=True), "first": self.first}


def key_of(checkpoint: Checkpoint, rows: Sequence[Row], first: int, about: Sequence[str]) -> str:
    """Return the name of the cache; ``about``: the formats, and which layers compute."""
    named = {"version": VERSION, "first": first, "about": list(about)}
    return row_cache.key_of(checkpoint.info, checkpoint.config, rows, named)


def find(folder: Path, rows: Sequence[Row], first: int) -> Below | None:
    """Return the states in ``folder``, None if they are missing, incomplete or damaged."""
    cache = row_cache.find(folder, rows, KIND)
    return Below(cache, first) if cache else None


def write(
    folder: Path,
    model: Any,
    rows: Sequence[Row],
    first: int,
    need: int,
    how: tuple[torch.device, torch.dtype | None],
    progress: Progress,
) -> Below:
    """Run the blocks below ``first`` over the rows, and keep what they give in ``folder``.

    ``need`` is the bytes it takes; ``how``: the device, and the precision of autocast.

    Raises:
        OutputError: the disk has no room for it, or it cannot be written.
    """
    distinct = list(dict.fromkeys(rows))
    device, compute = how

    def made() -> Iterator[tuple[int, tuple[Tensor]]]:
        with eval_mode([model]), _only_below(model.model, first):
            for chosen, _, batch in parts(distinct, device, progress):
                with autocast(device, compute):
                    states = model.model(input_ids=batch["input_ids"], use_cache=False)[0].cpu()
                for number, row in zip(chosen, states, strict=True):
                    yield number, (row[: len(distinct[number].ids)].clone(),)

    doing = "the blocks below the trained ones read the rows"
    return Below(row_cache.write(folder, rows, KIND, need, made(), progress, doing), first)


@contextlib.contextmanager
def _only_below(base: Any, first: int) -> Iterator[None]:
    """Make a model of transformers return what enters block ``first``."""
    layers, norm = base.layers, base.norm
    base.layers, base.norm = layers[:first], nn.Identity()
    try:
        yield
    finally:
        base.layers, base.norm = layers, norm
