"""Result files of a budget run: what every version of every block costs, in quality and in time.

`core.budget` writes them. Plans read them, and budget is above plans in the import order, so the
types are here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from core.data.facts import TextFacts
from core.runs.results import CsvRow, JsonResult

WHOLE = "whole"
"""The version of a block that changes nothing."""
VERSIONS = {
    "drop": "dropped",
    "no-attention": "without attention",
    "no-mlp": "without MLP",
    "mlp75": "with 75 % of the MLP",
    "mlp50": "with 50 % of the MLP",
    "mlp25": "with 25 % of the MLP",
}
"""What else a block can become -> how it is written."""


MLP_SHARES = {"mlp75": 0.75, "mlp50": 0.5, "mlp25": 0.25}
"""Version -> share of the MLP's neurons that it keeps."""


@dataclass(frozen=True)
class VersionRow(CsvRow):
    """One row of versions.csv: one version of one block, all other blocks being whole."""

    FILE: ClassVar[str] = "versions.csv"

    block: int
    version: str
    """whole, or one of `VERSIONS`."""
    kl: float | None = None
    """KL(dense || with only this block changed) on the calibration rows, in nats per token."""
    nll: float | None = None
    """Mean negative log-likelihood of the same rows, in nats."""
    prefill_s: float | None = None
    """Seconds that the block takes for the prompts, at the run's batch and context."""
    decode_s: float | None = None
    """Seconds that the block takes for one more token of every sequence."""
    params: int = 0
    weight_bytes: int = 0
    neurons: int = 0
    """Neurons of the MLP."""
    cache_bytes: int = 0
    """Keys and values of all sequences at the run's context."""


@dataclass(frozen=True)
class PlanCheck(CsvRow):
    """One row of plans.csv: a solved plan, as it was predicted and as it was measured."""

    FILE: ClassVar[str] = "plans.csv"

    latency: float
    """The budget it was solved for: share of the dense model's latency, at `OUTPUT_TOKENS`."""
    predicted_share: float
    """The share that the solution is predicted to take."""
    choice: str
    """The version of every block, separated by spaces."""
    predicted_kl: float
    kl: float | None
    """Measured on the calibration rows, in nats per token."""
    nll: float | None
    predicted_prefill_s: float
    prefill_s: float | None
    """Measured; None if the whole model did not fit in memory."""
    predicted_decode_s: float
    decode_s: float | None
    dense_prefill_s: float | None
    """The whole model's, timed in turn with the plans."""
    dense_decode_s: float | None

    def seconds(self, output_tokens: int, which: str = "") -> float:
        """Return the latency of a generation: measured, or ``predicted_`` or ``dense_``.

        0 if it was not measured.
        """
        prefill = float(getattr(self, f"{which}prefill_s") or 0.0)
        return prefill + (output_tokens - 1) * float(getattr(self, f"{which}decode_s") or 0.0)


OUTPUT_TOKENS = 128
"""Tokens of a generation whose latency is meant, unless told otherwise: the benchmark's."""
NOISY = 0.3
"""Variation of timed steps from which on times are called noisy. A convention."""
ROUGH = 0.2
"""Median error from which on predicted latencies are called rough. A convention."""


def latency_errors(rows: Iterable[PlanCheck], output_tokens: int = OUTPUT_TOKENS) -> list[float]:
    """Return how far each plan's predicted share of the dense latency is off, as a share of it.

    Both sides are relative to the dense model: as predicted, and as timed in turn with the plan.
    """
    found = []
    for row in rows:
        dense = row.seconds(output_tokens, "dense_")
        measured = row.seconds(output_tokens) / dense if dense > 0 else 0.0
        if measured > 0 and row.predicted_share > 0:
            found.append(abs(row.predicted_share / measured - 1))
    return found


@dataclass(frozen=True, kw_only=True)
class Budget(JsonResult):
    """summary.json of a budget run."""

    checkpoint: str = ""
    checkpoint_key: str = ""
    """Identifies the weights."""
    family: str = ""
    blocks: int = 0
    measured: tuple[str, ...] = ()
    """The versions, without whole."""
    dense_nll: float | None = None
    """Of the whole model on the calibration rows, in nats."""
    calibration: str | None = None
    """The SOURCE of the rows."""
    calibration_content: str = ""
    text: TextFacts = TextFacts()
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    tokens: int = 0
    """Predictions that nll and kl are the mean over."""
    passes: int = 0
    """Block passes that measuring kl took, shared prefixes once."""
    plain_passes: int = 0
    """Block passes if every version were run by itself."""
    batch: int = 1
    """Sequences that were timed together."""
    context: int = 0
    """Tokens of each prompt that was timed."""
    steps: int = 0
    """Tokens generated after it, each timing."""
    runs: int = 0
    """Timings of every version, in rounds; their median counts."""
    rest_prefill_s: float | None = None
    """Seconds outside the blocks for the prompts: embedding, head, sampling, overhead."""
    rest_decode_s: float | None = None
    """The same for one more token of every sequence."""
    rest_params: int = 0
    rest_weight_bytes: int = 0
    dense_prefill_s: float | None = None
    """The whole model's, as measured; None if it did not fit in memory."""
    dense_decode_s: float | None = None
    timed_layers: int | None = None
    """Blocks that were timed together, in every version."""
    noise: float | None = None
    """How much the timed steps vary: the middle half, as a share of the median."""
    seconds: float = 0.0
    """Time spent on measuring kl."""
    timing_seconds: float = 0.0
    """Time spent on timing."""
    flops: float | None = None
    """Operations of measuring kl."""
    flops_per_s: float | None = None
    parameters: int | None = None
    device: str | None = None
    dtype: str | None = None
    compute_dtype: str = ""
    timed_dtype: str = ""
    """What weights were held and computed in when timed, as in a benchmark."""
    peak_memory_mib: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries."""
