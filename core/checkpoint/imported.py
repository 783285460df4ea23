"""import.json: the file of another format that a checkpoint was made from.

Variants keep a copy, so that each of them says that its weights were once quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from core import words
from core.runs import workspace
from core.runs.results import JsonResult


@dataclass(frozen=True, kw_only=True)
class Imported(JsonResult):
    """What a checkpoint was imported from."""

    FILE: ClassVar[str] = "import.json"

    file: str
    """Name of the GGUF file, without its folder."""
    sha256: str = ""
    bytes: int = 0
    storage: dict[str, int]
    """Parameters by how the file stores them (Q4_1, F32, ...), the largest part first."""
    quantized: bool = True
    architecture: str = ""
    """As the file names it: llama, qwen2 or qwen3."""
    title: str = ""
    """The model's name in the file."""
    license: str = ""
    origin: str = ""
    """Where the file came from, if it was downloaded."""
    dtype: str = ""
    """What the weights were widened to."""
    notes: tuple[str, ...] = ()
    """What a user should know of the conversion."""

    @property
    def how_stored(self) -> str:
        """Storage with its share of the parameters: ``Q4_1 79%, Q8_0 21%``; tiny parts left out."""
        total = sum(self.storage.values()) or 1
        parts = [(name, count / total) for name, count in self.storage.items()]
        return (
            ", ".join(f"{n} {words.percent(share)}" for n, share in parts if share >= 0.005)
            or "nothing"
        )

    @property
    def summary(self) -> str:
        """One sentence for pages and model cards."""
        if self.quantized:
            return (
                f"The weights were dequantized from {self.file} ({self.how_stored}) to "
                f"{self.dtype}: what quantization had rounded off is not restored."
            )
        return f"The weights were converted from {self.file} ({self.how_stored}) to {self.dtype}."

    def to_text(self) -> str:
        """Return the file's text; it is written into a folder that is not published yet."""
        return workspace.to_json({"schema": workspace.SCHEMA, **self.to_dict()}, indent=2) + "\n"
