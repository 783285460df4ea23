"""Result files of recipes: their verdicts and their tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from core.runs.results import CsvRow, JsonResult


@dataclass(frozen=True)
class StepTime:
    """One step of a recipe."""

    name: str
    command: str = ""
    seconds: float = 0.0
    """Start-up included."""


@dataclass(frozen=True, kw_only=True)
class RecipeSummary(JsonResult):
    """summary.json of a recipe."""

    recipe: str = ""
    title: str = ""
    checkpoint: str = ""
    verdict: str = ""
    """The result in one sentence."""
    findings: tuple[str, ...] = ()
    """More sentences on what it measured itself."""
    study: str = ""
    """The verdict on the whole study when it ended: later runs may change it. Empty if that is the
    recipe's own, or if nothing was measured."""
    take: str = ""
    """The best variant by that verdict; empty if nothing was measured."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The numbers behind the sentences; each recipe has its own."""
    failed: dict[str, str] = field(default_factory=dict)
    """Optional steps that failed -> reason."""
    steps: tuple[StepTime, ...] = ()


@dataclass(frozen=True)
class ShortVerdict:
    """The verdict of one of the demo's short recipes."""

    recipe: str = ""
    title: str = ""
    verdict: str = ""
    findings: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DemoSummary(JsonResult):
    """summary.json of the demo command."""

    checkpoint: str = ""
    verdicts: tuple[ShortVerdict, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class CalibrationRow(CsvRow):
    """One row of calibration.csv: a plan from one text, evaluated on another."""

    FILE: ClassVar[str] = "calibration.csv"

    calibration: str
    """The text whose scores chose the blocks."""
    evaluated: str
    """The text that the perplexity was measured on."""
    ppl: float
    ratio: float
    """``ppl`` over the dense model's on the same text."""
    dropped: str = ""
    """The plan's blocks in removal order, separated by spaces."""


@dataclass(frozen=True)
class RetrainRow(CsvRow):
    """One row of a retraining recipe's table.csv."""

    FILE: ClassVar[str] = "table.csv"

    variant: str
    """What was retrained, and how."""
    evaluated_on: str
    """held out, a source, a seed, or mean."""
    measure: str
    """loss and kl (nats per token), recovered and accuracy (shares)."""
    value: float | None
    spread: float | None = None
    """Sample standard deviation over seeds."""
    items: int | None = None
    """Tokens or questions."""


@dataclass(frozen=True, kw_only=True)
class PaperRow(CsvRow):
    """One row of paper-table's table.csv."""

    FILE: ClassVar[str] = "table.csv"

    kind: str = ""
    """measured or published."""
    model: str = ""
    criterion: str | None = None
    blocks_dropped: int | None = None
    params: int | None = None
    """Parameters left."""
    ratio: float | None = None
    """Share of the parameters removed."""
    retrained: str | None = None
    """lora, or nothing."""
    text: str = ""
    """What the perplexity was measured on."""
    ppl: float | None = None
    tasks_mean: float | None = None
    """Plain mean over the tasks' accuracies."""
    tasks_stderr: float | None = None
    speedup: float | None = None
    """Relative to the dense model."""
    source: str = ""
