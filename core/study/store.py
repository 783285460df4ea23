"""Where the settings of a study are kept: one file per dense checkpoint in the workspace.

``studies/NAME-HASH.json`` holds the settings and what was changed on each page (command -> option
-> value). It is written beside and renamed, and read tolerantly: what cannot be used takes its
default, and a file that cannot be read is one sentence.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from core.checkpoint import locate
from core.runs import workspace
from core.runs.workspace import BOOKKEEPING, MAKERS, Workspace
from core.study import settings as study_settings
from core.study.settings import Settings

FOLDER = "studies"
MOST_STEPS = 64
"""Checkpoints between a variant and its dense checkpoint."""
Changes = Mapping[str, Mapping[str, Any]]
"""What was changed on pages: command -> option -> value."""
_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Kept:
    """The settings of one study, and what was changed for single pages."""

    path: Path
    """Its file; it exists once anything was set."""
    checkpoint: str
    """The dense checkpoint's name."""
    folder: Path
    """The dense checkpoint's folder; a Hub id as a path."""
    settings: Settings
    asked: bool = False
    """Whether somebody has set or confirmed the settings."""
    changes: Changes = field(default_factory=lambda: _EMPTY)
    problem: str = ""
    """Why the file cannot be read, in one sentence."""

    @property
    def key(self) -> str:
        """What distinguishes this study from others of the workspace."""
        return self.path.stem

    def changed(self, command: str) -> Mapping[str, Any]:
        """Return what was changed for one command."""
        return self.changes.get(command, _EMPTY)

    def with_change(self, command: str, values: Mapping[str, Any]) -> Kept:
        """Return the study with these changes for a command, instead of its earlier ones."""
        changes = {**self.changes, command: dict(values)}
        return replace(self, changes={k: v for k, v in changes.items() if v})

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds."""
        settings = self.settings.to_dict() if self.asked else {}
        changes = {command: dict(values) for command, values in self.changes.items()}
        return {"checkpoint": self.checkpoint, "settings": settings, "changes": changes}


def dense_of(name: str, where: Workspace) -> str:
    """Return the dense checkpoint that ``name`` was made from; ``name`` if it is dense itself.

    Follows the runs' own records, of which a few small files are read.
    """
    for _ in range(MOST_STEPS):
        spec, cwd = _maker(name, where)
        parent = spec.get("checkpoint")
        if not isinstance(parent, str) or not parent or parent == name:
            return name
        joined = os.path.join(cwd, parent)
        elsewhere = cwd and locate.local_folder(parent) is None and locate.local_folder(joined)
        name = joined if elsewhere else parent
    return name


def _maker(name: str, where: Workspace) -> tuple[Mapping[str, Any], str]:
    """Return the options of the run that made a checkpoint, and the folder it was started in."""
    folder = locate.local_folder(name) or where.root / name
    for run in (folder, folder.parent):
        book = run / BOOKKEEPING / "spec.json"
        try:
            state = os.stat(book)
        except (OSError, ValueError):
            continue
        return _made_by(book, state.st_mtime_ns, state.st_ino)
    return _EMPTY, ""


@functools.lru_cache(maxsize=1024)
def _made_by(book: Path, _mtime: int, _inode: int) -> tuple[Mapping[str, Any], str]:
    record = workspace.read_json(book) or {}
    spec, cwd = record.get("spec"), record.get("cwd")
    if record.get("command") not in MAKERS or not isinstance(spec, dict):
        return _EMPTY, ""
    return spec, cwd if isinstance(cwd, str) else ""


def file_of(dense: str, where: Workspace) -> Path:
    """Return the file of a dense checkpoint's study; one inside the workspace moves with it."""
    folder, root = locate.local_folder(dense), os.path.realpath(where.root)
    name = dense
    if folder and dense != "demo":
        name = os.path.realpath(folder)
        if os.path.commonpath((name, root)) == root:
            name = os.path.relpath(name, root)
    plain = "".join(c if c.isalnum() else "-" for c in locate.last_part(dense))[:40].strip("-")
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return where.root / FOLDER / f"{plain or 'study'}-{digest}.json"


def of(name: str, where: Workspace) -> Kept:
    """Return the study of a checkpoint (dense, or any variant of it); never raises."""
    dense = dense_of(name, where)
    folder = locate.local_folder(dense) or Path(dense)
    path = file_of(dense, where)
    try:
        state = os.stat(path)
    except OSError:
        return Kept(path, dense, folder, study_settings.defaults(folder))
    found = _read(path, state.st_mtime_ns, state.st_ino)
    if found is None:
        problem = (
            f"The settings of this study cannot be read: {path} is damaged. Its defaults are used, "
            "and the next change replaces the file."
        )
        return Kept(path, dense, folder, study_settings.defaults(folder), problem=problem)
    asked, changes = found
    settings = study_settings.read(asked, folder)
    return Kept(path, dense, folder, settings, bool(asked), changes)


@functools.lru_cache(maxsize=256)
def _read(path: Path, _mtime: int, _inode: int) -> tuple[Mapping[str, Any], Changes] | None:
    found = workspace.read_json(path)
    if found is None:
        return None
    asked, changes = found.get("settings"), found.get("changes")
    changes = changes if isinstance(changes, dict) else {}
    whole = {k: v for k, v in changes.items() if isinstance(v, dict)}
    return asked if isinstance(asked, dict) else {}, whole


def save(kept: Kept) -> None:
    """Write a study's file; raises `OutputError` if the workspace cannot be written."""
    workspace.write_json(kept.path, kept.to_dict(), durable=False)


TURN = threading.Lock()
"""Held while a study is read, changed and written: sessions share it."""
