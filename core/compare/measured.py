"""The measured and the estimated cost of candidates, as rows with the columns of points.csv.

Rows of several benchmark runs are combined only if they were measured on the same device in the
same precision; of two measurements of the same point the newer one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from core.benchmark import analytic
from core.benchmark.analytic import Rates, Shapes
from core.benchmark.results import Cell, Point
from core.compare.candidates import Candidate
from core.compare.outcomes import Outcome
from core.study import Benchmark

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cost(Point):
    """What one candidate costs at one point of the grid, measured or estimated."""

    id: str = ""
    """Id of the candidate."""
    run: str = ""
    """The benchmark run; empty for an estimate."""
    speedup: float | None = None
    """Latency of the dense model over this one's, at the same point."""
    estimated: bool = False

    def row(self) -> Row:
        """Return a row of the table of points: what points.csv has, the run and the speed-up."""
        return {k: v for k, v in asdict(self).items() if k not in ("id", "estimated")}


def setting_of(bench: Benchmark) -> tuple[str, ...]:
    """Return what two runs must share to be drawn in one chart: device, its name, precision."""
    summary = bench.summary
    threads = str(summary.threads or "") if summary.device == "cpu" else ""
    return summary.device, summary.device_name, ", ".join(summary.dtypes), threads


def mixed_settings(runs: Sequence[Benchmark]) -> str:
    """Return a sentence if the runs cannot share a chart, otherwise an empty string."""
    first = runs[0] if runs else None
    for other in runs[1:]:
        if first and setting_of(other) != setting_of(first):
            one, two = (", ".join(filter(None, setting_of(b))) for b in (first, other))
            return (
                f"{first.id} was measured on {one}, {other.id} on {two}: their times are "
                "not comparable. Choose runs on the same device and in the same precision."
            )
    return ""


def comparable(runs: Iterable[Benchmark]) -> list[Benchmark]:
    """Return the first run, which is the newest, and those measured in the same setting."""
    found = list(runs)
    return [b for b in found if setting_of(b) == setting_of(found[0])]


def costs_of(runs: Iterable[Benchmark]) -> list[Cost]:
    """Return the points of benchmark runs; of two of the same candidate and cell the newer one."""
    kept: dict[tuple[str, Cell], Cost] = {}
    for bench in sorted(runs, key=lambda b: b.record.started):
        for point in bench.points:
            if variant := bench.variant_of(point):
                kept[variant, point.cell] = Cost(**vars(point), id=variant, run=bench.id)
    return list(kept.values())


def with_speedup(costs: Sequence[Cost], dense: str, runs: Iterable[Benchmark] = ()) -> list[Cost]:
    """Return the costs with ``speedup``: the dense median latency over this one's, at one point.

    The dense model is that of the same one of ``runs``, if it was measured there. The same figure
    as `core.compare.speed` gives with its noise: a few slow runs move a mean far.
    """
    base = {c.cell: _middle(c) for c in costs if c.id == dense}
    beside = {
        (bench.id, point.cell): point.latency_s_p50 or point.latency_s_mean
        for bench in runs
        for point in bench.points
        if bench.variant_of(point) == dense
    }
    result = []
    for cost in costs:
        over, own = beside.get((cost.run, cost.cell)) or base.get(cost.cell), _middle(cost)
        result.append(replace(cost, speedup=over / own if over and own else None))
    return result


def _middle(cost: Cost) -> float | None:
    return cost.latency_s_p50 or cost.latency_s_mean


def estimate(
    shapes: Shapes, rates: Rates | None, cell: Cell, dtype: str, *, id: str = "", variant: str = ""
) -> Cost:
    """Return the estimated cost of a model at one cell: always memory, and times with ``rates``.

    Times of quantized models are not estimated: widening the weights is not part of the model.
    """
    batch, given, made = cell
    memory = analytic.memory_bytes(shapes, batch, given, made, dtype)["total"]
    cost = Cost(
        id=id,
        variant=variant,
        batch_size=batch,
        input_tokens=given,
        output_tokens=made,
        peak_memory_mib=memory / 2**20,
        estimated=True,
    )
    if rates is None or getattr(shapes, "quantization", None):
        return cost
    whole = analytic.latency_s(shapes, rates, batch, given, made)
    first = analytic.first_token_s(shapes, rates, batch, given)
    return replace(
        cost,
        latency_s_mean=whole,
        latency_s_p50=whole,
        first_token_s=first,
        per_token_s=(whole - first) / (made - 1) if made > 1 else None,
        tokens_per_s=batch * made / whole,
    )


def rescaled(guess: Cost, real: Cost | None, same: Cost | None) -> Cost:
    """Return an estimate times what was measured of another model over the estimate of it.

    ``real`` and ``same``: that model's measured and estimated cost at the same point; without them
    the estimate stays as it is.
    """
    if real is None or same is None:
        return guess
    changes = {}
    for name in ("peak_memory_mib", "latency_s_mean", "latency_s_p50", "first_token_s",
                 "per_token_s"):  # fmt: skip
        value, over, under = (getattr(cost, name) for cost in (guess, real, same))
        if value and over and under:
            changes[name] = value * over / under
    found = replace(guess, **changes)
    whole = found.latency_s_mean
    return replace(found, tokens_per_s=found.batch_size * found.output_tokens / whole) if (
        whole and found.tokens_per_s) else found  # fmt: skip


def cells(costs: Iterable[Cost]) -> list[Cell]:
    """Return the cells of the grid that were measured, in order."""
    return sorted({c.cell for c in costs})


def table(
    found: Sequence[Candidate],
    costs: Sequence[Cost],
    cell: Cell | None,
    estimates: Mapping[str, Cost] | None = None,
) -> list[Outcome]:
    """Return one outcome per candidate at one cell of the grid.

    Its cost is measured, estimated (from ``estimates``, by id), "did not fit", or unknown.
    """
    at = {c.id: c for c in costs if cell is None or c.cell == cell}
    dense = next((c for c in found if c.kind == "dense"), None)
    result = []
    for candidate in found:
        real = at.get(candidate.id)
        guess = (estimates or {}).get(candidate.id)
        cost = real or guess
        source = "measured" if real else "estimated" if guess else "unknown"
        if real and real.oom:
            source = "did not fit"
        relative = candidate.ppl / dense.ppl if candidate.ppl and dense and dense.ppl else None
        outcome = Outcome(candidate, relative, kind_of_cost=source)
        result.append(_with_cost(outcome, cost) if cost else outcome)
    return result


def _with_cost(outcome: Outcome, cost: Cost) -> Outcome:
    return replace(
        outcome,
        latency_s=cost.latency_s_mean,
        first_token_ms=_ms(cost.first_token_s),
        per_token_ms=_ms(cost.per_token_s),
        tokens_per_s=cost.tokens_per_s,
        speedup=cost.speedup,
        memory_mib=cost.peak_memory_mib,
        reserved_mib=cost.reserved_mib,
        process_mib=cost.process_mib,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
