"""How much faster one model is than another, and what of it is noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """A speed-up over another model with its noise, both as factors."""

    factor: float
    """Median latency of the other over the median of this one."""
    noise: float
    """Half the width in which the factor is uncertain, as a share: 0.05 is 5 %."""

    def __str__(self) -> str:
        """Return the factor and its noise, as 1.42 x dense (+-3 %), or that there is no change."""
        if abs(self.factor - 1) <= self.noise:
            return f"{self.factor:.2f} x dense (no change beyond the noise of {self.noise:.0%})"
        return f"{self.factor:.2f} x dense (noise {self.noise:.0%})"


def spread(visits: Mapping[str, Sequence[float]]) -> float:
    """Return the share by which a median over visits is uncertain.

    Twice the standard error of the median, 1.2533 s / sqrt(n), with s from the quartiles; or half
    of what the visits' own medians differ by, where that is more.
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
