"""What has been measured already: results keyed by content, protocol and versions.

A key is a hash of everything that a number depends on: the checkpoint's content, the exact token
windows or the task's files, limit and shots, precision, kind of device, and library versions.
Equal keys mean the same result, so it is taken from the earlier run. No torch here.

The checkpoint's content is its tensors, its configuration and its tokenizer. Up to `FULL_BYTES` of
weights every byte counts; beyond that names, dtypes, shapes and three samples of 1 KiB a tensor
(`core.checkpoint.tensors.content_key`), because hashing 13 GB takes longer than evaluating them.
Training moves every element of the tensors it touches, so samples see it.
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
from core.checkpoint.headers import TOKENIZER_FILES, TensorIndex, content_key, file_state
from core.evaluate.results import Entry, Summary
from core.runs import workspace
from core.runs.results import from_dict
from core.runs.workspace import RunRecord, Workspace

Kind = TypeVar("Kind")

FULL_BYTES = 2**30
ANSWERS = "answers"
"""Folder of a run's bookkeeping with what it has measured so far, a file for each key."""
LIBRARIES = ("torch", "transformers", "tokenizers")
ALSO_READ = ("config.json", "tokenizer_config.json", "special_tokens_map.json", *TOKENIZER_FILES)


def versions(*more: str) -> dict[str, str]:
    """Return the versions of this project and of the libraries that a result depends on."""
    found = {name: importlib.metadata.version(name) for name in (*LIBRARIES, *more)}
    return {"depthcut": __version__, **found}


def digest(value: Any) -> str:
    """Return 32 hex digits for plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def checkpoint_content(folder: Path) -> str:
    """Return what identifies a checkpoint's content; remembered until a file changes."""
    return _content(folder, file_state(folder, (".json", ".safetensors", ".model")))


@functools.lru_cache(maxsize=64)
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
    """Return a file's bytes; of config.json without what the writing library puts in."""
    content = path.read_bytes()
    if path.name != "config.json":
        return content
    config = json.loads(content)
    skip = ("transformers_version", "_name_or_path")
    return json.dumps({k: v for k, v in config.items() if k not in skip}, sort_keys=True).encode()


def windows_content(windows: Iterable[Iterable[int]]) -> str:
    """Return what identifies the exact token windows that were judged."""
    state = hashlib.sha256()
    for window in windows:
        state.update((",".join(map(str, window)) + "\n").encode())
    return state.hexdigest()[:32]


def put_aside(book: Path, key: str, value: dict[str, Any]) -> None:
    """Keep what was measured under ``key`` in a run's bookkeeping, should the run not finish."""
    workspace.write_json(_aside(book, key), value)


def _aside(book: Path, key: str) -> Path:
    return book / ANSWERS / f"{key}.json"


def clear_aside(book: Path) -> None:
    """Forget what was put aside; the run's results have it all."""
    shutil.rmtree(book / ANSWERS, ignore_errors=True)


class Earlier:
    """Earlier evaluations of a workspace, found by key: finished ones, and parts of others."""

    def __init__(self, where: Workspace | None = None) -> None:
        """Read the summaries of all finished runs; the newest of equal keys counts."""
        self._found: dict[str, tuple[RunRecord, Entry]] = {}
        self._others: list[RunRecord] = []
        for record in (where or Workspace()).runs("evaluate"):
            if record.state != "done":
                self._others.append(record)
            elif summary := Summary.read(record.path):
                for entry in summary.entries:
                    self._found.setdefault(entry.key, (record, entry))

    def find(self, key: str, kind: type[Kind]) -> tuple[RunRecord, Kind] | None:
        """Return the run and its summary's entry with this key, or None."""
        record, entry = self._found.get(key) or (None, None)
        return (record, entry) if record and isinstance(entry, kind) else None

    def aside(self, key: str, kind: type[Kind]) -> tuple[RunRecord, Kind] | None:
        """Return a run that was going on, or ended early, and what it put aside under this key."""
        for record in self._others:
            values = workspace.read_json(_aside(record.path / workspace.BOOKKEEPING, key))
            if values and (found := from_dict(kind, values)):
                return record, found
        return None

    def has(self, key: str) -> bool:
        """Whether there is a result under this key; what was put aside is not read for that."""
        books = (record.path / workspace.BOOKKEEPING for record in self._others)
        return key in self._found or any(_aside(book, key).is_file() for book in books)
