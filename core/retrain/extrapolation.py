"""How many more tokens a recovery needs, estimated from a run so far. No torch.

What is left of the gap after t tokens, r(t) = 1 - recovered(t), is fitted by a power law that
begins at 1, r(t) = (1 + t / c)^(-b), with least squares over a grid of b and c. The interval holds
every curve of the grid whose sum of squares is within the 90 % confidence region of the best: below
S (1 - 0.9)^(-2 / (n - 2)) for n points and two parameters (the quantile of F with 2 and n - 2
degrees of freedom has this closed form). The law assumes that all of the gap can come back and
that the learning rate falls as slowly as the training gets longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_POINTS = 4
LEAST_RECOVERED = 0.05
"""Below this share at the end there is nothing to extrapolate."""
CONFIDENCE = 0.9
FARTHEST = 1000.0
"""Estimates of more tokens than this many times those of the run are not given as numbers."""


@dataclass(frozen=True)
class Fit:
    """A power law through the shares recovered after some tokens."""

    exponent: float
    scale: float
    """Tokens after which the curve bends."""
    curves: np.ndarray
    """Exponents and scales [curves, 2] within the interval."""
    last: float
    """Tokens of the last point."""

    def at(self, tokens: float) -> tuple[float, float, float]:
        """Return the share recovered after ``tokens``: best estimate, lowest and highest."""
        shares = 1 - (1 + tokens / self.curves[:, 1]) ** -self.curves[:, 0]
        best = 1 - (1 + tokens / self.scale) ** -self.exponent
        return float(best), float(shares.min()), float(shares.max())

    def needed(self, share: float) -> tuple[float, float, float]:
        """Return the tokens that recover ``share``: best estimate, fewest and most."""
        with np.errstate(over="ignore"):
            found = self.curves[:, 1] * ((1 - share) ** (-1 / self.curves[:, 0]) - 1)
            best = self.scale * (np.float64(1 - share) ** (-1 / self.exponent) - 1)
        return float(best), float(found.min()), float(found.max())


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Return the power law through (tokens, share recovered), None if they do not allow it.

    At least `LEAST_POINTS` points after the start are needed, the last with a recovered share of
    `LEAST_RECOVERED` or more and less than 1.
    """
    known = sorted((t, s) for t, s in points if t > 0 and math.isfinite(s))
    if len(known) < LEAST_POINTS or not LEAST_RECOVERED <= known[-1][1] < 1:
        return None
    tokens, shares = (np.array(side, dtype=float) for side in zip(*known, strict=True))
    exponents = np.geomspace(0.02, 8, 120)[:, None, None]
    scales = np.geomspace(tokens[0] / 100, tokens[-1] * 100, 120)[None, :, None]
    left = (1 + tokens / scales) ** -exponents
    squares = ((left - (1 - shares)) ** 2).sum(-1)
    best = np.unravel_index(squares.argmin(), squares.shape)
    limit = squares[best] * (1 - CONFIDENCE) ** (-2 / (len(known) - 2))
    inside = np.argwhere(squares <= limit)
    curves = np.stack([exponents[inside[:, 0], 0, 0], scales[0, inside[:, 1], 0]], axis=1)
    return Fit(
        float(exponents[best[0], 0, 0]), float(scales[0, best[1], 0]), curves, float(tokens[-1])
    )


def in_words(found: Fit, share: float, measure: str) -> str:
    """Return the estimate in a sentence; ``measure``: loss or KL."""
    best, fewest, most = found.needed(share)
    if best <= found.last:
        return ""
    limit = FARTHEST * found.last
    about = f"to recover {share:.0%} by {measure}"
    if best > limit:
        return f"Estimate: {about}, more than {_count(limit)} tokens would be needed."
    upper = f"to {_count(most)}" if most <= limit else "and more"
    return f"Estimate: {about}, about {_count(best)} tokens are needed ({_count(fewest)} {upper})."


def _count(tokens: float) -> str:
    for unit, divisor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= divisor:
            return f"{tokens / divisor:.3g} {unit}"
    return f"{tokens:.0f}"
