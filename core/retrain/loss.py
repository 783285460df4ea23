"""Losses on token rows: batches, logits of predicted tokens only, KL divergence, held-out loss.

The output head is applied to predicted positions only; if the loss covers responses only, this
saves most of the memory and time of the logits. Rows are padded on the right. With causal attention
padding does not affect the tokens before it, so no padding mask is needed. Packed rows are
separated by ``position_ids`` that start again at 0: transformers derives the block-diagonal mask
from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from core.retrain import sharded
from core.retrain.batches import Pack
from core.retrain.rows import IGNORED, Row
from core.runs.progress import SILENT, Progress
from core.runs.ranks import ALONE, Ranks

TOKENS_AT_ONCE = 4096
"""Padded tokens in a batch of an evaluation."""


def collate(batch: Sequence[Pack]) -> dict[str, Any]:
    """Return ids and labels [sequences, tokens], position ids if packed, and the token count."""
    lengths = [sum(len(row.ids) for row in rows) for rows in batch]
    parts = zip(*(_line(rows, max(lengths)) for rows in batch), strict=True)
    names = ("input_ids", "labels", "position_ids")
    result: dict[str, Any] = {n: torch.tensor(part) for n, part in zip(names, parts, strict=True)}
    if all(len(rows) == 1 for rows in batch):
        del result["position_ids"]
    return result | {"tokens": sum(lengths)}


def _line(rows: Pack, width: int) -> tuple[list[int], list[int], list[int]]:
    """Return the ids, labels and positions of one sequence, padded to ``width`` tokens."""
    ids = [id_ for row in rows for id_ in row.ids]
    labels = [label for row in rows for label in row.labels]
    room = width - len(ids)
    positions = [at for row in rows for at in range(len(row.ids))]
    return ids + [0] * room, labels + [IGNORED] * room, [*positions, *range(room)]


def autocast(device: torch.device, compute: torch.dtype | None, model: Any = None) -> Any:
    """Return the autocast context; with None, computation is in the weights' own precision.

    Converted weights of a ``model`` that is split are not kept until the context ends.
    """
    if compute is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute, cache_enabled=not sharded.is_split(model))


def causal_of(model: Any) -> Any:
    """Return the model of transformers, without the wrapper of peft."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def predicted_logits(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return float32 logits [predicted tokens, vocabulary] and their targets."""
    states, targets = predicted_states(model, batch)
    return causal_of(model).lm_head(states).float(), targets


def predicted_states(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return what the output matrix is applied to [predicted tokens, size], and the targets.

    If the batch has ``states``, the blocks below its ``first`` have computed them already.
    """
    base = causal_of(model).model
    positions = batch.get("position_ids")
    extra = {} if positions is None else {"position_ids": positions}
    # With a cache, transformers does not separate packed rows.
    if "states" in batch:
        with _from_block(base, batch["first"]):
            hidden = base(inputs_embeds=batch["states"], use_cache=False, **extra)[0]
    else:
        hidden = base(input_ids=batch["input_ids"], use_cache=False, **extra)[0]
    targets = batch["labels"][:, 1:]
    where = targets != IGNORED
    return hidden[:, :-1][where], targets[where]


@contextlib.contextmanager
def _from_block(base: Any, first: int) -> Iterator[None]:
    """Let a model of transformers begin with block ``first``."""
    layers = base.layers
    base.layers = layers[first:]
    try:
        yield
    finally:
        base.layers = layers


def kl_sum(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of next-token distributions, summed over tokens, in nats."""
    return functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
    )


@contextlib.contextmanager
def eval_mode(models: Sequence[Any]) -> Iterator[None]:
    """Put ``models`` in eval mode without gradients, and restore their mode afterwards."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on ``device``."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def batches_of(rows: Sequence[Row]) -> list[list[int]]:
    """Return the row numbers of each batch of an evaluation, rows of similar length together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found = []
    while order:
        count = max(1, TOKENS_AT_ONCE // len(rows[order[-1]].ids))
        found.append(order[-count:])
        order = order[:-count]
    return found


def parts(
    rows: Sequence[Row], device: torch.device, progress: Progress, ranks: Ranks = ALONE
) -> Iterator[tuple[list[int], bool, dict[str, Any]]]:
    """Yield row numbers, whether they count, and their batch on ``device``.

    The processes take batches in turns. A split model needs all of them to compute equally often:
    one that has no batch left takes a row that does not count.
    """
    made = batches_of(rows)
    for turn in range(0, len(made), ranks.size):
        counts = turn + ranks.rank < len(made)
        chosen = made[turn + ranks.rank] if counts else made[-1][:1]
        yield chosen, counts, moved(collate([(rows[i],) for i in chosen]), device)
        progress.check_cancel()


def predictions(
    model: Any,
    rows: Sequence[Row],
    device: torch.device,
    compute: torch.dtype | None = None,
    progress: Progress = SILENT,
    below: Any = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield row numbers, float32 logits [predicted, vocabulary] and targets, in eval mode.

    Of several processes, each yields equally often, for batches of its own; no row numbers mean
    that what comes with them does not count.

    ``below``: what is kept of the rows for the blocks that train (`core.retrain.states.Below`).
    """
    with eval_mode([model]):
        for chosen, counts, batch in parts(rows, device, progress, ranks):
            if below:
                batch |= moved(below.of([(rows[i],) for i in chosen]), device)
            yield chosen if counts else [], *_predicted(model, batch, device, compute)


def _predicted(
    model: Any, batch: dict[str, Any], device: torch.device, compute: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return `predicted_logits`, of which only the model's part is in the precision ``compute``."""
    with autocast(device, compute, model):
        return sharded.within(model, partial(predicted_logits, model, batch))


def row_losses(
    model: Any,
    rows: Sequence[Row],
    device: torch.device,
    compute: torch.dtype | None = None,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> list[tuple[float, int]]:
    """Return (sum of NLL in nats, predicted tokens) of each row, computed in eval mode.

    ``ranks``: the processes that share the rows; each has the whole result.
    """
    own: dict[int, tuple[float, int]] = {}
    for chosen, logits, targets in predictions(model, rows, device, compute, progress, None, ranks):
        items = [rows[i].items for i in chosen]
        losses = nll_by_row(logits, targets, items)
        own |= dict(zip(chosen, zip(losses, items, strict=True), strict=True))
    found = {i: one for part in ranks.gather(own) for i, one in part.items()}
    return [found[i] for i in range(len(rows))]


def nll_by_row(logits: Tensor, targets: Tensor, items: Sequence[int]) -> list[float]:
    """Return the sum of the NLL in nats of each row, which has ``items`` predicted tokens."""
    if not items:
        return []
    nll = functional.cross_entropy(logits, targets, reduction="none").cpu().double()
    return [float(part.sum()) for part in nll.split(list(items))]


def heldout_loss(model: Any, rows: Sequence[Row], *how: Any) -> float:
    """Return the mean loss in nats per predicted token of all rows; ``how``: see `row_losses`."""
    losses = row_losses(model, rows, *how)
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def mean_kl(
    model: Any,
    teacher: Any,
    rows: Sequence[Row],
    device: torch.device,
    compute: torch.dtype | None = None,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> float:
    """Return the mean KL(teacher || model) in nats over the predicted tokens of all rows."""
    own = []
    with eval_mode([model, teacher]):
        for _, counts, batch in parts(rows, device, progress, ranks):
            logits, targets = _predicted(model, batch, device, compute)
            other, _ = _predicted(teacher, batch, device, compute)
            if counts:
                own.append((float(kl_sum(logits, other)), len(targets)))
    found = ranks.in_turns(own)
    return sum(kl for kl, _ in found) / sum(count for _, count in found)
