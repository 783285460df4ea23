"""``python -m core inspect CHECKPOINT``: what a checkpoint is, as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.checkpoint import locate
from core.runs.progress import StderrProgress
from core.runs.spec import option


@dataclass(frozen=True, kw_only=True)
class InspectSpec:
    """Describe a checkpoint, from its config and headers."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")


def run(spec: InspectSpec) -> dict[str, Any]:
    """Return what is printed: `CheckpointInfo.to_dict` with the schema version.

    Raises `CheckpointError` if the checkpoint cannot be used.
    """
    info = locate.open(spec.checkpoint, StderrProgress(), need="headers", quantized=True).info
    return {"schema": 1, **info.to_dict()}
