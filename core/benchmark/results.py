"""The files of a benchmark run as dataclasses: the only module that knows their keys and columns.

summary.json is a `Summary`; points.csv has a `Point` and runs.csv a `TimedRun` per row. No torch
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from core.benchmark import analytic
from core.benchmark.analytic import Errors, Rates
from core.runs.results import CsvRow, JsonResult

if TYPE_CHECKING:
    from core.runs.workspace import Workspace

Cell = tuple[int, int, int]
"""Batch size, input tokens, output tokens."""
Limit = Literal["", "memory", "kernels"]
WHY: dict[str, str] = {
    "memory": "out of memory",
    "kernels": "too large for the GPU's kernels, whatever its memory",
}
"""What a batch that is too large runs into."""


@dataclass(frozen=True, kw_only=True)
class Point(CsvRow):
    """One row of points.csv: one variant at one batch size and output length.

    Times are over the timed runs of all visits; without any (out of memory) they are None.
    """

    FILE: ClassVar[str] = "points.csv"

    variant: str
    """Name of the variant in this run."""
    batch_size: int
    input_tokens: int = 0
    output_tokens: int = 0
    latency_s_mean: float | None = None
    """Seconds of a whole generation."""
    latency_s_std: float | None = None
    latency_s_p50: float | None = None
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    """New tokens of the whole batch."""
    peak_memory_mib: float | None = None
    utilisation_pct: float | None = None
    oom: bool = False
    """Whether it did not fit on any visit: out of memory, unless `limit` says otherwise."""
    runs: int = 0
    latency_s_p10: float | None = None
    latency_s_p90: float | None = None
    per_token_s: float | None = None
    """Seconds per token after the first."""
    reserved_mib: float | None = None
    """Memory held by the allocator."""
    process_mib: float | None = None
    utilisation_max_pct: float | None = None
    visits: int = 0
    estimated_latency_s: float | None = None
    estimated_memory_mib: float | None = None
    limit: Limit = ""
    """What it ran into if it did not fit; empty in files of earlier versions."""

    @property
    def cell(self) -> Cell:
        """The point of the grid."""
        return self.batch_size, self.input_tokens, self.output_tokens

    @property
    def why_unmeasured(self) -> str:
        """What it ran into, in words; empty if it was measured."""
        return WHY[self.limit or "memory"] if self.oom else ""


@dataclass(frozen=True, kw_only=True)
class CompiledPoint(Point):
    """One row of compiled.csv: a point generated with a static cache and compiled steps.

    A second series beside the points of points.csv, never mixed with them. Nothing is estimated.
    """

    FILE: ClassVar[str] = "compiled.csv"

    compile_s: float | None = None
    """Seconds of the slowest first generation, which compiles; it is not among the timed runs."""


@dataclass(frozen=True, kw_only=True)
class TimedRun(CsvRow):
    """One row of runs.csv: one timed generation."""

    FILE: ClassVar[str] = "runs.csv"

    variant: str
    batch_size: int
    input_tokens: int = 0
    output_tokens: int = 0
    visit: int
    run: int = 0
    """Number of the run on its visit, from 0."""
    latency_s: float
    first_token_s: float | None = None

    @property
    def cell(self) -> Cell:
        """The point of the grid."""
        return self.batch_size, self.input_tokens, self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest batch that fits."""

    batch_size: int
    """0 if the weights alone do not fit."""
    fails_at: int | None = None
    """A batch that did not fit; 65,536 if the largest that GPU kernels take does; None if the time
    limit came first."""
    output_tokens: int | None = None
    limit: str = "memory"
    """What ended the search: memory, kernels (GPU kernels take no larger batch), or time."""
    confirmed: bool = True
    """Whether a whole generation was made with it, not only its end."""


@dataclass(frozen=True, kw_only=True)
class MeasuredVariant:
    """A checkpoint that was measured."""

    name: str
    path: str = ""
    parameters: int | None = None
    blocks: int | None = None
    dtype: str = ""
    weight_bytes: int | None = None
    capacity_mib: float | None = None
    """Memory of the device, or the limit that was set."""
    largest_batch: Largest | None = None
    uncompiled: str = ""
    """Why it could not be measured with compiled steps, if that was asked for and failed."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A point that was not measured, because a smaller one did not fit."""

    variant: str
    batch_size: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings."""

    top_k: int
    top_p: float


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Errors of the analytic model against the measurements."""

    latency: Errors = Errors()
    memory: Errors = Errors()


@dataclass(frozen=True, kw_only=True)
class Summary(JsonResult):
    """summary.json of a benchmark run."""

    device: str = ""
    device_name: str = ""
    threads: int | None = None
    torch: str = ""
    transformers: str = ""
    prompt: str = ""
    input_tokens: int | None = None
    sampling: Sampling | None = None
    seed: int | None = None
    random_weights: bool = False
    compiled: bool = False
    """Whether a second series was measured with a static cache and compiled steps."""
    runs_asked: int | None = None
    warmup_asked: int | None = None
    order: tuple[str, ...] = ()
    """Names of the variants in the order of their visits."""
    peak_memory: str = ""
    """Meaning of the points' peak_memory_mib: tensors, or process growth."""
    memory_limit_mib: int | None = None
    skipped: tuple[Skipped, ...] = ()
    seconds: float | None = None
    variants: tuple[MeasuredVariant, ...] = ()
    rates: Rates | None = None
    """The device's measured rates."""
    analytic: Accuracy | None = None

    @property
    def dtypes(self) -> list[str]:
        """Precisions of the variants, each once."""
        return sorted({v.dtype for v in self.variants})


def accuracy(points: Iterable[Point]) -> Accuracy:
    """Return the errors of estimated latency and memory, without out-of-memory points."""
    rows = list(points)
    latency = ((p.estimated_latency_s, p.latency_s_mean) for p in rows)
    memory = ((p.estimated_memory_mib, p.peak_memory_mib) for p in rows)
    return Accuracy(
        latency=analytic.errors((e, m) for e, m in latency if e is not None and m),
        memory=analytic.errors((e, m) for e, m in memory if e is not None and m),
    )


def known_rates(where: Workspace, device: str = "", dtype: str = "") -> Rates | None:
    """Return the rates of a device in a dtype from the workspace's newest benchmark run.

    Without a device or a dtype, the newest of any; of several GPUs, any counts. None if nothing was
    measured: any benchmark run measures the rates, and ``--rates-only`` measures nothing else.
    """
    kind = device.partition(":")[0]
    for record in where.runs("benchmark"):
        found = None if record.is_elsewhere else Summary.read(record.path)
        rates = found.rates if found else None
        same = found is not None and kind in ("", found.device.partition(":")[0])
        if rates and same and dtype in ("", rates.dtype):
            return rates
    return None
