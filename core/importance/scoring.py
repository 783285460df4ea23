"""All requested scores of a model that is in memory; the command and the Python API share this."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.prune.score_results import AngularRow, BlockRow, DivergenceRow, GreedyRow, SampleRow
from core.runs.progress import SILENT, Progress

if TYPE_CHECKING:
    from core.importance.branches import Batch
    from core.importance.greedy import Round
    from core.importance.sweep import SweepResult
    from core.importance.taylor import WeightScore
    from core.model.blocks import BlockView

SIMILARITY = ("block-influence", "angular", "relative-update")


@dataclass
class Results:
    """Scores of one model; None for what was not requested."""

    blocks: int
    sweep: SweepResult | None = None
    taylor: list[WeightScore] | None = None
    magnitude: list[WeightScore] | None = None
    greedy: list[Round] | None = None
    sublayers: list[tuple[int, str, float]] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """By pass: sweep, taylor, magnitude, sublayers, sleb."""

    @property
    def dense_ppl(self) -> float | None:
        """Perplexity of the whole model; None without the metric ppl."""
        return self.sweep.dense_ppl if self.sweep else None

    def block_rows(self) -> list[BlockRow]:
        """Return the rows of blocks.csv."""
        from core.importance.taylor import block_sums

        found, none = self.sweep, [None] * self.blocks
        columns: tuple[Sequence[Any], ...] = (
            range(self.blocks),
            (found.ppl if found else []) or none,
            block_sums(self.taylor, self.blocks) if self.taylor else none,
            block_sums(self.magnitude, self.blocks) if self.magnitude else none,
            (found.block_influence if found else []) or none,
            (found.relative_update if found else []) or none,
            (found.kl if found else []) or none,
        )
        return [BlockRow(*row) for row in zip(*columns, strict=True)]

    def sample_rows(self) -> list[SampleRow]:
        """Return the rows of samples.csv: block -1 is the whole model."""
        return [
            SampleRow(branch - 1, sample, nll)
            for branch, row in enumerate(self.sweep.sample_nll if self.sweep else [])
            for sample, nll in enumerate(row)
        ]

    def divergence_rows(self) -> list[DivergenceRow]:
        """Return the rows of divergences.csv; empty without the metric kl."""
        return [
            DivergenceRow(block, sample, kl)
            for block, row in enumerate(self.sweep.sample_kl if self.sweep else [])
            for sample, kl in enumerate(row)
        ]

    def angular_rows(self) -> list[AngularRow]:
        """Return the rows of angular.csv."""
        return [AngularRow(*row) for row in (self.sweep.angular if self.sweep else [])]

    def greedy_rows(self) -> list[GreedyRow]:
        """Return the rows of greedy.csv."""
        return [GreedyRow(at, r.block, r.ppl) for at, r in enumerate(self.greedy or [], start=1)]


def compute(
    view: BlockView,
    batch: Batch,
    metrics: Collection[str],
    progress: Progress = SILENT,
    *,
    rounds: int | None = None,
    on_part: Callable[[Results], None] | None = None,
) -> Results:
    """Compute the ``metrics`` (names of `core.criteria.METRICS`) on a batch of rows.

    ``rounds``: blocks that sleb removes. ``on_part`` gets all that is known after each pass, the
    cheapest first. Raises `OutOfMemoryError` and `NotFiniteError`.
    """
    from core.importance.greedy import greedy
    from core.importance.sweep import sublayer_perplexity, sweep
    from core.importance.taylor import magnitude, taylor
    from core.model.memory import out_of_memory_explained

    wanted, results = set(metrics), Results(len(view))
    with_ppl = "ppl" in wanted
    ways: dict[str, tuple[set[str], str, Callable[[], Any]]] = {
        "magnitude": ({"magnitude"}, "magnitude", lambda: magnitude(view, batch.ranks)),
        "sweep": (
            {"ppl", "kl", *SIMILARITY},
            "sweep",
            lambda: sweep(view, batch, progress, perplexity=with_ppl, kl="kl" in wanted),
        ),
        "taylor": ({"taylor"}, "taylor", lambda: taylor(view, batch, progress)),
        "sublayers": (
            {"sublayers"},
            "sublayers",
            lambda: sublayer_perplexity(view, batch, progress),
        ),
        "sleb": ({"sleb"}, "greedy", lambda: greedy(view, batch, progress, rounds=rounds)),
    }
    with out_of_memory_explained("scoring blocks"):
        for name, (needs, field, way) in ways.items():
            if wanted & needs:
                began = time.perf_counter()
                setattr(results, field, way())
                results.seconds[name] = time.perf_counter() - began
                if on_part:
                    on_part(_only(wanted, results))
    return _only(wanted, results)


def _only(metrics: Collection[str], results: Results) -> Results:
    """Drop the by-products of the sweep that were not requested."""
    if results.sweep is not None:
        empty: dict[str, Any] = {}
        if "block-influence" not in metrics:
            empty["block_influence"] = []
        if "relative-update" not in metrics:
            empty["relative_update"] = []
        if "angular" not in metrics:
            empty["angular"] = []
        results.sweep = dataclasses.replace(results.sweep, **empty)
    return results
