"""Results of evaluate runs for several checkpoints, side by side; no torch.

A run counts for a checkpoint if it evaluated exactly this content, regardless of the path: results
from before its files changed are not shown.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from core.checkpoint import locate
from core.checkpoint.headers import FileState, file_state
from core.errors import DepthcutError
from core.evaluate import compare, known, questions, suites
from core.evaluate.compare import Delta
from core.evaluate.results import (
    SAMPLES,
    BlockCost,
    Prompting,
    Score,
    Summary,
    WindowRow,
    read_samples,
    read_windows,
)
from core.runs.workspace import RunRecord, Workspace


class Checkpoint(Protocol):
    """The part of a checkpoint that is needed here; `core.study.Variant` provides it."""

    @property
    def label(self) -> str:
        """Name in tables."""

    @property
    def folder(self) -> Path | None:
        """Folder of its files; None if it has none."""


C = TypeVar("C", bound=Checkpoint)


@dataclass(frozen=True)
class Measure:
    """A quantity that is measured in the same way for several checkpoints."""

    kind: str
    """perplexity or task."""
    name: str
    """Text or task."""
    how: str
    """Protocol, or metric."""
    content: str
    """Identifies the text or the task."""
    dtype: str
    window: int = 0
    bos: str = ""
    limit: int | None = None
    prompting: Prompting = Prompting()

    @property
    def label(self) -> str:
        """Label with name and protocol."""
        name = Path(self.name).name or self.name
        if self.kind == "task":
            how = ", ".join(filter(None, (self.how, self.prompting.label)))
            return f"{name} ({how})"
        where = {"window": ", BOS in each", "extra": ", BOS before each"}.get(self.bos, "")
        part = "" if self.limit is None else f", first {self.limit:,} windows"
        return f"perplexity of {name}, {self.window} tokens{where}{part}"


@dataclass(frozen=True)
class Cell:
    """A measure of one checkpoint, and its difference from the dense checkpoint's."""

    value: float
    stderr: float | None
    count: int
    """Predictions or questions."""
    run: RunRecord
    source: str = ""
    """The text as the run named it; empty for a task."""
    delta: Delta | None = None


@dataclass(frozen=True)
class Evaluated(Generic[C]):
    """A checkpoint and all its measures."""

    variant: C
    cells: dict[Measure, Cell]


def gather(where: Workspace, variants: Sequence[C]) -> list[Evaluated[C]]:
    """Return the measures of every variant; the first is the one to compare with."""
    runs = _finished(where)
    found = [Evaluated(v, _cells(runs, content_of(v))) for v in variants]
    if not found:
        return []
    dense, *others = found
    return [dense, *(Evaluated(o.variant, _with_deltas(dense.cells, o.cells)) for o in others)]


def perhaps_measured(where: Workspace, variants: Sequence[C]) -> list[C]:
    """Return the variants that runs may have evaluated, by the cheaper hash of their weights.

    Those left out certainly have no results; `gather` reads all bytes of the ones it is given.
    """
    keys = {summary.checkpoint_key for _, summary in _finished(where)}
    return [v for v in variants if "" in keys or _weights_of(v) in keys]


def _weights_of(variant: Checkpoint) -> str:
    try:
        return locate.at(variant.folder).info.key if variant.folder else ""
    except (DepthcutError, OSError):
        return ""


def _finished(where: Workspace) -> list[tuple[RunRecord, Summary]]:
    """Return the finished runs that left a summary, newest first."""
    return [
        (record, summary)
        for record in where.runs("evaluate")
        if record.state == "done" and (summary := Summary.read(record.path))
    ]


def content_of(variant: Checkpoint) -> str:
    """Return a hash of a variant's checkpoint; empty if it has none."""
    try:
        return known.checkpoint_content(variant.folder) if variant.folder else ""
    except (DepthcutError, OSError, ValueError):
        return ""


def _cells(runs: Iterable[tuple[RunRecord, Summary]], content: str) -> dict[Measure, Cell]:
    """Return the newest result of each measure for a checkpoint with this content."""
    found: dict[Measure, Cell] = {}
    for record, summary in runs:
        if not content or summary.content != content:
            continue
        dtype = summary.dtype
        for text in summary.perplexity:
            if text.ppl is None:
                continue
            how = f"windows of {text.window}, BOS {text.bos}"
            measure = Measure(
                "perplexity", text.source, how, text.content, dtype, text.window, text.bos,
                limit=None if text.max_tokens is None else text.windows,
            )  # fmt: skip
            twin = next((m for m in found if _same_text(m, measure)), measure)
            found.setdefault(twin, Cell(text.ppl, text.stderr, text.tokens, record, text.source))
        for asked in summary.tasks:
            for row in asked.rows:
                measure = Measure(
                    "task", row.task, row.metric, asked.content, dtype, limit=asked.limit,
                    prompting=asked.prompting,
                )  # fmt: skip
                cell = Cell(row.value, row.stderr, row.samples or 0, record)
                found.setdefault(measure, cell)
    return found


def _same_text(first: Measure, second: Measure) -> bool:
    """Whether two measures differ only in the file name of their text."""
    keys = ("kind", "content", "dtype", "window", "bos", "limit")
    return first.kind == "perplexity" and all(getattr(first, k) == getattr(second, k) for k in keys)


def _with_deltas(dense: dict[Measure, Cell], cells: dict[Measure, Cell]) -> dict[Measure, Cell]:
    result = {}
    for measure, cell in cells.items():
        name = next((m for m in dense if m == measure or _same_text(m, measure)), None)
        delta = difference(measure, dense[name], cell) if name else None
        result[name or measure] = replace(cell, delta=delta)
    return result


def difference(measure: Measure, first: Cell, second: Cell) -> Delta:
    """Return the second value minus the first, paired if both runs kept their samples."""
    pair = (first.value, first.stderr), (second.value, second.stderr)
    return _paired(measure, _samples_of(first), _samples_of(second)) or compare.unpaired_delta(
        *pair
    )


class Samples(NamedTuple):
    """Where a cell's windows or questions are, and what changes with them."""

    folder: Path
    source: str
    state: FileState


def _samples_of(cell: Cell) -> Samples:
    state = file_state(cell.run.path, (WindowRow.FILE, SAMPLES))
    return Samples(cell.run.path, cell.source, state)


@functools.lru_cache(maxsize=16_384)
def _paired(measure: Measure, first: Samples, second: Samples) -> Delta | None:
    """Return the paired difference; None if not both runs kept their samples."""
    if measure.kind == "perplexity":
        return compare.perplexity_delta(
            *(
                read_windows(one.folder, one.source, measure.window, measure.bos)
                for one in (first, second)
            )
        )
    both = read_samples(first.folder), read_samples(second.folder)
    return compare.task_delta(*both, measure.name, measure.how)


def measures(evaluated: Iterable[Evaluated[Any]], limit: int | None) -> list[Measure]:
    """Return all measures of texts, then those of tasks with this question limit."""
    found = dict.fromkeys(m for one in evaluated for m in one.cells)
    texts_first = sorted(found, key=lambda m: m.kind != "perplexity")
    return [m for m in texts_first if m.kind == "perplexity" or m.limit == limit]


def limits(evaluated: Iterable[Evaluated[Any]]) -> list[int | None]:
    """Return the question limits that tasks were run with, most frequent first."""
    found: dict[int | None, int] = {}
    for one in evaluated:
        for measure in one.cells:
            if measure.kind == "task":
                found[measure.limit] = found.get(measure.limit, 0) + 1
    return sorted(found, key=lambda limit: -found[limit])


def means(one: Evaluated[Any], chosen: Sequence[Measure]) -> list[tuple[str, float, Delta | None]]:
    """Return name, value and delta of the mean of each complete preset among ``chosen``.

    The delta's error combines those of the tasks' paired differences as independent ones.
    """
    asked = [m for m in chosen if m.kind == "task" and m in one.cells]
    kinds = dict.fromkeys(m.prompting for m in asked)
    return [
        mean
        for how in kinds
        for mean in _means(one, [m for m in asked if m.prompting == how], how.label)
    ]


def _means(
    one: Evaluated[Any], asked: Sequence[Measure], how: str
) -> list[tuple[str, float, Delta | None]]:
    """Return the means of measures that were asked in the same way, ``how`` in words."""
    cells = {m.name: one.cells[m] for m in reversed(asked)}
    rows = [Score(name, "", cell.value, cell.stderr, cell.count) for name, cell in cells.items()]
    found = []
    for mean in questions.means(rows):
        preset = next(p for p, n in questions.MEANS.items() if n == mean.task)
        deltas = [cells[task].delta for task in suites.PRESETS[preset]]
        delta = None
        if all(d is not None for d in deltas):
            known_deltas = [d for d in deltas if d is not None]
            errors = [d.stderr for d in known_deltas if d.stderr is not None]
            whole = len(errors) == len(deltas)
            error = math.hypot(*errors) / len(deltas) if whole else None
            delta = Delta(math.fsum(d.value for d in known_deltas) / len(deltas), error, None)
        name = f"{mean.task} ({how})" if how else mean.task
        found.append((name, mean.value, delta))
    return found


def table(evaluated: Sequence[Evaluated[Any]], chosen: Sequence[Measure]) -> list[dict[str, Any]]:
    """Return the long table: one row per checkpoint and measure."""
    rows = []
    for one in evaluated:
        for measure in chosen:
            cell = one.cells.get(measure)
            if cell is None:
                continue
            rows.append(
                {
                    "variant": one.variant.label, "kind": measure.kind, "name": measure.name,
                    "how": measure.how, "value": cell.value, "stderr": cell.stderr,
                    "count": cell.count, "delta": cell.delta and cell.delta.value,
                    "delta_stderr": cell.delta and cell.delta.stderr,
                    "pairs": cell.delta and cell.delta.pairs, "limit": measure.limit,
                    "prompting": measure.prompting.label,
                    "dtype": measure.dtype, "run": cell.run.id,
                }
            )  # fmt: skip
    return rows


def block_rows(
    where: Workspace, variant: Checkpoint
) -> list[tuple[RunRecord, Summary, tuple[BlockCost, ...]]]:
    """Return the runs with single-block costs of this content, newest first."""
    content = content_of(variant)
    found = []
    for record, summary in _finished(where):
        if content and summary.content == content and summary.skills:
            rows = BlockCost.read(record.path)
            if rows:
                found.append((record, summary, rows))
    return found
