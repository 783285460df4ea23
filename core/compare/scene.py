"""The data of the Compare page: a study by one protocol, with some benchmark runs.

Derived from the page's controls, whose state is in the address; no Streamlit here.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.benchmark import results
from core.benchmark.analytic import Rates, Shapes
from core.compare import measured
from core.compare.candidates import Candidate, candidates, nearest, shapes_of
from core.compare.measured import Cell, Cost
from core.compare.outcomes import Outcome
from core.study import Benchmark, Protocol, Study, info_of, tokenizer_conflict
from core.study.keeping import kept
from core.words import block_ranges, by_blocks, rounded

DEFAULT_CELLS: list[Cell] = [(batch, 12, 128) for batch in (1, 4, 16)]
"""Cells that are estimated if nothing was measured."""


@dataclass(frozen=True)
class Scene:
    """Everything shown in the page's charts and tables."""

    study: Study
    protocol: Protocol | None
    runs: tuple[Benchmark, ...]
    found: tuple[Candidate, ...] = ()
    rows: tuple[Cost, ...] = ()
    """Measured points with their speed-up."""
    rates: Rates | None = None
    capacity_mib: float | None = None

    @functools.cached_property
    def guesses(self) -> tuple[Cost, ...]:
        """Estimated points of candidates that were not measured at a cell."""
        return tuple(_guesses(self, self.dtype))

    @property
    def dtype(self) -> str:
        """The precision that estimates are for: what the runs computed in, else the rates'."""
        found = {dtype for bench in self.runs for dtype in bench.summary.dtypes}
        if len(found) == 1:
            return found.pop()
        if self.rates:
            return self.rates.dtype
        info = info_of(self.study.dense)
        return info.compute_dtype if info else "float32"

    @property
    def cells(self) -> list[Cell]:
        """The cells of the grid to choose from."""
        return measured.cells(self.rows) or DEFAULT_CELLS

    @property
    def ratios(self) -> list[float]:
        """Ratios of all cut candidates, ascending, each once."""
        cut = (c.ratio for c in self.found if c.kind in ("depth", "width") and c.ratio)
        return sorted({round(r, 3) for r in cut})

    @property
    def usual_ratio(self) -> float | None:
        """The ratio shown first: the median of the checkpoints', otherwise the one nearest to 0.2.

        If the cost of some was measured, the others do not count: their panels would be empty.
        """
        costed = {r.id for r in self.rows}
        made = [c for c in self.found if not c.is_plan and c.kind in ("depth", "width")]
        made = [c for c in made if c.id in costed] or made
        known = [round(c.ratio, 3) for c in made if c.ratio]
        wanted = statistics.median_low(known) if known else 0.2
        return min(self.ratios, key=lambda r: abs(r - wanted), default=None)

    def at_ratio(self, ratio: float | None) -> list[Candidate]:
        """Return dense and each series' candidate nearest to ``ratio``; all if it is None."""
        return list(self.found) if ratio is None else nearest(self.found, ratio)

    def all_rows(self, *, estimates: bool) -> list[Cost]:
        """Return the measured points, optionally followed by the estimated ones."""
        return [*self.rows, *(self.guesses if estimates else ())]

    def table(self, cell: Cell, *, estimates: bool) -> list[Outcome]:
        """Return one outcome per candidate at one cell of the grid."""
        guessed = {r.id: r for r in self.guesses if r.cell == cell} if estimates else None
        return measured.table(self.found, self.rows, cell, guessed)

    def problems(self) -> list[str]:
        """Return the reasons why figures are not comparable, one sentence each."""
        said = []
        gone = {name: b.id for b in self.runs for name in b.missing}
        if gone:
            names = ", ".join(gone)
            said.append(
                f"{names}: measured in {next(iter(gone.values()))}, but the checkpoint has since "
                "been deleted, so it is not shown. Create it again, or benchmark the others again."
            )
        evaluated = [c for c in self.found if not c.is_plan and c.ppl]
        said += [tokenizer_conflict(evaluated), measured.mixed_settings(self.runs)]
        return [s for s in said if s]


def scene(
    study: Study, protocol: Protocol | None, runs: Sequence[Benchmark], rates: Rates | None = None
) -> Scene:
    """Combine measurements and estimates; ``rates`` are used if no chosen run has any."""
    return _scene(study, protocol, tuple(runs), rates)


@kept
def _scene(
    study: Study, protocol: Protocol | None, runs: tuple[Benchmark, ...], rates: Rates | None
) -> Scene:
    measured_ids = {b.variant_of(p) for b in runs for p in b.points}
    found = [c for c in candidates(study, protocol) if c.kind != "other" or c.id in measured_ids]
    rows = measured.with_speedup(measured.costs_of(runs), study.dense.id, runs)
    rates = _rates(runs) or rates
    known = (study, protocol, runs, tuple(found), tuple(rows), rates, _capacity(runs))
    return Scene(*known)


def _rates(runs: Sequence[Benchmark]) -> Rates | None:
    """Return the device's rates from the newest run."""
    for bench in sorted(runs, key=lambda b: -b.record.started):
        if bench.summary.rates:
            return bench.summary.rates
    return None


def _capacity(runs: Sequence[Benchmark]) -> float | None:
    known = (v.capacity_mib for b in runs for v in b.summary.variants)
    return min((c for c in known if c), default=None)


def _guesses(scene: Scene, dtype: str) -> list[Cost]:
    """Return estimates for every candidate and cell without a measurement.

    One of the same architecture as a measured candidate (a pruned model and its retrained version)
    costs what that one does; others are scaled by how far the estimate of the dense model is from
    its measurement there.
    """
    dense = info_of(scene.study.dense)
    have = {(r.id, r.cell) for r in scene.rows}
    known = {c.id: c for c in scene.found}
    twins: dict[tuple[object, Cell], Cost] = {}
    exact: dict[tuple[object, Cell], Cost] = {}
    bases: dict[Cell, tuple[Cost, Cost]] = {}
    cells = scene.cells
    for row in scene.rows:
        shapes = shapes_of(known[row.id], dense) if row.id in known and not row.oom else None
        if shapes:
            twins[_architecture(shapes), row.cell] = row
            exact[_cut(known[row.id]), row.cell] = row
            if row.id == scene.study.dense.id:
                guess = measured.estimate(shapes, scene.rates, row.cell, dtype)
                bases[row.cell] = (row, guess)
    rows = []
    for candidate in scene.found:
        shapes = shapes_of(candidate, dense)
        missing = [c for c in cells if (candidate.id, c) not in have] if shapes else []
        if missing and shapes:
            named = {"id": candidate.id, "variant": candidate.label}
            alike, cut = _architecture(shapes), _cut(candidate)
            for cell in missing:
                if twin := twins.get((alike, cell)):
                    twin = exact.get((cut, cell), twin)
                    rows.append(
                        replace(
                            twin, id=candidate.id, variant=candidate.label, run="", estimated=True
                        )
                    )
                    continue
                guess = measured.estimate(shapes, scene.rates, cell, dtype, **named)
                rows.append(measured.rescaled(guess, *bases.get(cell, (None, None))))
    own = [r for r in scene.rows if r.id == scene.study.dense.id]
    both = measured.with_speedup([*own, *rows], scene.study.dense.id)
    return [r for r in both if r.estimated]


def _cut(candidate: Candidate) -> tuple[object, ...]:
    """Return what was removed, by which retrained versions and their originals are the same."""
    source = candidate.parent if candidate.retrained else candidate.id
    removed = candidate.removal.ordered if candidate.kind == "depth" else source
    return removed, candidate.quantized


def _architecture(shapes: Shapes) -> tuple[object, ...]:
    """Return what two models of the same cost have in common."""
    blocks = sorted(tuple(sorted(shape.items())) for shape in shapes.block_shapes)
    return shapes.parameters, tuple(blocks), str(getattr(shapes, "quantization", None) or "")


def run_label(bench: Benchmark, name: str) -> str:
    """Return the label of a benchmark run called ``name`` in a list."""
    when = time.strftime("%m-%d %H:%M", time.localtime(bench.record.started))
    summary = bench.summary
    return f"{name}: {summary.device}, {when}"


def facts_of(row: Outcome) -> str:
    """Return a candidate's size, quality and cost as a list of facts."""
    ratio = row.candidate.ratio
    facts = [f"{ratio:.1%} of the parameters removed" if ratio else "nothing removed"]
    if row.candidate.cut_in:
        facts.append(f"cut in blocks {block_ranges(row.candidate.cut_in)}")
    if row.ppl_over_dense:
        facts.append(f"perplexity {rounded(row.ppl)}, {row.ppl_over_dense:.3f} x dense")
    if row.per_token_ms is not None:
        facts.append(f"{row.per_token_ms:.3g} ms a token")
    if row.memory_mib is not None:
        facts.append(f"{rounded(row.memory_mib)} MiB")
    cost = f" (cost {row.kind_of_cost})" if row.kind_of_cost != "measured" else ""
    return ", ".join(facts) + cost


def allowed(found: Sequence[Candidate]) -> str:
    """Return which blocks each method was allowed to cut; this can matter more than the method."""
    known = {c.series: c.cut_in for c in found if not c.retrained and not c.quantized}
    said = by_blocks(known)
    return f"Allowed to cut: {said}." if said else ""


def accuracy(runs: Sequence[Benchmark]) -> str:
    """Return the error of the analytic model over all measured points of these runs."""
    off = results.accuracy(p for bench in runs for p in bench.points)
    said = []
    for name, error in (("latency", off.latency), ("memory", off.memory)):
        if error.points:
            rough = ", rough" if error.rough else ""
            said.append(
                f"{name} off by {error.median_error_pct:.0f} % (median), "
                f"{error.worst_error_pct:.0f} % (worst case){rough}"
            )
    points = off.latency.points
    return f"Estimates compared with {points} measured points: {'; '.join(said)}." if said else ""
