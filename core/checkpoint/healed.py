"""Whether a cut was healed, from the pruning.json beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from core.runs.results import JsonResult


@dataclass(frozen=True)
class _Healing:
    method: str = ""


@dataclass(frozen=True, kw_only=True)
class _Cut(JsonResult):
    """The one part of pruning.json that tells what a checkpoint is; see core/prune/results.py."""

    FILE: ClassVar[str] = "pruning.json"

    healing: _Healing | None = None


def healed_by(folder: Path) -> str:
    """Return the method whose repairs the last cut kept: refit, linear, scale; empty if none."""
    found = _Cut.read(folder)
    method = found.healing.method if found and found.healing else ""
    return "" if method == "none" else method
