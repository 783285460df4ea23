"""What the Evaluate page shows, computed from a study's results; no Streamlit here."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core.errors import OptionError
from core.evaluate import by_content, compare, suites
from core.evaluate.by_content import Cell, Evaluated, Measure
from core.evaluate.compare import Delta, Flip
from core.evaluate.results import Summary, read_samples
from core.runs.workspace import RunRecord, Workspace


def texts_of(written: str) -> tuple[str, ...]:
    """Return the sources of a text field, which are separated by commas."""
    return tuple(dict.fromkeys(part.strip() for part in written.split(",") if part.strip()))


def windows_of(written: str) -> tuple[str, ...]:
    """Return the parts of the window field, for the command's own check."""
    return tuple(part.strip() for part in written.split(",") if part.strip())


def change(delta: Delta | None, digits: int) -> str:
    """Return a difference with its standard error, starred if it exceeds two of them."""
    if delta is None:
        return ""
    error = "" if delta.stderr is None else f" ± {delta.stderr:.{digits}f}"
    return f" ({delta.value:+.{digits}f}{error}{'*' if delta.certain else ''})"


def number(cell: Cell) -> str:
    """Return a value with its change, or with its own error if there is no change to show."""
    if cell.delta is None and cell.stderr is not None:
        return f"{cell.value:.3f} ± {cell.stderr:.3f}"
    return f"{cell.value:.3f}" + change(cell.delta, 3)


def wide(evaluated: Sequence[Evaluated[Any]], chosen: Sequence[Measure]) -> list[dict[str, str]]:
    """Return the table for display: a row per measure, a column per checkpoint.

    After the tasks come their means, and then the tasks whose answers are written: they are never
    part of a mean.
    """
    rows: list[dict[str, str]] = []
    last: list[dict[str, str]] = []
    for measure in chosen:
        written = measure.kind == "task" and suites.is_written(measure.name, measure.how)
        row = {"": measure.label}
        for one in evaluated:
            cell = one.cells.get(measure)
            row[one.variant.label] = "not measured" if cell is None else number(cell)
        (last if written else rows).append(row)
    averages: dict[str, dict[str, str]] = {}
    for one in evaluated:
        for name, value, delta in by_content.means(one, chosen):
            blank = {other.variant.label: "not measured" for other in evaluated}
            row = averages.setdefault(name, {"": name, **blank})
            row[one.variant.label] = f"{value:.3f}" + change(delta, 3)
    return [*rows, *averages.values(), *last]


def expected_error(
    runs: Iterable[RunRecord], texts: Sequence[str], window: int, windows: int
) -> float | None:
    """Return the relative standard error of a perplexity over this number of windows of a text.

    From the newest run (they come newest first) on one of these texts with this window; None
    without one.
    """
    names = {Path(text).name for text in texts}
    for record in runs:
        summary = Summary.read(record.path) if record.command == "evaluate" else None
        for text in summary.perplexity if summary else ():
            alike = text.window == window and (Path(text.source).name in names or "auto" in names)
            if alike and text.ppl and text.stderr and text.windows:
                return text.stderr / text.ppl * (text.windows / windows) ** 0.5
    return None


def protocol_note(evaluated: Sequence[Evaluated[Any]], chosen: Sequence[Measure]) -> str:
    """Return the line below the table: devices, precision, number of runs, question limits."""
    cells = [one.cells[m] for one in evaluated for m in chosen if m in one.cells]
    devices = sorted({str(c.run.device) for c in cells if c.run.device})
    dtypes = sorted({m.dtype for m in chosen})
    limits = sorted({m.limit for m in chosen if m.kind == "task" and m.limit is not None})
    limited = f", the first {', '.join(map(str, limits))} questions of each task" if limits else ""
    runs = len({c.run.id for c in cells})
    note = f"Measured on {', '.join(devices)} in {', '.join(dtypes)}, {runs} runs{limited}."
    return " ".join([note, *_text_notes(cells)])


def _text_notes(cells: Iterable[Any]) -> list[str]:
    """Return what the runs record about their texts: rows skipped or joined, poor fit."""
    found: dict[str, None] = {}
    for path in dict.fromkeys(cell.run.path for cell in cells):
        summary = Summary.read(path)
        for text in summary.perplexity if summary else ():
            found.update(dict.fromkeys(f"{Path(text.source).name}: {n}" for n in text.text.notes))
    return list(found)


def flip_rows(found: Iterable[Flip]) -> list[dict[str, Any]]:
    """Return flips as a table's rows."""
    return [
        {
            "task": f.task, "question": f.index, "flip": f.kind, "text": f.question,
            "choices": " | ".join(f.choices), "right": f.target, "first": f.first,
            "second": f.second,
        }
        for f in found
    ]  # fmt: skip


def flips_between(first: Evaluated[Any], second: Evaluated[Any], task: Measure) -> list[Flip]:
    """Return the questions of a task on which two checkpoints differ."""
    before, after = (read_samples(one.cells[task].run.path) for one in (first, second))
    return compare.flips(before, after, task.name, task.how)


def flip_sentence(found: Sequence[Flip], first: str, second: str) -> str:
    """Return a sentence on how many questions flipped each way, and whether that may be chance."""
    lost = sum(flip.kind == "lost" for flip in found)
    gained = len(found) - lost
    p = compare.sign_test(lost, gained)
    verdict = "this may be chance" if p > 0.05 else "this is unlikely to be chance"
    return (
        f"{second} loses {lost} questions that {first} answers correctly, and gains {gained}; "
        f"exact sign test p = {p:.3g}: {verdict}."
    )


def chances() -> dict[str, float]:
    """Return the accuracy of guessing for the tasks with a known one, i.e. the demo's."""
    from core.demo.questions import CHANCE

    return {f"demo_{skill}": value for skill, value in CHANCE.items()}


def task_choices(task_dir: str = "") -> list[str]:
    """Return the choices of the task field: a user's own tasks, presets, then their tasks."""
    own: Iterable[str] = ()
    with contextlib.suppress(OptionError):
        own = suites.own(task_dir) if task_dir else ()
    of_presets = (task for tasks in suites.PRESETS.values() for task in tasks)
    return list(dict.fromkeys((*own, *suites.PRESETS, suites.OPEN, *of_presets)))


def calibration_runs(where: Workspace, name: str) -> list[RunRecord]:
    """Return the finished calibration recipes of a checkpoint, newest first."""
    return [
        record
        for record in where.runs("recipe")
        if record.state == "done"
        and record.spec.get("name") == "calibration"
        and record.spec.get("checkpoint") == name
    ]


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as CSV."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
