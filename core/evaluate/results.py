"""What evaluate runs say about the checkpoints of a study, beside each other; no torch.

A run counts for a checkpoint when it judged exactly this content, wherever it lies: what was
measured before its files changed is not shown.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import DepthcutError
from core.evaluate import compare, known, questions, suites, texts
from core.evaluate.compare import Delta
from core.runs import workspace
from core.runs.workspace import RunRecord, Workspace
from core.study import Variant


@dataclass(frozen=True)
class Measure:
    """One thing that was measured the same way for several checkpoints."""

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

    @property
    def label(self) -> str:
        """Name and protocol in words."""
        name = Path(self.name).name or self.name
        if self.kind == "task":
            return f"{name} ({self.how})"
        where = ", BOS in each" if self.bos == "window" else ""
        return f"perplexity of {name}, {self.window} tokens{where}"


@dataclass(frozen=True)
class Cell:
    """A measure of one checkpoint, and how it differs from the dense one's."""

    value: float
    stderr: float | None
    count: int
    """Predictions or questions."""
    run: RunRecord
    row: dict[str, Any]
    delta: Delta | None = None


@dataclass(frozen=True)
class Judged:
    """A checkpoint and everything that was measured about it."""

    variant: Variant
    cells: dict[Measure, Cell]


def gather(where: Workspace, variants: Sequence[Variant]) -> list[Judged]:
    """Return what is known of every variant, the first being the one to compare with."""
    runs = [
        (record, workspace.read_json(record.path / "summary.json") or {})
        for record in where.runs("evaluate")
        if record.state == "done"
    ]
    found = [Judged(v, _cells(runs, content_of(v))) for v in variants]
    if not found:
        return []
    dense, *others = found
    return [dense, *(Judged(o.variant, _with_deltas(dense.cells, o.cells)) for o in others)]


def content_of(variant: Variant) -> str:
    """Return what identifies a variant's checkpoint; empty where there is none."""
    try:
        return known.checkpoint_content(variant.folder) if variant.folder else ""
    except (DepthcutError, OSError, ValueError):
        return ""


def _cells(runs: Iterable[tuple[RunRecord, dict[str, Any]]], content: str) -> dict[Measure, Cell]:
    """Return the newest result of each measure for a checkpoint of this content."""
    found: dict[Measure, Cell] = {}
    for record, summary in runs:
        if not content or summary.get("content") != content:
            continue
        dtype = str(summary.get("dtype"))
        for row in summary.get("perplexity") or ():
            how = f"windows of {row['window']}, BOS {row['bos']}"
            measure = Measure(
                "perplexity", row["source"], how, row["content"], dtype, row["window"], row["bos"]
            )
            twin = next((m for m in found if _same_text(m, measure)), measure)
            found.setdefault(twin, Cell(row["ppl"], None, row["tokens"], record, row))
        for row in summary.get("tasks") or ():
            for task, metric, value, stderr, count in row["scores"]:
                measure = Measure("task", task, metric, row["content"], dtype, limit=row["limit"])
                found.setdefault(measure, Cell(value, stderr, count, record, row))
    return found


def _same_text(first: Measure, second: Measure) -> bool:
    """Whether two measures differ in how their text's file is called only."""
    keys = ("kind", "content", "dtype", "window", "bos")
    return first.kind == "perplexity" and all(getattr(first, k) == getattr(second, k) for k in keys)


def _with_deltas(dense: dict[Measure, Cell], cells: dict[Measure, Cell]) -> dict[Measure, Cell]:
    result = {}
    for measure, cell in cells.items():
        name = next((m for m in dense if m == measure or _same_text(m, measure)), None)
        delta = difference(measure, dense[name], cell) if name else None
        result[name or measure] = Cell(
            cell.value, cell.stderr, cell.count, cell.run, cell.row, delta
        )
    return result


def difference(measure: Measure, first: Cell, second: Cell) -> Delta:
    """Return the second's value less the first's, pair by pair where both kept their pairs."""
    found: Delta | None
    if measure.kind == "perplexity":
        found = compare.perplexity_delta(windows_of(first), windows_of(second))
    else:
        both = samples_of(first.run), samples_of(second.run)
        found = compare.task_delta(*both, measure.name, measure.how)
    pair = (first.value, first.stderr), (second.value, second.stderr)
    return found or compare.unpaired_delta(*pair)


def windows_of(cell: Cell) -> tuple[float, ...]:
    """Return the losses of a perplexity's windows."""
    row = cell.row
    path = cell.run.path / "windows.csv"
    key = (row["source"], row["window"], row["bos"])
    return _windows(cell.run.path, *key, path.stat().st_mtime_ns) if path.is_file() else ()


@functools.lru_cache(maxsize=64)
def _windows(folder: Path, source: str, window: int, bos: str, _: int) -> tuple[float, ...]:
    return texts.read_windows(folder, source, window, bos)


def samples_of(record: RunRecord) -> tuple[dict[str, Any], ...]:
    """Return the questions of a run, read once until its file changes."""
    path = record.path / questions.SAMPLES
    return _samples(record.path, path.stat().st_mtime_ns) if path.is_file() else ()


@functools.lru_cache(maxsize=16)
def _samples(folder: Path, _: int) -> tuple[dict[str, Any], ...]:
    return tuple(questions.read_samples(folder))


def measures(judged: Iterable[Judged], limit: int | None) -> list[Measure]:
    """Return all measures, texts first; of the tasks those with this limit of questions."""
    found = dict.fromkeys(m for one in judged for m in one.cells)
    texts_first = sorted(found, key=lambda m: m.kind != "perplexity")
    return [m for m in texts_first if m.kind == "perplexity" or m.limit == limit]


def limits(judged: Iterable[Judged]) -> list[int | None]:
    """Return the limits of questions that tasks were asked with, the one most used first."""
    found: dict[int | None, int] = {}
    for one in judged:
        for measure in one.cells:
            if measure.kind == "task":
                found[measure.limit] = found.get(measure.limit, 0) + 1
    return sorted(found, key=lambda limit: -found[limit])


def means(one: Judged, chosen: Sequence[Measure]) -> list[tuple[str, float, Delta | None]]:
    """Return name, value and delta of the mean of each complete preset among ``chosen``.

    The delta's error is that of the tasks' paired differences, tasks being independent.
    """
    cells = {m.name: one.cells[m] for m in reversed(chosen) if m.kind == "task" and m in one.cells}
    rows = [(name, "", cell.value, cell.stderr, cell.count) for name, cell in cells.items()]
    found = []
    for name, _, value, _, _ in questions.means(rows):
        preset = next(p for p, n in questions.MEANS.items() if n == name)
        deltas = [cells[task].delta for task in suites.PRESETS[preset]]
        delta = None
        if all(d is not None for d in deltas):
            known_deltas = [d for d in deltas if d is not None]
            errors = [d.stderr for d in known_deltas if d.stderr is not None]
            whole = len(errors) == len(deltas)
            error = math.hypot(*errors) / len(deltas) if whole else None
            delta = Delta(math.fsum(d.value for d in known_deltas) / len(deltas), error, None)
        found.append((name, value, delta))
    return found


def table(judged: Sequence[Judged], chosen: Sequence[Measure]) -> list[dict[str, Any]]:
    """Return the long table: one row a checkpoint and measure."""
    rows = []
    for one in judged:
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
                    "dtype": measure.dtype, "run": cell.run.id,
                }
            )  # fmt: skip
    return rows


def block_rows(
    where: Workspace, variant: Variant
) -> list[tuple[RunRecord, dict[str, Any], list[tuple[Any, ...]]]]:
    """Return the runs with costs of single blocks of this content, newest first."""
    content = content_of(variant)
    found = []
    for record in where.runs("evaluate"):
        summary = workspace.read_json(record.path / "summary.json") or {}
        if record.state == "done" and content and summary.get("content") == content:
            rows = questions.read_blocks(record.path) if summary.get("skills") else []
            if rows:
                found.append((record, summary, rows))
    return found
