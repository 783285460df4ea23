"""The measurement grid, its order, and the merging of single runs into points (no torch).

The paper's protocol (Shortened LLaMA, arXiv 2402.02834, section 4): one prompt repeated B times,
a forced output length, sampling with top-k 50 and top-p 0.95, and uncounted warm-up runs. Each
variant is visited at least twice, in alternating order, so that drift affects all equally.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from core.benchmark.results import Limit, Point

PROMPT = "The Leaning Tower of Pisa is known for"
TOP_K = 50
TOP_P = 0.95


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    batch_size: int
    output_tokens: int


@dataclasses.dataclass(frozen=True)
class CellResult:
    """The measurements of one visit at one cell; cells that do not fit (``oom``) have no runs."""

    cell: Cell
    visit: int
    latencies_s: tuple[float, ...] = ()
    first_tokens_s: tuple[float, ...] = ()
    allocated_mib: float | None = None
    reserved_mib: float | None = None
    process_mib: float | None = None
    utilisation_pct: tuple[float, ...] = ()
    oom: bool = False
    limit: Limit = ""
    """What it ran into if it did not fit."""
    compile_s: float | None = None
    """Of compiled steps: seconds of the first generation, which compiles and is not counted."""


def visit_order(variants: Sequence[str], visits: int) -> list[tuple[int, str]]:
    """Return (visit, variant) in measurement order: A B C, C B A, A B C, ..."""
    order: list[tuple[int, str]] = []
    for visit in range(visits):
        step = 1 if visit % 2 == 0 else -1
        order += [(visit, name) for name in variants[::step]]
    return order


def cells(batch_sizes: Sequence[int], output_tokens: Sequence[int]) -> list[Cell]:
    """Return the grid: for each output length, the batches from small to large."""
    return [Cell(b, o) for o in sorted(set(output_tokens)) for b in sorted(set(batch_sizes))]


def share(total: int, visits: int, visit: int) -> int:
    """Return how many of ``total`` runs belong to a visit; they sum to ``total`` over visits."""
    return total // visits + (1 if visit < total % visits else 0)


def percentile(values: Sequence[float], at: float) -> float:
    """Return the quantile ``at`` (0 to 1) with linear interpolation between neighbours."""
    ordered = sorted(values)
    place = at * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _largest(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return max(known) if known else None


def point(
    variant: str,
    input_tokens: int,
    results: Sequence[CellResult],
    *,
    estimated_latency_s: float | None = None,
    estimated_memory_mib: float | None = None,
) -> Point:
    """Merge the visits of one cell into a row of points.csv.

    If any visit did not fit, neither did the point. Times are over the runs of all visits; memory
    is the maximum. If tensors were not counted, the allocator's memory stands for the peak.
    """
    cell = results[0].cell
    made = Point(
        variant=variant,
        batch_size=cell.batch_size,
        input_tokens=input_tokens,
        output_tokens=cell.output_tokens,
        oom=any(r.oom for r in results),
        visits=len(results),
        estimated_latency_s=estimated_latency_s,
        estimated_memory_mib=estimated_memory_mib,
        limit=next((r.limit for r in results if r.oom), ""),
    )
    if made.oom:
        return made
    times = [t for r in results for t in r.latencies_s]
    firsts = [t for r in results for t in r.first_tokens_s]
    busy = [u for r in results for u in r.utilisation_pct]
    allocated = _largest([r.allocated_mib for r in results])
    held = _largest([r.reserved_mib for r in results])
    mean, first = statistics.fmean(times), statistics.fmean(firsts)
    rest = cell.output_tokens - 1
    return dataclasses.replace(
        made,
        latency_s_mean=mean,
        latency_s_std=statistics.stdev(times) if len(times) > 1 else None,
        latency_s_p50=statistics.median(times),
        latency_s_p10=percentile(times, 0.1),
        latency_s_p90=percentile(times, 0.9),
        first_token_s=first,
        per_token_s=(mean - first) / rest if rest else None,
        tokens_per_s=cell.batch_size * cell.output_tokens / mean,
        peak_memory_mib=held if allocated is None else allocated,
        reserved_mib=held,
        process_mib=_largest([r.process_mib for r in results]),
        utilisation_pct=statistics.fmean(busy) if busy else None,
        utilisation_max_pct=max(busy) if busy else None,
        runs=len(times),
    )
