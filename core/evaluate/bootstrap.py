"""lm-eval's bootstrap of standard errors, within this process.

lm-eval forks a pool of processes for the metrics that it resamples, e.g. perplexity of
lambada_openai. A child that is forked while other threads hold locks may wait for ever, and with it
the run. Here the same resamples are drawn in this process: with numpy for a mean (its generator
gives the numbers of Python's `random`), otherwise by lm-eval's own loop.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CHUNK = 1000
"""Resamples of one seed, as in lm-eval."""
_DRAWS = 4_000_000
"""Indices drawn at once."""


@contextlib.contextmanager
def in_this_process(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let lm-eval bootstrap without other processes; ``check`` may stop it and is called often."""
    from lm_eval.api import metrics

    plain = metrics.bootstrap_stderr
    of_means = {metrics.mean: _same, metrics.perplexity: _perplexity}

    def stderr(f: Callable[[Sequence[Any]], float], xs: Sequence[Any], iters: int) -> float:
        if finish := of_means.get(f):
            return float(metrics.sample_stddev(finish(means(xs, iters, check))))
        return float(metrics.sample_stddev(_one_by_one(f, xs, iters, check)))

    metrics.bootstrap_stderr = stderr
    try:
        yield
    finally:
        metrics.bootstrap_stderr = plain


def means(xs: Sequence[float], iters: int, check: Callable[[], None] = lambda: None) -> list[float]:
    """Return the means of the resamples of ``xs`` that lm-eval draws."""
    import numpy

    values, size, found = numpy.asarray(xs, dtype=numpy.float64), len(xs), list[float]()
    chunk = min(CHUNK, iters)
    for seed in range(iters // chunk):
        draw = numpy.random.RandomState([seed])  # an array: seeded as Python's generator is
        left = chunk
        while left:
            check()
            rows = min(left, max(1, _DRAWS // size))
            at = (draw.random_sample((rows, size)) * size).astype(numpy.intp)
            found += values[at].mean(axis=1).tolist()
            left -= rows
    return found


def _one_by_one(
    f: Callable[[Sequence[Any]], float], xs: Sequence[Any], iters: int, check: Callable[[], None]
) -> list[float]:
    chunk = min(CHUNK, iters)
    found = []
    for seed in range(iters // chunk):
        check()
        draw = random.Random(seed)
        found += [f(draw.choices(xs, k=len(xs))) for _ in range(chunk)]
    return found


def _same(values: list[float]) -> list[float]:
    return values


def _perplexity(values: list[float]) -> list[float]:
    import numpy

    return list(numpy.exp(-numpy.array(values)).tolist())
