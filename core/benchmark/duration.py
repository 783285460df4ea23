"""How long a benchmark takes: estimated before it starts, and what is left while it runs. No torch.

One point at one visit takes its warm-up and its runs, or what the time limit gives it, but at least
`LEAST` generations; before its first point, each visit starts a process and loads the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from core.benchmark import analytic, protocol
from core.benchmark.analytic import Rates
from core.benchmark.protocol import Cell
from core.checkpoint.headers import CheckpointInfo

LEAST = 3
"""Generations of a point at a visit, whatever the limit: one to warm up, and two that count."""
START_S = 5.0
"""A visit's process and its model, roughly."""
COMPILE_S = 40.0
"""Compiling a model's steps at a visit, roughly; a later visit finds most of it in torch's cache.
Measured: 75 s of a model of 14 blocks at first, on one busy core."""


def generation_s(info: CheckpointInfo, rates: Rates | None, tokens: int, cell: Cell) -> float:
    """Return the seconds of one generation; without rates, of a device that reads 10 GB/s.

    Widening quantized weights is not part of the rates: their generations may take longer.
    """
    if rates is None:
        return 4.0 * info.parameters * cell.output_tokens / 1e10
    return analytic.latency_s(info, rates, cell.batch_size, tokens, cell.output_tokens)


def point_s(one_s: float, runs: int, limit_s: float | None) -> float:
    """Return the seconds of a point at one visit; ``runs`` includes the warm-up."""
    usual = one_s * max(runs, LEAST)
    return usual if limit_s is None else max(min(usual, limit_s), LEAST * one_s)


class Work:
    """The visits that a benchmark makes, in estimated seconds, and what was done of them."""

    def __init__(
        self,
        variants: Sequence[tuple[str, CheckpointInfo]],
        grid: Sequence[Cell],
        *,
        rates: Rates | None,
        input_tokens: int,
        runs: int,
        warmup: int,
        visits: int,
        point_limit_s: float | None = None,
        compiled: bool = False,
    ) -> None:
        """Estimate every point; ``runs`` and ``warmup`` are those of all visits together.

        ``compiled``: every point is measured a second time, with compiled steps.
        """
        self._one = {
            (name, cell): generation_s(info, rates, input_tokens, cell)
            for name, info in variants
            for cell in grid
        }
        count = max(1, -(-warmup // visits)) + protocol.share(runs, visits, 0)
        self._part = {
            key: START_S / len(grid) + point_s(one, count, point_limit_s)
            for key, one in self._one.items()
        }
        self.visits = visits
        series = 1 + compiled
        self.total_s = visits * series * sum(self._part.values())
        self.total_s += visits * COMPILE_S * len(variants) * compiled
        self.least_s = visits * series * sum(LEAST * one for one in self._one.values())
        """What the shortest possible measurement generates, without starting processes."""
        self.done_s = 0.0

    def finish(self, name: str, cells: Iterable[Cell]) -> None:
        """Count these points of one visit as done."""
        self.done_s += sum(self._part.get((name, cell), 0.0) for cell in cells)

    def left_s(self, spent_s: float, skipped_s: float = 0.0) -> float | None:
        """Return the seconds left, at the pace so far; None before the first point.

        ``spent_s``: since the first visit began; ``skipped_s``: of `done_s`, what took no time.
        """
        worked = self.done_s - skipped_s
        if worked <= 0:
            return None
        return max(0.0, (self.total_s - self.done_s) * spent_s / worked)
