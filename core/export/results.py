"""export.json of an export that ran as a job: what was written, and what a user should know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from core.runs.results import JsonResult


@dataclass(frozen=True, kw_only=True)
class Export(JsonResult):
    """One exported file, or a commit on the Hub."""

    FILE: ClassVar[str] = "export.json"

    checkpoint: str = ""
    format: str = ""
    """gguf, mergekit or hub."""
    type: str | None = None
    """Type of the matrices in a GGUF file."""
    architecture: str | None = None
    """llama.cpp's architecture of a GGUF file."""
    why_deci: str = ""
    """Why the blocks need the architecture deci; empty without."""
    file: str | None = None
    """The file, in the run's folder or as --out named it."""
    bytes: int | None = None
    """Size of the file; of the upload, for the Hub."""
    url: str | None = None
    """The repository's page on the Hub."""
    private: bool | None = None
    notes: tuple[str, ...] = ()
    """What differs from the checkpoint, or was decided."""

    def shown(self) -> dict[str, Any]:
        """Return the fields that apply to this format, for printing."""
        return {key: value for key, value in self.to_dict().items() if value not in (None, "", [])}
