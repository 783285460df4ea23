"""Result files of importance and curve runs: what blocks are worth, and what plans cost.

`core.importance` writes them. Plans read them, and importance is above plans in the import order,
so the types are here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from core.data.facts import TextFacts
from core.runs.results import CsvRow, JsonResult


@dataclass(frozen=True, kw_only=True)
class Importance(JsonResult):
    """summary.json of an importance run."""

    checkpoint: str = ""
    checkpoint_key: str = ""
    """Identifies the weights that were scored."""
    family: str = ""
    blocks: int = 0
    dense_ppl: float | None = None
    """Perplexity of the whole model on the calibration rows; None without the metric ppl."""
    metrics: tuple[str, ...] = ()
    calibration: str | None = None
    """The SOURCE of the rows."""
    calibration_content: str = ""
    """Identifies the text: a hash of the file, or how it was made."""
    text: TextFacts = TextFacts()
    """How the rows were obtained."""
    samples: int | None = None
    """Calibration rows."""
    length: int | None = None
    """Tokens in a row."""
    seed: int | None = None
    """Draws the rows and the crops."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By pass: sweep, taylor, magnitude, sublayers, sleb."""
    flops: float | None = None
    """Estimated operations of all passes."""
    flops_per_s: float | None = None
    parameters: int | None = None
    """The rate that later estimates use."""
    device: str | None = None
    dtype: str | None = None
    """Of weights and activations."""
    peak_memory_mib: float = 0.0
    tokens: int = 0
    """Predictions that a perplexity is the mean over."""
    compute_dtype: str = ""
    """What activations were computed in: float32 on a CPU without instructions for ``dtype``."""
    processes: int = 1
    """Those that shared the rows; ``peak_memory_mib`` is the first one's."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockRow(CsvRow):
    """One row of blocks.csv: a block's scores, None if a criterion was not computed."""

    FILE: ClassVar[str] = "blocks.csv"

    block: int
    ppl: float | None = None
    """Perplexity of the model without the block."""
    taylor: float | None = None
    magnitude: float | None = None
    block_influence: float | None = None
    relative_update: float | None = None
    kl: float | None = None
    """KL(dense || without the block), the mean over positions, in nats."""


@dataclass(frozen=True)
class WeightRow(CsvRow):
    """One row of weights.csv: a tensor's scores."""

    FILE: ClassVar[str] = "weights.csv"

    name: str
    block: int
    module: str
    taylor: float | None = None
    magnitude: float | None = None


@dataclass(frozen=True)
class SampleRow(CsvRow):
    """One row of samples.csv: the loss of a calibration row without a block."""

    FILE: ClassVar[str] = "samples.csv"

    block: int
    """-1: the dense model."""
    sample: int
    nll: float
    """Mean over the row's predictions, in nats."""


@dataclass(frozen=True)
class DivergenceRow(CsvRow):
    """One row of divergences.csv: how far a block's absence takes the model on a row."""

    FILE: ClassVar[str] = "divergences.csv"

    block: int
    sample: int
    kl: float
    """KL(dense || without the block), the mean over the row's predictions, in nats."""

    @property
    def as_sample(self) -> SampleRow:
        """The row with its KL for a loss, from which the certainty of an order is computed."""
        return SampleRow(self.block, self.sample, self.kl)


@dataclass(frozen=True)
class AngularRow(CsvRow):
    """One row of angular.csv: how far a run of blocks turns the hidden state."""

    FILE: ClassVar[str] = "angular.csv"

    start: int
    length: int
    distance: float
    """Angle over pi: 0 is the same direction."""


@dataclass(frozen=True)
class GreedyRow(CsvRow):
    """One row of greedy.csv: a round of greedy removal (SLEB)."""

    FILE: ClassVar[str] = "greedy.csv"

    round: int
    """From 1."""
    block: int
    """The block that the round removed."""
    ppl: float
    """Perplexity after it."""


@dataclass(frozen=True)
class SublayerRow(CsvRow):
    """One row of sublayers.csv: perplexity without a block's attention or MLP."""

    FILE: ClassVar[str] = "sublayers.csv"

    block: int
    part: str
    """attention or mlp."""
    ppl: float


@dataclass(frozen=True, kw_only=True)
class Curve(JsonResult):
    """summary.json of a curve run."""

    checkpoint: str = ""
    checkpoint_key: str = ""
    scores: str = ""
    """The importance run or file that ranked the blocks."""
    dense_ppl: float | None = None
    protected: tuple[int, ...] = ()
    """Blocks that no plan might drop."""
    drops: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """``CRITERION COUNT`` -> the blocks of that plan; see `drop_of`."""
    calibration: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    calibration_content: str = ""
    text: TextFacts = TextFacts()
    """How the rows were obtained."""
    tokens: int = 0
    device: str | None = None
    dtype: str | None = None
    """What the weights are held in."""
    compute_dtype: str = ""
    peak_memory_mib: float = 0.0
    processes: int = 1
    """Those that shared the rows; ``peak_memory_mib`` is the first one's."""

    def drop_of(self, criterion: str, count: int) -> tuple[int, ...]:
        """Return the blocks of a plan; empty if the run did not measure it."""
        return self.drops.get(plan_key(criterion, count), ())


def plan_key(criterion: str, count: int) -> str:
    """Return how `Curve.drops` names a plan."""
    return f"{criterion} {count}"


@dataclass(frozen=True)
class CurveRow(CsvRow):
    """One row of curve.csv: the perplexity of one plan."""

    FILE: ClassVar[str] = "curve.csv"

    criterion: str
    count: int
    """Blocks removed; 0 is the dense model."""
    ratio: float | None = None
    """Share of the parameters removed."""
    params: int | None = None
    """Parameters left."""
    ppl: float | None = None
