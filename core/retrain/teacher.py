"""The dense model's next-token distributions on the training rows, computed once and kept on disk.

For every predicted token the k likeliest next tokens, their log-probabilities and the log of the
remaining probability are kept, so training costs no second model (Minitron, arXiv 2407.14679; here
only the likeliest tokens). A cache is a folder of the workspace named after what it depends on (the
dense model's weights and config, the rows, k, the precision), so all runs on the same rows share
it and none is used for others. It gets that name once it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint.locate import Checkpoint
from core.errors import OutputError
from core.retrain import caches
from core.retrain.batches import Pack
from core.retrain.loss import nll_by_row, predictions
from core.retrain.recovery import Held
from core.retrain.rows import Row
from core.runs import processes
from core.runs.progress import SILENT, Progress
from core.runs.workspace import read_json, write_json

HELD_K = 128
"""Tokens kept of the dense model's distributions on held-out rows: 39 MB for 200 rows of 256."""
LOGITS = 2**25
"""Logits of which copies are made at once: 128 MiB in float32. Chosen, not measured."""
PART_BYTES = 2**25
"""Size of a file of the cache, and of what is held in memory while it is written: 32 MiB."""
VERSION = 1
NAMES = ("teacher_ids", "teacher_logp", "teacher_rest")
"""Likeliest tokens [predicted, k], their log-probabilities [predicted, k], the rest [predicted]."""
SMALLEST = 1e-7
"""Least probability outside the kept tokens: what float32 can tell from 0."""

Place = tuple[int, int, int]
"""Number of the file, first entry and number of entries of a row."""


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
    """What is kept of each row."""

    def measure(
        self,
        model: Any,
        device: torch.device,
        compute: torch.dtype | None = None,
        progress: Progress = SILENT,
    ) -> Held:
        """Return loss and divergence of ``model`` on these rows, in one pass."""
        nll, kl = [0.0] * len(self.rows), 0.0
        items = [row.items for row in self.rows]
        for chosen, logits, targets in predictions(model, self.rows, device, compute, progress):
            for i, loss in zip(
                chosen, nll_by_row(logits, targets, [items[i] for i in chosen]), strict=True
            ):
                nll[i] = loss
            if self.kept:
                parts = zip(*(self.kept[i] for i in chosen), strict=True)
                kl += float(kl_kept(logits, *(torch.cat(part).to(device) for part in parts)))
        return Held(sum(nll) / sum(items), kl / sum(items) if self.kept else None)


def yardstick(
    dense: Any,
    rows: Sequence[Row],
    device: torch.device,
    compute: torch.dtype | None = None,
    progress: Progress = SILENT,
) -> Yardstick:
    """Return what the dense model says on the held-out rows."""
    kept: list[tuple[Tensor, ...]] = [()] * len(rows)
    losses, items = [0.0] * len(rows), [row.items for row in rows]
    for chosen, logits, targets in predictions(dense, rows, device, compute, progress):
        found = nll_by_row(logits, targets, [items[i] for i in chosen])
        for loss, (number, pieces) in zip(
            found, _by_row(rows, chosen, logits, HELD_K), strict=True
        ):
            losses[number], kept[number] = loss, pieces
    return Yardstick(rows, sum(losses) / sum(items), kept)


def key_of(dense: Checkpoint, rows: Sequence[Row], k: int, dtype: str) -> str:
    """Return the name of the cache: a hash of everything that it depends on."""
    digest = hashlib.sha256()
    config = {
        name: value
        for name, value in dense.config.items()
        if name not in ("transformers_version", "_name_or_path")
    }
    about = {"version": VERSION, "weights": dense.info.key, "k": k, "dtype": dtype}
    digest.update(json.dumps({**about, "config": config}, sort_keys=True, default=str).encode())
    for row in rows:
        for part in (row.ids, row.labels):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(array("q", part).tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Cache:
    """A complete cache, read a micro-batch at a time."""

    rows: dict[Row, Place]
    parts: Sequence[Any]
    """The open files: they can be read even if the cache is deleted meanwhile."""

    def of(self, batch: Sequence[Pack]) -> dict[str, Tensor]:
        """Return what was kept of the rows of a micro-batch, in the order of its predictions."""
        found = [self._read(self.rows[row]) for pack in batch for row in pack]
        return {name: torch.cat([one[name] for one in found]) for name in NAMES}

    def _read(self, place: Place) -> dict[str, Tensor]:
        part, start, count = place
        return {name: self.parts[part].get_slice(name)[start : start + count] for name in NAMES}


def find(folder: Path, rows: Sequence[Row]) -> Cache | None:
    """Return the cache in ``folder``, None if it is missing, incomplete or damaged."""
    marker = read_json(folder / caches.COMPLETE) or {}
    distinct = list(dict.fromkeys(rows))
    try:
        places = [(int(part), int(start), int(count)) for part, start, count in marker["places"]]
        files = [folder / _part(number) for number in range(len(marker["bytes"]))]
        whole = [file.stat().st_size for file in files] == marker["bytes"]
        if not whole or [count for *_, count in places] != [row.items for row in distinct]:
            return None
        parts = [safe_open(file, "pt") for file in files]
    except (KeyError, TypeError, ValueError, OSError, SafetensorError):
        return None
    found = dict(zip(distinct, places, strict=True))
    return Cache(found, parts)


def write(
    folder: Path,
    model: Any,
    rows: Sequence[Row],
    k: int,
    how: tuple[torch.device, torch.dtype | None],
    progress: Progress,
) -> Cache:
    """Run ``model`` over the rows and keep what it predicts in ``folder``.

    ``how``: the device, and the precision of autocast (None: that of the weights).

    Raises:
        OutputError: the disk has no room for it, or it cannot be written.
    """
    device, compute = how
    distinct = list(dict.fromkeys(rows))
    need = caches.needed_bytes(sum(row.items for row in distinct), k)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    _clean(folder.parent)
    try:
        draft.mkdir(parents=True)
        free = shutil.disk_usage(draft).free
        if free < need:
            raise OutputError(
                f"The dense model's distributions take {need / 2**20:,.0f} MiB, but "
                f"{folder.parent} has {free / 2**20:,.0f} MiB free.",
                "Free space there, train on fewer rows, or keep fewer tokens (--teacher-top-k).",
            )
        writer = _Writer(draft, len(distinct))
        done = 0
        for chosen, logits, _ in predictions(model, distinct, device, compute, progress):
            for number, pieces in _by_row(distinct, chosen, logits, k):
                writer.add(number, pieces)
            done += len(chosen)
            progress.step(done, len(distinct), "the dense model reads the training rows")
        writer.finish()
        try:
            draft.rename(folder)
        except OSError:  # another run was first, or an unusable one is in the way
            if not find(folder, rows):
                shutil.rmtree(folder, ignore_errors=True)
                draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    found = find(folder, rows)
    if found is None:
        raise OutputError(f"{folder} cannot be read back.", "Check that disk, then start again.")
    return found


class _Writer:
    """Collects rows and writes a file whenever `PART_BYTES` have come together."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.places: list[Place] = [(0, 0, 0)] * rows
        self.sizes: list[int] = []
        self.held: list[Sequence[Tensor]] = []
        self.entries = self.bytes = 0

    def add(self, number: int, pieces: Sequence[Tensor]) -> None:
        """Keep what was predicted in row ``number``."""
        count = len(pieces[0])
        self.places[number] = (len(self.sizes), self.entries, count)
        self.held.append(pieces)
        self.entries += count
        self.bytes += sum(piece.nbytes for piece in pieces)
        if self.bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has come together."""
        if not self.held:
            return
        parts = zip(*self.held, strict=True)
        tensors = {name: torch.cat(part) for name, part in zip(NAMES, parts, strict=True)}
        file = self.folder / _part(len(self.sizes))
        save_file(tensors, file)
        self.sizes.append(file.stat().st_size)
        self.held, self.entries, self.bytes = [], 0, 0

    def finish(self) -> None:
        """Write the rest, and the marker that makes the cache one."""
        self.flush()
        write_json(self.folder / caches.COMPLETE, {"places": self.places, "bytes": self.sizes})


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _clean(folder: Path) -> None:
    """Delete what processes that no longer run left unfinished."""
    for draft in folder.glob("*.*") if folder.is_dir() else ():
        owner = draft.suffix[1:]
        if owner.isdecimal() and processes.start_time(int(owner)) is None:
            shutil.rmtree(draft, ignore_errors=True)


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
