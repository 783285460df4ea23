"""Accuracy of a checkpoint on tasks: measured, or taken from an earlier run with the same key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import workspace
from core.evaluate import suites

if TYPE_CHECKING:
    from core.evaluate.command import Session
    from core.run import Run

LIBRARIES = ("lm-eval", "datasets")
COLUMNS = ("task", "metric", "value", "stderr", "samples")
"""Of tasks.csv."""
SAMPLES = "samples.jsonl"
MEANS = {"paper": "AVE", "demo": "AVE demo"}
"""Presets whose plain mean is given too, once all their tasks were asked, and its name."""


@dataclass(frozen=True)
class AskedTask:
    """One asked task or group: its scores, and what they depend on."""

    task: str
    scores: tuple[tuple[Any, ...], ...]
    """Rows of `COLUMNS`: of the task, or of a group and of every task in it."""
    content: str
    """What the task is: a hash of a local one's files, else lm-eval's version."""
    task_versions: dict[str, Any]
    shots: dict[str, int]
    limit: int | None
    key: str
    batch: int
    seconds: float
    reused_from: str | None = None
    samples: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    def summary(self) -> dict[str, Any]:
        """Return everything but the samples."""
        return {k: v for k, v in self.__dict__.items() if k != "samples"}


def measure(session: Session) -> list[AskedTask]:
    """Ask the questions of every task, or take them from an earlier run."""
    from core.evaluate.known import versions

    results: dict[str, AskedTask] = {}
    open_places = []
    harness = f"lm-eval {versions('lm-eval')['lm-eval']}" if session.places else ""
    keys = {}
    for place in session.places:
        content = suites.files_content(place) if place.local else harness
        key = session.key(
            *LIBRARIES, kind="task", task=place.name, content=content, limit=session.spec.limit
        )
        keys[place.name] = {"content": content, "key": key, "limit": session.spec.limit}
        reused = _reused(session, place.name, keys[place.name])
        if reused:
            results[place.name] = reused
        else:
            open_places.append(place)
    if open_places:
        results |= _asked(session, open_places, keys)
    return [results[place.name] for place in session.places]


def _reused(session: Session, task: str, common: dict[str, Any]) -> AskedTask | None:
    """Return the result of an earlier run with the same key, if its samples are still there."""
    earlier = session.known(common["key"], f"Task {task}")
    if not earlier:
        return None
    record, row = earlier
    names = {score[0] for score in row["scores"]}
    samples = tuple(s for s in read_samples(record.path) if s["task"] in names)
    if not samples:
        return None
    same = {k: row[k] for k in ("task_versions", "shots", "batch", "seconds")}
    return AskedTask(
        task,
        tuple(tuple(score) for score in row["scores"]),
        **common,
        **same,
        reused_from=row.get("reused_from") or record.id,
        samples=samples,
    )


def _asked(
    session: Session, places: Sequence[suites.Place], keys: dict[str, dict[str, Any]]
) -> dict[str, AskedTask]:
    """Ask the tasks of ``places`` with one loaded model; their data is loaded before it."""
    from core.evaluate import zero_shot

    progress = session.run.progress
    progress.log(f"Loading {len(places)} task(s).")
    manager = zero_shot.manager(places)
    loaded = {place.name: zero_shot.load(manager, place) for place in places}
    batch = zero_shot.batch_for(session.device.type)
    lm = zero_shot.harness_model(session.model, session.tokenizer, batch, progress)
    results = {}
    for place in places:
        found = zero_shot.ask(lm, place, loaded[place.name], session.spec.limit, progress)
        rows = tuple((s.task, s.metric, s.value, s.stderr, s.samples) for s in found.scores)
        results[place.name] = AskedTask(
            place.name,
            rows,
            **keys[place.name],
            task_versions=found.versions,
            shots=found.shots,
            batch=found.batch,
            seconds=found.seconds,
            samples=found.samples,
        )
        task, metric, value, stderr, size = rows[0]
        error = f" ± {stderr:.4f}" if stderr is not None else ""
        progress.log(f"{task}: {metric} {value:.4f}{error} ({size} questions).")
    return results


def table(asked: Iterable[AskedTask]) -> list[tuple[Any, ...]]:
    """Return the rows of tasks.csv: every score, then the means of complete presets."""
    rows = [score for task in asked for score in task.scores]
    return rows + means(rows)


def means(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return a row for each preset in `MEANS` of which every task is in ``rows``.

    The mean is the plain one over tasks; its standard error is that of independent tasks.
    """
    first: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        first.setdefault(row[0], row)
    found = []
    for preset, name in MEANS.items():
        parts = [first[task] for task in suites.PRESETS[preset] if task in first]
        if len(parts) < len(suites.PRESETS[preset]):
            continue
        errors = [part[3] for part in parts]
        known = all(error is not None for error in errors)
        stderr = math.sqrt(math.fsum(e * e for e in errors)) / len(parts) if known else None
        value = math.fsum(part[2] for part in parts) / len(parts)
        found.append((name, "mean", value, stderr, sum(part[4] for part in parts)))
    return found


def write(run: Run, asked: Sequence[AskedTask]) -> None:
    """Write tasks.csv (empty where no task was asked) and samples.jsonl."""
    run.write_csv("tasks.csv", COLUMNS, table(asked))
    lines = [json.dumps(sample, ensure_ascii=False) for task in asked for sample in task.samples]
    if lines:
        run.write_text(SAMPLES, "\n".join(lines) + "\n")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return a run's samples; empty where it has none."""
    return list(workspace.json_lines(folder / SAMPLES))
