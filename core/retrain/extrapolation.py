"""How many more tokens a recovery needs, estimated from a run so far. No torch.

What is left of the gap after t tokens, r(t) = 1 - recovered(t), is fitted by a power law that
begins at 1 and falls to a floor f, r(t) = f + (1 - f) (1 + t / c)^(-b): without the floor, all of
the gap would come back some day, which runs that went on do not confirm
(docs/results/extrapolation.md). Least squares over a grid of b, c and f. The interval holds every
curve of the grid whose sum of squares is within the 90 % confidence region of the best, below
S (1 + 3 / (n - 3) F) for n points, with the quantile F of the F distribution with 3 and n - 3
degrees of freedom. The law assumes that the learning rate falls as slowly as the training gets
longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_POINTS = 5
LEAST_RECOVERED = 0.05
"""Below this share at the end there is nothing to extrapolate."""
CONFIDENCE = 0.9
FARTHEST = 1000.0
"""Estimates of more tokens than this many times those of the run are not given as numbers."""
RESOLUTION = 0.004
"""Shares are not told apart below this: the grid has no finer curves."""
_STEPS, _FLOORS = 60, np.linspace(0, 0.95, 39)
"""Values of exponent and scale, and floors, that are tried."""


@dataclass(frozen=True)
class Fit:
    """A power law through the shares recovered after some tokens."""

    best: np.ndarray
    """Exponent, scale (tokens after which the curve bends) and floor [3]."""
    curves: np.ndarray
    """The same of every curve within the interval [curves, 3]."""
    last: float
    """Tokens of the last point."""

    @property
    def floor(self) -> float:
        """Share of the gap that is never recovered, as the best curve has it."""
        return float(self.best[2])

    def at(self, tokens: float) -> tuple[float, float, float]:
        """Return the share recovered after ``tokens``: best estimate, lowest and highest."""
        best, shares = (_share(curves, tokens) for curves in (self.best, self.curves))
        return float(best), float(shares.min()), float(shares.max())

    def needed(self, share: float) -> tuple[float, float, float]:
        """Return the tokens that recover ``share``: best estimate, fewest and most.

        Infinite where a curve's floor is above what would be left.
        """
        best, found = (_tokens(curves, share) for curves in (self.best, self.curves))
        return float(best), float(found.min()), float(found.max())


def _share(curves: np.ndarray, tokens: float) -> np.ndarray:
    exponents, scales, floors = np.moveaxis(curves, -1, 0)
    return np.asarray((1 - floors) * (1 - (1 + tokens / scales) ** -exponents))


def _tokens(curves: np.ndarray, share: float) -> np.ndarray:
    exponents, scales, floors = np.moveaxis(curves, -1, 0)
    with np.errstate(over="ignore", divide="ignore"):
        left = np.maximum((1 - share - floors) / (1 - floors), 0.0)
        return np.asarray(scales * (left ** (-1 / exponents) - 1))


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Return the power law through (tokens, share recovered), None if they do not allow it.

    At least `LEAST_POINTS` points after the start are needed, the last with a recovered share of
    `LEAST_RECOVERED` or more and less than 1.
    """
    from scipy.special import fdtri

    known = sorted((t, s) for t, s in points if t > 0 and math.isfinite(s))
    if len(known) < LEAST_POINTS or not LEAST_RECOVERED <= known[-1][1] < 1:
        return None
    tokens, shares = (np.array(side, dtype=float) for side in zip(*known, strict=True))
    exponents = np.geomspace(0.02, 8, _STEPS)
    scales = np.geomspace(tokens[0] / 100, tokens[-1] * 100, _STEPS)
    law = 1 - (1 + tokens / scales[:, None]) ** -exponents[:, None, None]
    # |(1 - f) law - shares|^2, expanded: no array holds all curves at all points
    own, both = (law * law).sum(-1)[..., None], (law * shares).sum(-1)[..., None]
    squares = (1 - _FLOORS) ** 2 * own - 2 * (1 - _FLOORS) * both + (shares * shares).sum()
    best = np.unravel_index(squares.argmin(), squares.shape)
    freedom = len(known) - 3
    least = len(known) * RESOLUTION**2
    limit = max(squares[best], least) * (1 + 3 / freedom * fdtri(3, freedom, CONFIDENCE))
    inside = np.argwhere(squares <= limit)
    curves = np.stack(
        [exponents[inside[:, 0]], scales[inside[:, 1]], _FLOORS[inside[:, 2]]], axis=1
    )
    found = np.array([exponents[best[0]], scales[best[1]], _FLOORS[best[2]]])
    return Fit(found, curves, float(tokens[-1]))


def in_words(found: Fit, share: float, measure: str) -> str:
    """Return the estimate in a sentence; ``measure``: loss or KL."""
    best, fewest, most = found.needed(share)
    if best <= found.last:
        return ""
    limit = FARTHEST * found.last
    about = f"to recover {share:.0%} by {measure}"
    if fewest > limit:
        most_ever = float((1 - found.curves[:, 2]).max())
        if most_ever < share:
            return (
                f"Estimate: more tokens of the same recover at most {most_ever:.0%} by {measure}."
            )
        return f"Estimate: {about}, more than {_count(limit)} tokens would be needed."
    if best > limit:
        return f"Estimate: {about}, at least {_count(fewest)} tokens are needed, if any suffice."
    upper = f"to {_count(most)}" if most <= limit else "and more"
    return f"Estimate: {about}, about {_count(best)} tokens are needed ({_count(fewest)} {upper})."


def _count(tokens: float) -> str:
    for unit, divisor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= divisor:
            return f"{tokens / divisor:.3g} {unit}"
    return f"{tokens:.0f}"
