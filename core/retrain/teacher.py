"""The dense model's next-token distributions on the training rows, computed once and kept on disk.

For every predicted token the k likeliest next tokens, their log-probabilities and the log of the
remaining probability are kept, so training costs no second model (Minitron, arXiv 2407.14679; here
only the likeliest tokens). A cache (`core.retrain.row_cache`) is named after what it depends on
(the dense model's weights and config, the rows, k, the precision), so all runs on the same rows
share it and none is used for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.locate import Checkpoint
from core.retrain import caches, row_cache
from core.retrain.loss import nll_by_row, predictions
from core.retrain.recovery import Held
from core.retrain.rows import Row
from core.runs.progress import SILENT, Progress
from core.runs.ranks import ALONE, Ranks

HELD_K = 128
"""Tokens kept of the dense model's distributions on held-out rows: 39 MB for 200 rows of 256."""
LOGITS = 2**25
"""Logits of which copies are made at once: 128 MiB in float32. Chosen, not measured."""
VERSION = 2
NAMES = ("teacher_ids", "teacher_logp", "teacher_rest")
"""Likeliest tokens [predicted, k], their log-probabilities [predicted, k], the rest [predicted]."""
SMALLEST = 1e-7
"""Least probability outside the kept tokens: what float32 can tell from 0."""

KIND = row_cache.Kind(
    "The dense model's distributions",
    NAMES,
    lambda row: row.items,
    "keep fewer tokens (--teacher-top-k)",
)


def kl_kept(logits: Tensor, ids: Tensor, logp: Tensor, rest: Tensor) -> Tensor:
    """Return KL(teacher || model) over the kept tokens and the rest as one, summed, in nats.

    It is at most the KL of the whole distributions, and equals it if all tokens are kept.

    Args:
        logits: of the model, float32 [predicted, vocabulary].
        ids: likeliest next tokens of the teacher [predicted, k].
        logp: their log-probabilities [predicted, k]; of any precision.
        rest: log of the probability of all other tokens [predicted].
    """
    logp, rest = logp.float(), rest.float()
    total = torch.logsumexp(torch.cat([logp, rest[:, None]], dim=1), dim=1)  # rounded: not quite 0
    logp, rest = logp - total[:, None], rest - total
    kept = logits.gather(1, ids.long()) - logits.logsumexp(1, keepdim=True)
    outside = (1.0 - kept.exp().sum(1)).clamp_min(SMALLEST).log()
    known = (logp.exp() * (logp - kept)).sum()
    if ids.shape[1] == logits.shape[1]:
        return known
    return known + (rest.exp() * (rest - outside)).sum()


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k likeliest tokens, their log-probabilities and the log of the rest.

    ``logits`` are float32 [tokens, vocabulary]; the results are int32, float16 and float16.
    """
    logp = logits.log_softmax(1)
    top = logp.topk(min(k, logp.shape[1]), dim=1)
    others = logp.scatter(1, top.indices, -torch.inf).logsumexp(1)
    smallest = torch.finfo(torch.float16).min
    return (
        top.indices.to(torch.int32),
        top.values.clamp_min(smallest).half(),
        others.clamp_min(smallest).half(),
    )


def _by_row(
    rows: Sequence[Row], chosen: Sequence[int], logits: Tensor, k: int
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield the number of each row of a batch and what is kept of it, on the CPU."""
    if not chosen:
        return
    size = max(1, LOGITS // logits.shape[1])
    parts = zip(*(largest(piece, k) for piece in logits.split(size)), strict=True)
    counts = [rows[i].items for i in chosen]
    kept = [torch.cat(part).cpu().split(counts) for part in parts]
    yield from zip(chosen, zip(*kept, strict=True), strict=True)


@dataclass(frozen=True)
class Yardstick:
    """The dense model on the held-out rows: what every model of a retraining is compared with."""

    rows: Sequence[Row]
    loss: float | None = None
    """In nats per token; None without a dense model."""
    kept: Sequence[tuple[Tensor, ...]] = ()
    """What is kept of each row; only of those that this process takes, if several share them."""

    def measure(
        self,
        model: Any,
        device: torch.device,
        compute: torch.dtype | None = None,
        progress: Progress = SILENT,
        below: Any = None,
        ranks: Ranks = ALONE,
    ) -> Held:
        """Return loss and divergence of ``model`` on these rows, in one pass.

        ``below`` and ``ranks``: as for `core.retrain.loss.predictions`.
        """
        own: list[tuple[dict[int, float], float]] = []
        items = [row.items for row in self.rows]
        how = device, compute, progress, below, ranks
        for chosen, logits, targets in predictions(model, self.rows, *how):
            if not chosen:
                continue
            losses = nll_by_row(logits, targets, [items[i] for i in chosen])
            kl = 0.0
            if self.kept:
                parts = zip(*(self.kept[i] for i in chosen), strict=True)
                kl = float(kl_kept(logits, *(torch.cat(part).to(device) for part in parts)))
            own.append((dict(zip(chosen, losses, strict=True)), kl))
        found = ranks.in_turns(own)  # so that sums are those of one process, to the last bit
        nll = {i: loss for losses, _ in found for i, loss in losses.items()}
        total = sum(nll[i] for i in range(len(items)))
        divergence = sum(kl for _, kl in found) / sum(items)
        return Held(total / sum(items), divergence if self.kept else None)


def yardstick(
    dense: Any,
    rows: Sequence[Row],
    device: torch.device,
    compute: torch.dtype | None = None,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> Yardstick:
    """Return what the dense model says on the held-out rows, which ``ranks`` share."""
    kept: list[tuple[Tensor, ...]] = [()] * len(rows)
    own: dict[int, float] = {}
    items = [row.items for row in rows]
    for chosen, logits, targets in predictions(dense, rows, device, compute, progress, None, ranks):
        losses = nll_by_row(logits, targets, [items[i] for i in chosen])
        own |= dict(zip(chosen, losses, strict=True))
        for number, pieces in _by_row(rows, chosen, logits, HELD_K):
            kept[number] = pieces
    found = {i: loss for part in ranks.gather(own) for i, loss in part.items()}
    return Yardstick(rows, sum(found[i] for i in range(len(rows))) / sum(items), kept)


def key_of(dense: Checkpoint, rows: Sequence[Row], k: int, dtype: str) -> str:
    """Return the name of the cache: a hash of everything that it depends on."""
    about = {"version": VERSION, "k": k, "dtype": dtype}
    return row_cache.key_of(dense.info, dense.config, rows, about)


def find(folder: Path, rows: Sequence[Row]) -> row_cache.Cache | None:
    """Return the cache in ``folder``, None if it is missing, incomplete or damaged."""
    return row_cache.find(folder, rows, KIND)


def write(
    folder: Path,
    model: Any,
    rows: Sequence[Row],
    k: int,
    how: tuple[torch.device, torch.dtype | None],
    progress: Progress,
    ranks: Ranks = ALONE,
) -> row_cache.Cache | None:
    """Run ``model`` over the rows and keep what it predicts in ``folder``.

    ``how``: the device, and the precision of autocast (None: that of the weights). ``ranks`` share
    the rows; the first process writes, and only it returns something.

    Raises:
        OutputError: the disk has no room for it, or it cannot be written.
    """
    distinct = list(dict.fromkeys(rows))
    need = caches.needed_bytes(sum(row.items for row in distinct), k)

    def made() -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        for chosen, logits, _ in predictions(model, distinct, *how, progress, None, ranks):
            for part in ranks.gather(list(_by_row(distinct, chosen, logits, k))):
                yield from part

    if not ranks.is_first:
        for _ in made():
            pass
        return None
    doing = "the dense model reads the training rows"
    return row_cache.write(folder, rows, KIND, need, made(), progress, doing)


def read_ahead(make: Callable[[int], Any], count: int) -> Callable[[int], Any]:
    """Return ``make`` with the next result made in a background thread while one is used."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    waiting: dict[int, Future[Any]] = {}

    def get(number: int) -> Any:
        future = waiting.pop(number, None)
        waiting.clear()
        if number + 1 < count:
            waiting[number + 1] = pool.submit(make, number + 1)
        return future.result() if future else make(number)

    return get
