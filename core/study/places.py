"""Text files that pages may list, and files that users upload.

The server lists its workspace and the folders named in ``DEPTHCUT_DATA`` (separated as in
``PATH``), and nothing else: links are resolved first, and what they lead to outside these folders
is left out. Uploads are stored in ``uploads/`` of the workspace under a safe name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import outside
from core.data import generated, hub, readers
from core.errors import DataError
from core.runs import workspace
from core.runs.workspace import Workspace

VARIABLE = "DEPTHCUT_DATA"
UPLOADS = "uploads"
MOST_BYTES = 200 * outside.MIB
"""Of an uploaded file."""
MOST_ENTRIES = 500
"""Files, and folders, of a folder that are listed."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Listing:
    """What a folder offers."""

    folder: Path
    above: tuple[Path, ...]
    """The folder above it, if that may be listed, and the other roots."""
    folders: tuple[Path, ...]
    sources: tuple[Path, ...]
    """Text files, datasets that ``save_to_disk`` has written, and texts that a model wrote."""
    left_out: int = 0
    """Entries beyond `MOST_ENTRIES`."""


def roots(where: Workspace) -> tuple[Path, ...]:
    """Return the folders that may be listed, those of ``DEPTHCUT_DATA`` first."""
    named = [Path(p).absolute() for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]
    found = [path for path in (*named, where.root.absolute()) if outside.is_folder(path)]
    return tuple(dict.fromkeys(found))


def _real(paths: Iterable[Path]) -> tuple[str, ...]:
    return tuple(map(os.path.realpath, paths))


def _is_below(path: Path, starts: Sequence[str]) -> bool:
    """Whether a path, with all links resolved, is one of the resolved folders or below one."""
    real = os.path.realpath(path)
    return any(real == one or real.startswith(one.rstrip(os.sep) + os.sep) for one in starts)


def listing(folder: Path, where: Workspace) -> Listing:
    """Return the folders and text files in a folder, sorted by name; hidden ones are left out.

    Raises `DataError` if the folder may not be listed or cannot be read.
    """
    listed = roots(where)
    starts = _real(listed)
    if not _is_below(folder, starts):
        raise DataError(
            f"{folder} is not in a folder that pages may list.",
            f"Name its folder in {VARIABLE} and start the dashboard again.",
        )
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"Cannot list {folder}: {error.strerror}.", "Choose another one."
        ) from error
    paths = [folder / name for name in names]
    paths = [path for path in paths if _is_below(path, starts)]
    folders = [path for path in paths if outside.is_folder(path)]
    saved = [p for p in folders if hub.is_saved(p) or generated.is_generated(p)]
    files = [
        p for p in paths if outside.is_file(p) and readers.kind_of_file(p) in readers.FILE_KINDS
    ]
    above = [folder.parent] if _is_below(folder.parent, starts) else []
    above += [root for root in listed if root not in (folder, folder.parent)]
    left = max(0, len(folders) - MOST_ENTRIES) + max(0, len(files) - MOST_ENTRIES)
    plain = [path for path in folders if path not in saved]
    return Listing(
        folder,
        tuple(above),
        tuple(plain[:MOST_ENTRIES]),
        (*saved[:MOST_ENTRIES], *files[:MOST_ENTRIES]),
        left,
    )


def safe_name(given: str) -> str:
    """Return a file name without folders and unusual characters.

    Raises `DataError` for a kind of file that is not read.
    """
    base = re.split(r"[/\\]", given)[-1]
    name = _UNSAFE.sub("-", base).strip("-.")
    suffixes = "".join(Path(name).suffixes[-2:] if name.lower().endswith(".gz") else [])
    suffix = suffixes or Path(name).suffix
    stem = name.removesuffix(suffix)[:60].strip("-.") or "text"
    if readers.kind_of_file(Path(stem + suffix)) not in readers.FILE_KINDS:
        raise DataError(
            f"{outside.brief(base)}: this kind of file is not supported.",
            f"Upload one of {', '.join(readers.FILE_KINDS)}, also with .gz.",
        )
    return stem + suffix.lower()


def keep(given: str, data: bytes, where: Workspace) -> Path:
    """Store an uploaded file in the workspace and return its path.

    The same content under the same name is stored once; other content gets a number.

    Raises `DataError` for a file that is empty, too large or of another kind, and `OutputError` if
    the workspace cannot be written.
    """
    name = safe_name(given)
    if not data:
        raise DataError(f"{name} is empty.", "Upload a file with text in it.")
    if len(data) > MOST_BYTES:
        raise DataError(
            f"{name} has {len(data):,} bytes; an upload may have up to {MOST_BYTES:,}.",
            f"Copy it to this machine and name its folder in {VARIABLE}.",
        )
    folder = where.root.absolute() / UPLOADS
    stem, suffix = name.split(".", 1)
    for number in range(1, 1000):
        path = folder / (name if number == 1 else f"{stem}-{number}.{suffix}")
        if not os.path.lexists(path):
            workspace.write_bytes(path, data, durable=False)
            return path
        if _is(path, data):
            return path
    raise DataError(f"There are too many files named {name}.", "Upload it under another name.")


def _is(path: Path, data: bytes) -> bool:
    """Whether a file, which must not be a link, has this content."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or path.stat().st_size != len(data):
            return False
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").digest() == hashlib.sha256(data).digest()
    return False
