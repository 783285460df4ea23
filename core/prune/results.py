"""pruning.json: what a cut took from a checkpoint; depth and width pruning both leave one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from core.runs import workspace
from core.runs.results import JsonResult, from_dict


@dataclass(frozen=True)
class PlanFile:
    """A plan as ``plan`` prints it, as pruning.json records it, or written by hand."""

    drop: tuple[int, ...] | None = None
    """Blocks to remove, in removal order; None if the file names none."""
    criterion: str | None = None
    protected: tuple[int, ...] = ()
    """Blocks that were not offered for removal."""
    blocks: int | None = None
    """Blocks of the checkpoint that was planned for."""
    protect_first: int = 0
    protect_last: int = 0


@dataclass(frozen=True)
class Cut:
    """An earlier cut of the same line."""

    method: str | None = None
    """depth, or the width method."""
    source: str | None = None
    criterion: str | None = None
    dropped: tuple[int, ...] | None = None
    """Blocks, by their numbers in ``source``."""


@dataclass(frozen=True, kw_only=True)
class Pruning(JsonResult):
    """What depth and width pruning have in common; all that depth pruning records."""

    FILE: ClassVar[str] = "pruning.json"

    method: str = ""
    """depth, or the width method."""
    source: str = ""
    """The checkpoint that was cut, as the user named it."""
    base_model: str = ""
    """The first checkpoint of the line."""
    source_key: str = ""
    """Identifies the weights that were cut."""
    criterion: str | None = None
    """What ranked the blocks or units; None if blocks were named by hand."""
    dropped: tuple[int, ...] = ()
    """Blocks in removal order, by their numbers in ``source``."""
    kept: tuple[int, ...] = ()
    dropped_original: tuple[int, ...] = ()
    """``dropped`` by the numbers of the base model."""
    original_blocks: tuple[int, ...] = ()
    """The kept blocks by the numbers of the base model."""
    blocks_before: int | None = None
    blocks_after: int | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None
    ratio: float | None = None
    """Share of the source's parameters that was removed."""
    plan: dict[str, Any] | None = None
    """The plan's file as it was given; see `planned`."""
    lineage: tuple[Cut, ...] = ()
    """Earlier cuts, the oldest first."""

    @property
    def planned(self) -> PlanFile | None:
        """What the recorded plan says; None without a plan."""
        return from_dict(PlanFile, self.plan) if self.plan else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values behind the schema number."""
        return {"schema": workspace.SCHEMA, **super().to_dict()}

    def to_text(self) -> str:
        """Return the file's text; it is written into a folder that is not published yet."""
        return workspace.to_json(self.to_dict(), indent=2) + "\n"
