"""Tensors with an entry for each token, computed once for every row and kept on disk.

A cache is a folder of the workspace named after what it depends on. It gets that name once it is
complete: a killed process leaves only a draft under another name, which the next one deletes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint.headers import CheckpointInfo
from core.errors import OutputError
from core.retrain import caches
from core.retrain.batches import Pack
from core.retrain.rows import Row
from core.runs import processes
from core.runs.progress import Progress
from core.runs.workspace import read_json, write_json

PART_BYTES = 2**25
"""Size of a file of the cache, and of what is held in memory while it is written: 32 MiB."""

Place = tuple[int, int, int]
"""Number of the file, first entry and number of entries of a row."""


@dataclass(frozen=True)
class Kind:
    """What a cache holds."""

    title: str
    """What it is, in messages."""
    names: tuple[str, ...]
    """Of its tensors."""
    count: Callable[[Row], int]
    """Entries of a row."""
    hint: str
    """How it can be made smaller, in messages."""


@dataclass(frozen=True)
class Cache:
    """A complete cache, read a micro-batch at a time."""

    kind: Kind
    rows: dict[Row, Place]
    parts: Sequence[Any]
    """The open files: they can be read even if the cache is deleted meanwhile."""

    def of(self, batch: Sequence[Pack]) -> dict[str, Tensor]:
        """Return what was kept of the rows of a micro-batch, one after another."""
        found = [self.row(row) for pack in batch for row in pack]
        return {name: torch.cat([one[name] for one in found]) for name in self.kind.names}

    def row(self, row: Row) -> dict[str, Tensor]:
        """Return what was kept of one row."""
        part, start, count = self.rows[row]
        found = self.parts[part]
        return {name: found.get_slice(name)[start : start + count] for name in self.kind.names}


def key_of(
    info: CheckpointInfo, config: Mapping[str, Any], rows: Iterable[Row], about: Mapping[str, Any]
) -> str:
    """Return the name of a cache: a hash of the model, the rows and ``about``."""
    digest = hashlib.sha256()
    known = {
        name: value
        for name, value in config.items()
        if name not in ("transformers_version", "_name_or_path")
    }
    whole = {**about, "weights": info.key, "config": known}
    digest.update(json.dumps(whole, sort_keys=True, default=str).encode())
    for row in rows:
        for part in (row.ids, row.labels):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(array("q", part).tobytes())
    return digest.hexdigest()[:32]


def find(folder: Path, rows: Sequence[Row], kind: Kind) -> Cache | None:
    """Return the cache in ``folder``, None if it is missing, incomplete or damaged."""
    marker = read_json(folder / caches.COMPLETE) or {}
    distinct = list(dict.fromkeys(rows))
    try:
        places = [(int(part), int(start), int(count)) for part, start, count in marker["places"]]
        files = [folder / _part(number) for number in range(len(marker["bytes"]))]
        whole = [file.stat().st_size for file in files] == marker["bytes"]
        if not whole or [count for *_, count in places] != [kind.count(row) for row in distinct]:
            return None
        parts = [safe_open(file, "pt") for file in files]
    except (KeyError, TypeError, ValueError, OSError, SafetensorError):
        return None
    return Cache(kind, dict(zip(distinct, places, strict=True)), parts)


def write(
    folder: Path,
    rows: Sequence[Row],
    kind: Kind,
    need: int,
    made: Iterable[tuple[int, Sequence[Tensor]]],
    progress: Progress,
    doing: str,
) -> Cache:
    """Keep what ``made`` yields in ``folder``: the number of each distinct row and its tensors.

    ``need`` is the bytes that it will take, ``doing`` what is going on meanwhile.

    Raises:
        OutputError: the disk has no room for it, or it cannot be written.
    """
    distinct = list(dict.fromkeys(rows))
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    _clean(folder.parent)
    try:
        draft.mkdir(parents=True)
        free = shutil.disk_usage(draft).free
        if free < need:
            raise OutputError(
                f"{kind.title} take {need / 2**20:,.0f} MiB, but {folder.parent} has "
                f"{free / 2**20:,.0f} MiB free.",
                f"Free up disk space there, train on fewer rows, or {kind.hint}.",
            )
        writer = _Writer(draft, kind, len(distinct))
        for done, (number, pieces) in enumerate(made, 1):
            writer.add(number, pieces)
            progress.step(done, len(distinct), doing)
        writer.finish()
        try:
            draft.rename(folder)
        except OSError:  # another run was first, or an unusable one is in the way
            if not find(folder, rows, kind):
                shutil.rmtree(folder, ignore_errors=True)
                draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    found = find(folder, rows, kind)
    if found is None:
        raise OutputError(f"{folder} cannot be read back.", "Check that disk, then start again.")
    return found


class _Writer:
    """Collects rows and writes a file whenever `PART_BYTES` have come together."""

    def __init__(self, folder: Path, kind: Kind, rows: int) -> None:
        self.folder, self.kind = folder, kind
        self.places: list[Place] = [(0, 0, 0)] * rows
        self.sizes: list[int] = []
        self.held: list[Sequence[Tensor]] = []
        self.entries = self.bytes = 0

    def add(self, number: int, pieces: Sequence[Tensor]) -> None:
        """Keep the tensors of row ``number``."""
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
        tensors = {name: torch.cat(part) for name, part in zip(self.kind.names, parts, strict=True)}
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
