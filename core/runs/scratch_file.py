"""Files without a name, for what does not fit in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from core.errors import RunError


class ScratchFile:
    """A file on a folder's disk; the system deletes it when it is closed, or the process dies."""

    def __init__(self, folder: Path, content: str) -> None:
        """Open it; raises `RunError`, which names the ``content``, if that is impossible."""
        self.folder, self.content = folder, content
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # `close` closes it
        except OSError as error:
            raise self._unusable(error) from error

    def write(self, at: int, data: memoryview) -> None:
        """Write ``data`` from byte ``at`` on; raises `RunError` for a full disk."""
        try:
            self._file.seek(at)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise self._unusable(error) from error

    def append(self, data: memoryview) -> int:
        """Write ``data`` behind what is there; return where. Raises what `write` raises."""
        at = self._file.seek(0, os.SEEK_END)
        self.write(at, data)
        return at

    def read(self, at: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with what was written from byte ``at`` on."""
        try:
            self._file.seek(at)
            self._file.readinto(buffer)
        except OSError as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        """Close the file, which deletes it."""
        self._file.close()

    def _unusable(self, error: OSError) -> RunError:
        return RunError(
            f"Cannot keep {self.content} in {self.folder}: {error.strerror}.",
            "Free up disk space, or give an --out on another disk.",
        )
