"""``python -m core inspect CHECKPOINT``: what a checkpoint is, as JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from core import locate
from core.progress import Progress
from core.spec import option


@dataclass(frozen=True, kw_only=True)
class InspectSpec:
    """Tell what a checkpoint is, from its config and headers."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, or demo.")


class StderrProgress(Progress):
    """Progress of a command that leaves no run directory: lines on standard error."""

    def log(self, message: str) -> None:
        """Print one line."""
        print(message, file=sys.stderr, flush=True)


def run(spec: InspectSpec) -> dict[str, Any]:
    """Return what is printed: `CheckpointInfo.to_dict` with the schema version.

    Raises `CheckpointError` for anything that keeps the checkpoint from being used.
    """
    return {"schema": 1, **locate.inspect(spec.checkpoint, StderrProgress()).to_dict()}
