"""What was measured of the checkpoint that a plan stands for: task accuracy and speed.

Removing the same blocks gives the same model, so a plan takes what runs measured of a variant from
which exactly these were removed and nothing else was done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from core.checkpoint.drop import Removal
from core.compare.speed import Speed, speeds_at
from core.study import Study, Task, Variant


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy of a plan over the tasks that dense was asked in the same way."""

    value: float | None
    """None if no variant of the plan was evaluated."""
    dense: float
    tasks: tuple[str, ...]
    samples: int | None
    """Questions of all tasks; None if a run did not record them."""


@dataclass(frozen=True)
class MeasuredSpeed:
    """A plan's speed in a benchmark run, and the dense model's in the same run."""

    speed: Speed
    tokens_per_s: float | None
    dense_tokens_per_s: float | None
    input_tokens: int
    output_tokens: int
    device: str
    dtype: str
    run: str


def made_of(study: Study, removal: Removal) -> list[Variant]:
    """Return the variants that are the dense model without ``removal`` and nothing else."""
    wanted = removal.ordered
    return [
        v
        for v in study.variants[1:]
        if v.kind == "depth"
        and not (v.retrained or v.healed or v.quantized)
        and v.removal.ordered == wanted
    ]


def accuracy_of(study: Study, removal: Removal) -> Accuracy | None:
    """Return the accuracy of a plan; None if the dense model has not been evaluated on tasks.

    Tasks count if dense was asked the same number of questions in the same way; of several
    measurements the newest counts.
    """
    dense = _scores(t for t in study.tasks if t.variant == study.dense.id)
    ids = {v.id for v in made_of(study, removal)} if removal else {study.dense.id}
    own = _scores(t for t in study.tasks if t.variant in ids)
    shared = [key for key in own if key in dense]
    chosen = shared or list(dense)
    if not chosen:
        return None
    counts = [dense[key].samples for key in chosen]
    known = [count for count in counts if count is not None]
    return Accuracy(
        sum(own[key].value for key in shared) / len(shared) if shared else None,
        sum(dense[key].value for key in chosen) / len(chosen),
        tuple(key[0] for key in chosen),
        sum(known) if len(known) == len(counts) else None,
    )


def _scores(tasks: Iterable[Task]) -> dict[tuple[str, str, int | None, str], Task]:
    """Return the newest accuracy by task and way of asking; of acc and acc_norm the latter."""
    found: dict[tuple[str, str, int | None, str], Task] = {}
    for task in sorted(tasks, key=lambda t: (t.metric == "acc_norm", t.started)):
        if task.metric in ("acc", "acc_norm"):
            found[task.task, "accuracy", task.samples, task.prompting] = task
    return found


def speed_of(study: Study, removal: Removal, batch: int, dtype: str) -> MeasuredSpeed | None:
    """Return the newest measured speed of a plan at a batch size; None if there is none."""
    made = {v.id: v for v in made_of(study, removal)}
    for bench in study.benchmarks:
        if dtype not in bench.summary.dtypes:
            continue
        own = [p for p in bench.points if bench.variant_of(p) in made and p.batch_size == batch]
        for point in sorted(own, key=lambda p: -p.output_tokens):
            speeds = speeds_at(study, bench, point.cell)
            speed = speeds.get(made[bench.variant_of(point)].label)
            base = (
                p.tokens_per_s
                for p in bench.points
                if p.cell == point.cell and bench.variant_of(p) == study.dense.id
            )
            if speed:
                return MeasuredSpeed(
                    speed,
                    point.tokens_per_s,
                    next(base, None),
                    point.input_tokens,
                    point.output_tokens,
                    bench.summary.device,
                    dtype,
                    bench.id,
                )
    return None
