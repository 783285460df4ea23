"""Text that models wrote in tasks: raw, and its length, variety and repetition; no torch.

Every sample of an evaluate run keeps what was generated before the task's filters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint.headers import FileState, file_state
from core.data.diversity import Diversity, diversity_of
from core.evaluate.by_content import Evaluated, Measure
from core.evaluate.results import SAMPLES, Sample, Summary, read_samples
from core.evaluate.suites import is_written


@dataclass(frozen=True)
class Text:
    """One question, and what one model wrote."""

    index: int
    question: str
    target: str
    generated: str
    right: dict[str, float]
    """Value of each metric; with a filter's name if the task has several."""


def texts(folder: Path, task: str) -> tuple[Text, ...]:
    """Return what a run's model wrote in a task, by question; empty if it wrote nothing."""
    return _texts(folder, task, file_state(folder, (SAMPLES,)))


@functools.lru_cache(maxsize=64)
def _texts(folder: Path, task: str, _: FileState) -> tuple[Text, ...]:
    mine = [s for s in read_samples(folder) if s.task == task and s.generated]
    several = len({s.filter for s in mine}) > 1
    found: dict[int, Text] = {}
    for sample in mine:
        text = found.setdefault(
            sample.index,
            Text(sample.index, sample.question, str(sample.target), sample.generated[0], {}),  # type: ignore[index]
        )
        text.right.update(_values(sample, several))
    return tuple(found[index] for index in sorted(found))


def _values(sample: Sample, several: bool) -> dict[str, float]:
    """Return a sample's metrics by the name that its task's score has."""
    values = [(name, sample.value(name)) for name in sample.metrics]
    return {
        f"{name},{sample.filter}" if several else name: value
        for name, value in values
        if value is not None
    }


def mark(text: Text) -> str:
    """Return in a word or two whether a written answer is right, strictly or flexibly."""
    values = {name: value for name, value in text.right.items() if value in (0.0, 1.0)}
    strict = next((v for name, v in values.items() if "flexible" not in name), None)
    loose = next((v for name, v in values.items() if "flexible" in name), strict)
    if strict is None:
        return "not scored"
    return "right" if strict else "right in another layout" if loose else "wrong"


def diversity(folder: Path, task: str) -> Diversity | None:
    """Return length, variety and repetition of what a run's model wrote; None if nothing."""
    return _diversity(folder, task, file_state(folder, (SAMPLES,)))


@functools.lru_cache(maxsize=16_384)
def _diversity(folder: Path, task: str, state: FileState) -> Diversity | None:
    found = _texts(folder, task, state)
    return diversity_of(one.generated for one in found) if found else None


def tasks_of(evaluated: Sequence[Evaluated[Any]], chosen: Sequence[Measure]) -> list[str]:
    """Return the tasks among ``chosen`` for which a model of these wrote text."""
    names = dict.fromkeys(m.name for m in chosen if m.kind == "task")
    return [name for name in names if any(folder_of(one, chosen, name) for one in evaluated)]


def folder_of(one: Evaluated[Any], chosen: Sequence[Measure], task: str) -> Path | None:
    """Return the run in which a checkpoint wrote text in a task; None if it did not."""
    for measure in chosen:
        if measure.kind == "task" and measure.name == task and measure in one.cells:
            folder = one.cells[measure].run.path
            if _asks_for_text(folder, measure) and _wrote(
                folder, task, file_state(folder, (SAMPLES,))
            ):
                return folder
    return None


def _asks_for_text(folder: Path, measure: Measure) -> bool:
    """Whether a run's task has written answers, by its summary: samples need not be read."""
    summary = Summary.read(folder) or Summary()
    kinds = {task: kind for asked in summary.tasks for task, kind in asked.output_types.items()}
    return is_written(measure.name, measure.how, kinds.get(measure.name, ""))


@functools.lru_cache(maxsize=16_384)
def _wrote(folder: Path, task: str, state: FileState) -> bool:
    return bool(_texts(folder, task, state))


def row(label: str, task: str, found: Diversity, dense: Diversity | None) -> dict[str, Any]:
    """Return one row of the table: a model's figures, and what it repeats more than dense."""
    more = None
    if dense and found.repetition is not None and dense.repetition is not None:
        more = found.repetition - dense.repetition
    return {
        "task": task,
        "checkpoint": label,
        "texts": found.texts,
        "words": found.words,
        "repeated 4-grams": found.repetition,
        "more than dense": more,
        "distinct-1": found.distinct_1,
        "distinct-2": found.distinct_2,
        "distinct-3": found.distinct_3,
    }


def table(evaluated: Sequence[Evaluated[Any]], chosen: Sequence[Measure]) -> list[dict[str, Any]]:
    """Return length, repetition and distinct-n by task and checkpoint, the dense one first."""
    rows = []
    for task in tasks_of(evaluated, chosen):
        dense: Diversity | None = None
        for place, one in enumerate(evaluated):
            folder = folder_of(one, chosen, task)
            found = diversity(folder, task) if folder else None
            if found:
                rows.append(row(one.variant.label, task, found, dense))
                dense = found if place == 0 else dense
    return rows
