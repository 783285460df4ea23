"""The SHA-256 of a large file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from core.runs.progress import SILENT, Progress

_CHUNK = 8 << 20


def digest(file: Path, progress: Progress = SILENT) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    found, done, total = hashlib.sha256(), 0, max(1, file.stat().st_size)
    with file.open("rb") as handle:
        while piece := handle.read(_CHUNK):
            found.update(piece)
            done += len(piece)
            progress.step(min(done, total) >> 20, total >> 20 or 1, f"checking {file.name} (MiB)")
    return found.hexdigest()
