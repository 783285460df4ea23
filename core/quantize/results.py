"""quantization.json: how a checkpoint was quantized, and from what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from core.runs import workspace
from core.runs.results import JsonResult


@dataclass(frozen=True, kw_only=True)
class QuantizationRecord(JsonResult):
    """What ``quantize`` records beside the weights."""

    FILE: ClassVar[str] = "quantization.json"

    bits: int = 0
    group: int | None = None
    """Weights that share a scale; None: one scale per output channel."""
    scheme: str = ""
    """symmetric or asymmetric, round to nearest."""
    layout: str = ""
    """torchao's tensor class."""
    source: str = ""
    """The checkpoint that was quantized, as the user named it."""
    source_key: str = ""
    """Identifies the weights that were quantized."""
    base_model: str = ""
    """The first checkpoint of the line."""
    tensors: int = 0
    """Quantized tensors: the weights of the blocks' linear layers."""
    parameters: int = 0
    """Elements of the quantized tensors."""
    total_parameters: int = 0
    """Parameters of the model; quantizing does not change them."""
    left: tuple[str, ...] = ()
    """What stays in ``dtype``."""
    dtype: str = ""
    """Format of what is left, and of what the weights are widened to."""
    bytes_before: int = 0
    """All weights as they were stored."""
    bytes_after: int = 0
    """All weights as they are stored."""
    torchao: str = ""
    """Version of torchao; empty in a dry run."""

    @property
    def label(self) -> str:
        """int8 or int4."""
        return f"int{self.bits}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values behind the schema number."""
        return {"schema": workspace.SCHEMA, **super().to_dict()}

    def to_text(self) -> str:
        """Return the file's text; it is written into a folder that is not published yet."""
        return workspace.to_json(self.to_dict(), indent=2) + "\n"
