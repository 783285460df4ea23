"""How much faster one model is than another, and how much of that is noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.benchmark.results import Cell, Point, TimedRun
from core.study import Benchmark, Study

NOISY = 0.25
"""With more noise than this a measurement says nothing about a speed-up: measure again."""


@dataclass(frozen=True)
class Speed:
    """A speed-up over another model, with its noise."""

    factor: float
    """Median latency of the other over the median of this one."""
    noise: float
    """Relative uncertainty of the factor: 0.05 means plus or minus 5 %."""

    @property
    def is_known(self) -> bool:
        """Whether the measurement is clear enough to tell any change from none."""
        return self.noise <= NOISY

    def __str__(self) -> str:
        """Return the factor and its noise, e.g. 1.42 x dense (noise 3%), or "no change"."""
        if not self.is_known:
            return f"{self.factor:.2f} x dense (too noisy to tell: noise {self.noise:.0%})"
        if abs(self.factor - 1) <= self.noise:
            return f"{self.factor:.2f} x dense (no change beyond the noise of {self.noise:.0%})"
        return f"{self.factor:.2f} x dense (noise {self.noise:.0%})"


def spread(visits: Mapping[str, Sequence[float]]) -> float:
    """Return the relative uncertainty of a median over visits.

    Twice the standard error of the median, 1.2533 s / sqrt(n), with s from the quartiles; or half
    the difference between the medians of the visits, if that is larger.
    """
    times = sorted(t for visit in visits.values() for t in visit)
    middle = statistics.median(times)
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [middle] * 3
    deviation = (quarters[2] - quarters[0]) / 1.349
    error = 2 * 1.2533 * deviation / len(times) ** 0.5
    medians = [statistics.median(v) for v in visits.values() if v]
    drift = (max(medians) - min(medians)) / 2
    return max(error, drift) / middle


def speed_up(base: Mapping[str, Sequence[float]], own: Mapping[str, Sequence[float]]) -> Speed:
    """Return how much faster ``own`` is than ``base``: latencies in seconds by visit."""
    middle = [statistics.median(t for v in x.values() for t in v) for x in (base, own)]
    return Speed(middle[0] / middle[1], (spread(base) ** 2 + spread(own) ** 2) ** 0.5)


def speeds_at(study: Study, bench: Benchmark, cell: Cell) -> dict[str, Speed]:
    """Return by label the speed-up of each smaller checkpoint over the dense one, with its noise.

    From the individual runs of runs.csv, by visit; if they are missing, from mean and deviation.
    """
    times: dict[str, dict[str, list[float]]] = {}
    for row in TimedRun.read(bench.record.path):
        if row.cell == cell and row.latency_s:
            visits = times.setdefault(bench.variant_of(row), {})
            visits.setdefault(str(row.visit), []).append(row.latency_s)
    points = {bench.variant_of(p): p for p in bench.points if p.cell == cell and not p.oom}
    dense = study.dense.id
    found = {}
    labels = {
        v.id: v.label
        for v in study.variants
        if (v.id in times or v.id in points) and v.is_made and (v.ratio or v.quantized)
    }
    for name, label in labels.items():
        if name in times and dense in times:
            found[label] = speed_up(times[dense], times[name])
        elif speed := _from_points(points.get(dense), points.get(name)):
            found[label] = speed
    return found


def _from_points(dense: Point | None, own: Point | None) -> Speed | None:
    """Return a speed from medians; its noise is two standard errors of each mean, combined."""
    if not dense or not own or not dense.latency_s_mean or not own.latency_s_mean:
        return None
    slow, fast = (p.latency_s_p50 or p.latency_s_mean or 0.0 for p in (dense, own))
    shares = [
        2 * (p.latency_s_std or 0) / p.latency_s_mean / p.runs**0.5
        for p in (dense, own)
        if p.latency_s_mean and p.runs
    ]
    return Speed(slow / fast, sum(s**2 for s in shares) ** 0.5)
