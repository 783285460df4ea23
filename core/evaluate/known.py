"""A cache of measured results, keyed by content, protocol and versions.

A key is a hash of everything that a number depends on: the checkpoint's content, the exact token
windows or the task's files, limit and shots, precision, kind of device, and library versions.
Equal keys mean the same result, so it is reused from the earlier run. No torch here.

The checkpoint's content is its tensors, its configuration and its tokenizer. Up to `FULL_BYTES` of
weights, every byte is hashed; beyond that, names, dtypes, shapes and three samples of 1 KiB per
tensor (`core.checkpoint.tensors.content_key`), because hashing 13 GB takes longer than evaluating
the model. Training changes every element of the tensors it updates, so the samples detect it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from core import __version__
from core.checkpoint.headers import (
    TOKENIZER_FILES,
    TensorIndex,
    content_key,
    file_state,
    read_config,
)
from core.evaluate.results import Entry, Summary
from core.runs import workspace
from core.runs.results import from_dict
from core.runs.workspace import RunRecord, Workspace

Kind = TypeVar("Kind")

FULL_BYTES = 2**30
ANSWERS = "answers"
"""Folder in a run's bookkeeping for the results so far, with one file per key."""
LIBRARIES = ("torch", "transformers", "tokenizers")
ALSO_READ = ("config.json", "tokenizer_config.json", "special_tokens_map.json", *TOKENIZER_FILES)


def versions(*more: str) -> dict[str, str]:
    """Return the versions of this project and of the libraries that affect a result."""
    found = {name: importlib.metadata.version(name) for name in (*LIBRARIES, *more)}
    return {"depthcut": __version__, **found}


def digest(value: Any) -> str:
    """Return a hash of plain JSON values as 32 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def checkpoint_content(folder: Path) -> str:
    """Return a hash of a checkpoint's content; cached until a file changes."""
    return _content(folder, file_state(folder, (".json", ".safetensors", ".model")))


@functools.lru_cache(maxsize=4096)
def _content(folder: Path, _: object) -> str:
    index = TensorIndex.read(folder)
    small = sum(entry.end - entry.start for entry in index.entries.values()) <= FULL_BYTES
    parts = [content_key(folder, index, full=small)]
    for name in ALSO_READ:
        path = folder / name
        if path.is_file():
            parts += [name, hashlib.sha256(_comparable(path)).hexdigest()]
    return digest(parts)


def _comparable(path: Path) -> bytes:
    """Return a file's bytes; config.json without the fields that the saving library adds."""
    content = path.read_bytes()
    if path.name != "config.json":
        return content
    config = read_config(path)
    skip = ("transformers_version", "_name_or_path")
    return json.dumps({k: v for k, v in config.items() if k not in skip}, sort_keys=True).encode()


def windows_content(windows: Iterable[Iterable[int]]) -> str:
    """Return a hash of the exact token windows that were evaluated."""
    state = hashlib.sha256()
    for window in windows:
        state.update((",".join(map(str, window)) + "\n").encode())
    return state.hexdigest()[:32]


def put_aside(book: Path, key: str, value: dict[str, Any]) -> None:
    """Keep a result under ``key`` in a run's bookkeeping, in case the run does not finish."""
    workspace.write_json(_aside(book, key), value)


def _aside(book: Path, key: str) -> Path:
    return book / ANSWERS / f"{key}.json"


def clear_aside(book: Path) -> None:
    """Delete what was put aside; the run's results contain all of it."""
    shutil.rmtree(book / ANSWERS, ignore_errors=True)


class Earlier:
    """Earlier results of a workspace, found by key: complete, or parts of unfinished runs."""

    def __init__(self, where: Workspace | None = None) -> None:
        """Read the summaries of all finished runs; for equal keys, the newest wins."""
        self._found: dict[str, tuple[RunRecord, Entry]] = {}
        self._others: list[RunRecord] = []
        for record in (where or Workspace()).runs("evaluate"):
            if record.state != "done":
                self._others.append(record)
            elif summary := Summary.read(record.path):
                for entry in summary.entries:
                    self._found.setdefault(entry.key, (record, entry))

    def find(self, key: str, kind: type[Kind]) -> tuple[RunRecord, Kind] | None:
        """Return the run and the entry of its summary with this key, or None."""
        record, entry = self._found.get(key) or (None, None)
        return (record, entry) if record and isinstance(entry, kind) else None

    def aside(self, key: str, kind: type[Kind]) -> tuple[RunRecord, Kind] | None:
        """Return an unfinished run and the result it put aside under this key, or None."""
        for record in self._others:
            values = workspace.read_json(_aside(record.path / workspace.BOOKKEEPING, key))
            if values and (found := from_dict(kind, values)):
                return record, found
        return None

    def has(self, key: str) -> bool:
        """Whether a result exists under this key; results put aside are not read for this."""
        books = (record.path / workspace.BOOKKEEPING for record in self._others)
        return key in self._found or any(_aside(book, key).is_file() for book in books)
