"""The files of a retrain run as dataclasses: the only module that knows their keys and columns.

summary.json is a `Summary`; evaluation.csv has a `Measure` per row; metrics.jsonl has a `Step`, an
`Evaluation` or a `Notice` per line. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from core import outside
from core.retrain.diagnostics import Finding
from core.runs.progress import Progress
from core.runs.results import CsvRow, JsonResult, from_dict


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the options came to (`core.retrain.spec.Settings`)."""

    steps: int | None = None
    epochs: float | None = None
    batch: int | None = None
    """Sequences of a step."""
    micro_batch: int | None = None
    accumulation: int | None = None
    lr: float | None = None
    warmup: int | None = None
    weight_decay: float | None = None
    beta2: float | None = None
    eval_every: int | None = None
    sparing: bool | None = None
    """Whether evaluations were left out that would have taken more than their share of time."""
    layout: str = ""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What was trained on."""

    source: str = ""
    content: str = ""
    """A hash of the file, or how it was made."""
    kind: str = ""
    """instruction, messages, text or input_ids."""
    template: str = ""
    """How instructions and messages are written: chat (the tokenizer's template), alpaca, plain."""
    rows: int | None = None
    cut: int | None = None
    """Rows shortened to the cutoff, or split at it."""
    dropped: int | None = None
    """Rows left out."""
    sequences: int | None = None


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """What the held-out loss is measured on."""

    source: str = ""
    content: str = ""
    rows: int | None = None
    tokens: int | None = None
    """Predicted tokens."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """How far the written checkpoint is from what was trained."""

    dtype: str
    trained_in: str
    rows_compared: int
    max_logit_difference: float
    mean_logit_difference: float | None = None
    heldout_loss: float
    """Of the written checkpoint, in nats per token."""
    heldout_loss_trained: float


@dataclass(frozen=True, kw_only=True)
class Summary(JsonResult):
    """summary.json of a retrain run; losses are in nats per token, on the held-out rows."""

    state: str = ""
    """done, stopped (by a finding) or cancelled."""
    method: str = ""
    checkpoint: str = ""
    dense: str | None = None
    """The dense model that is compared with; None if there is none."""
    heldout_loss_dense: float | None = None
    heldout_loss_before: float | None = None
    heldout_loss_after: float | None = None
    heldout_ppl_dense: float | None = None
    heldout_ppl_before: float | None = None
    heldout_ppl_after: float | None = None
    gap_nat: float | None = None
    """What pruning cost: the loss before less that of the dense model."""
    recovered: float | None = None
    """Share of the gap that was closed; None if it is not reported."""
    heldout_kl_before: float | None = None
    """KL(dense || model) in nats per token, over the dense model's likeliest tokens."""
    heldout_kl_after: float | None = None
    recovered_kl: float | None = None
    """Share of the divergence that was closed; None if it is not reported."""
    measured_at_step: int | None = None
    kept_step: int | None = None
    steps: int | None = None
    settings: Settings = Settings()
    loss_last_step: float | None = None
    """Training loss."""
    trainable_parameters: int | None = None
    parameters: int | None = None
    quantized_base: str = "none"
    """What the frozen weights were held in while adapters trained: int8, int4, or as they are."""
    fused: bool | None = None
    """Whether the hand-written layers computed it; None in runs of earlier versions."""
    not_fused_because: str | None = None
    recomputed: bool | None = None
    """Whether activations were recomputed; None in runs of earlier versions."""
    recomputed_because: str | None = None
    micro_batch_because: str | None = None
    """Why that number was computed at once; None in runs of earlier versions."""
    tokens: int | None = None
    """Trained on."""
    training_s: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    peak_memory_mib: float | None = None
    processes: int = 1
    """Those that shared every step; ``peak_memory_mib`` is the first one's."""
    sharding: str | None = None
    """fsdp if each process held a part of weights, gradients and optimiser states, ddp if it held
    them whole; None in a single process, for adapters, and in runs of earlier versions."""
    sharding_because: str | None = None
    device: str = ""
    dtype: str = ""
    """Of the weights."""
    compute_dtype: str = ""
    seed: int | None = None
    data: Data = Data()
    heldout: Heldout = Heldout()
    merged: Merged | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measure(CsvRow):
    """One row of evaluation.csv: one measure of the dense, the pruned and the retrained model."""

    FILE: ClassVar[str] = "evaluation.csv"

    source: str
    """Held-out rows, another source, or a skill of the demo world."""
    measure: str
    """loss and kl in nats per token, accuracy."""
    dense: float | None = None
    before: float | None = None
    after: float | None = None
    items: int | None = None
    """Tokens or questions."""


@dataclass(frozen=True, kw_only=True)
class Rate(CsvRow):
    """One row of rates.csv: a learning rate, and the held-out rows after a few steps with it."""

    FILE: ClassVar[str] = "rates.csv"

    rate: float
    heldout_loss: float
    """In nats per token."""
    heldout_kl: float | None = None
    recovered: float | None = None
    """Share of the loss gap that was closed."""
    recovered_kl: float | None = None
    """Share of the divergence that was closed."""

    @classmethod
    def best(cls, rows: Sequence[Rate], *, by_kl: bool) -> Rate | None:
        """Return the row with the lowest loss, or divergence; None if all of them diverged."""
        wanted = [row.heldout_kl if by_kl else row.heldout_loss for row in rows]
        known = [
            (value, row)
            for value, row in zip(wanted, rows, strict=True)
            if value is not None and math.isfinite(value)
        ]
        return min(known, key=lambda pair: pair[0])[1] if known else None


class OldMeasure(Measure):
    """The same table under the name that earlier versions gave it."""

    FILE: ClassVar[str] = "judged.csv"


def measures_file(folder: Path) -> Path | None:
    """Return the table of further evaluation in a run's folder; None if there is none."""
    paths = (folder / kind.FILE for kind in (Measure, OldMeasure))
    return next((path for path in paths if path.is_file()), None)


def read_measures(folder: Path) -> tuple[Measure, ...]:
    """Return the rows of the table of further evaluation; empty if there is none."""
    return Measure.read(folder) or OldMeasure.read(folder)


@dataclass(frozen=True, kw_only=True)
class Saved(JsonResult):
    """complete.json of a training checkpoint, written last: where training stood."""

    FILE: ClassVar[str] = "complete.json"

    step: int
    heldout_loss: float | None = None
    """None if it was not measured at this step."""
    heldout_kl: float | None = None
    tokens: int = 0
    training_s: float = 0.0
    best_step: int
    best_loss: float = math.inf
    """Lowest held-out loss so far, in nats per token."""
    best_kl: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A line of metrics.jsonl: one training step."""

    step: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    """Trained on so far."""
    tokens_per_s: float | None = None
    memory_mib: float | None = None
    """Peak so far."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A line of metrics.jsonl: the held-out loss at a step, in nats per token."""

    step: int
    heldout_loss: float | None = None
    heldout_loss_dense: float | None = None
    heldout_loss_before: float | None = None
    recovered: float | None = None
    heldout_kl: float | None = None
    recovered_kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A line of metrics.jsonl: something that was noticed (`core.retrain.diagnostics.Finding`)."""

    step: int | None = None
    kind: str = ""
    message: str = ""
    """What was noticed, and what to try."""


Metric = Step | Evaluation | Notice
_EVENTS: dict[type, str] = {Evaluation: "eval", Notice: "finding"}
"""Of the lines that are not steps."""
_STEP = tuple(f.name for f in dataclasses.fields(Step))


def notice(finding: Finding) -> Notice:
    """Return the line that tells of a finding."""
    return Notice(step=finding.step, kind=finding.kind, message=str(finding))


def report(progress: Progress, value: Metric) -> None:
    """Add a line to metrics.jsonl."""
    event = _EVENTS.get(type(value))
    named = {"event": event} if event else {}
    progress.metric(**named, **dataclasses.asdict(value))


def metric(line: bytes | str) -> Metric | None:
    """Return what a line of metrics.jsonl says; None if it cannot be read."""
    try:
        value = outside.loads(line, finite=False)
    except outside.Malformed:
        return None
    if not isinstance(value, dict):
        return None
    event = value.get("event")
    for kind, name in _EVENTS.items():
        if event == name:
            return from_dict(kind, value)
    if event is None and isinstance(value.get("step"), int):
        known: dict[str, Any] = {name: value.get(name) for name in _STEP}
        return Step(**known)  # not checked field by field: a long run has 100,000 of them
    return None
