"""Length, repetition and distinct-n of what a study's models wrote in tasks."""

from __future__ import annotations

from typing import Any

from core.evaluate import generation
from core.study import Study

COLUMNS = ("words", "repeated 4-grams", "more than dense", "distinct-1", "distinct-2", "distinct-3")
"""Figures of one model in one task, as `core.evaluate.generation.row` calls them."""


def rows(known: Study) -> list[dict[str, Any]]:
    """Return the figures by task and model, the dense one first; the newest run counts."""
    return [row for _, row in _by_variant(known)]


def columns(known: Study) -> dict[str, dict[str, Any]]:
    """Return by a variant's id the figures of every task that it wrote in, the task in their names.

    Every variant that wrote anything has the same columns; None for what was not measured.
    """
    found = _by_variant(known)
    names = [f"{name}, {task}" for task in _tasks(found) for name in COLUMNS]
    made: dict[str, dict[str, Any]] = {}
    for variant, row in found:
        own = made.setdefault(variant, dict.fromkeys(names))
        own |= {f"{name}, {_task_of(row)}": row[name] for name in COLUMNS}
    return made


def _tasks(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(_task_of(row) for _, row in found))


def _task_of(row: dict[str, Any]) -> str:
    return str(row["task"])


def _by_variant(known: Study) -> list[tuple[str, dict[str, Any]]]:
    folders = {record.id: record.path for record in known.runs}
    newest = {
        (t.task, t.prompting, t.variant): folders[t.run]
        for t in sorted(known.tasks, key=lambda t: t.started)
        if t.is_written and t.run in folders
    }
    found = []
    for task, how in dict.fromkeys((task, how) for task, how, _ in newest):
        name = f"{task} ({how})" if how else task
        dense = None
        for v in known.variants:
            folder = newest.get((task, how, v.id))
            texts = generation.diversity(folder, task) if folder else None
            if texts:
                found.append((v.id, generation.row(v.label, name, texts, dense)))
                dense = texts if v.id == known.dense.id else dense
    return found
