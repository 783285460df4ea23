"""What models left on training rows, kept on disk: its place and its size. No torch.

Written and read by `core.retrain.row_cache`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from core.runs.workspace import cannot_write, default_root, disk_bytes

FOLDER = "teachers"
COMPLETE = "complete.json"
"""A cache without it is not one."""


def root() -> Path:
    """Return the folder of all caches of the workspace."""
    return default_root() / FOLDER


def needed_bytes(tokens: int, k: int) -> int:
    """Return the bytes that the distributions of ``tokens`` predicted tokens take."""
    return tokens * (6 * k + 2)


def has_room(need: int) -> bool:
    """Whether ``need`` bytes are at most a quarter of the free disk space of the workspace."""
    place = root()
    while not place.is_dir():
        place = place.parent
    return 4 * need <= shutil.disk_usage(place).free


@dataclass(frozen=True)
class Taken:
    """How many caches a workspace has, and their bytes."""

    number: int = 0
    bytes: int = 0


def taken(workspace: Path) -> Taken:
    """Return what the caches of a workspace take, unfinished ones included."""
    folder = workspace / FOLDER
    found = [one for one in folder.iterdir() if one.is_dir()] if folder.is_dir() else []
    return Taken(len(found), sum(disk_bytes(one) for one in found))


def delete(workspace: Path) -> None:
    """Delete all caches of a workspace; a run that needs one writes it again.

    Raises `OutputError` if that is not possible.
    """
    folder = workspace / FOLDER
    if folder.is_symlink():
        folder.unlink()
        return
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(folder, error) from error
