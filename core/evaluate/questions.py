"""Accuracy of a checkpoint on tasks: measured, or taken from an earlier run with the same key."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.evaluate import known, suites
from core.runs import workspace

if TYPE_CHECKING:
    from core.evaluate.session import Session
    from core.runs.run import Run

Result = TypeVar("Result")

LIBRARIES = ("lm-eval", "datasets")
COLUMNS = ("task", "metric", "value", "stderr", "samples")
"""Of tasks.csv."""
BLOCK_COLUMNS = ("block", "task", "metric", "value", "stderr", "delta", "delta_stderr")
"""Of skills.csv; block -1 is the dense model, ``delta`` the value less the dense one."""
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


def load(session: Session) -> dict[str, Any]:
    """Return the tasks that have to be asked, with their data, by name.

    Raises:
        DataError: A task's data is not on this machine, or its file is not as lm-eval wants it.
    """
    kinds = ("task", "each block") if session.spec.each_block else ("task",)
    keys = [(place, _keys(session, kind)[place.name]["key"])
            for kind in kinds for place in session.places]  # fmt: skip
    earlier = session.earlier
    places = {p.name: p for p, key in keys if earlier is None or not earlier.has(key)}
    return _loaded(session, list(places.values()))


def _loaded(session: Session, places: Sequence[suites.Place]) -> dict[str, Any]:
    if not places:
        return {}
    from core.evaluate import zero_shot

    session.run.progress.log(f"Loading {len(places)} task(s).")
    manager = zero_shot.manager(places)
    return {place.name: zero_shot.load(manager, place) for place in places}


def measure(session: Session, loaded: dict[str, Any]) -> list[AskedTask]:
    """Ask the questions of every task, or take them from an earlier run."""
    results: dict[str, AskedTask] = {}
    open_places = []
    keys = _keys(session, "task")
    for place in session.places:
        reused = _reused(session, place.name, keys[place.name])
        if reused:
            results[place.name] = reused
        else:
            open_places.append(place)
    if open_places:
        late = [place for place in open_places if place.name not in loaded]
        results |= _asked(session, open_places, keys, loaded | _loaded(session, late))
    return [results[place.name] for place in session.places]


def _keys(session: Session, kind: str) -> dict[str, dict[str, Any]]:
    """Return content, limit and key of every asked task."""
    found = {}
    for place in session.places:
        local = suites.files_content(place) if place.local else ""
        content = local or f"lm-eval {known.versions('lm-eval')['lm-eval']}"
        limit = session.spec.limit
        key = session.key(*LIBRARIES, kind=kind, task=place.name, content=content, limit=limit)
        found[place.name] = {"content": content, "key": key, "limit": limit}
    return found


def _reused(session: Session, task: str, common: dict[str, Any]) -> AskedTask | None:
    """Return the result of an earlier run with the same key, if its samples are still there."""
    earlier = session.known(common["key"], f"Task {task}")
    if not earlier:
        part = session.aside(common["key"], f"Task {task}")
        return _read(AskedTask, part) if part else None
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
    session: Session,
    places: Sequence[suites.Place],
    keys: dict[str, dict[str, Any]],
    loaded: dict[str, Any],
) -> dict[str, AskedTask]:
    """Ask the tasks of ``places`` with one loaded model."""
    from core.evaluate import zero_shot

    progress = session.run.progress
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
        done = results[place.name]
        known.put_aside(session.run.book, done.key, vars(done))
        task, metric, value, stderr, size = rows[0]
        error = f" ± {stderr:.4f}" if stderr is not None else ""
        progress.log(f"{task}: {metric} {value:.4f}{error} ({size} questions).")
    return results


@dataclass(frozen=True)
class BlockCosts:
    """What removing each single block costs on one asked task."""

    task: str
    rows: tuple[tuple[Any, ...], ...] = field(repr=False)
    """Rows of `BLOCK_COLUMNS`."""
    content: str
    limit: int | None
    key: str
    seconds: float
    reused_from: str | None = None

    def summary(self) -> dict[str, Any]:
        """Return everything but the rows, and the names of the tasks in them."""
        names = list(dict.fromkeys(row[1] for row in self.rows))
        return {k: v for k, v in self.__dict__.items() if k != "rows"} | {"names": names}


def measure_blocks(session: Session, loaded: dict[str, Any]) -> list[BlockCosts]:
    """Ask every task without each block, or take that from an earlier run."""
    from core.evaluate import block_tasks, zero_shot

    progress, limit = session.run.progress, session.spec.limit
    keys = _keys(session, "each block")
    found = {place.name: _reused_blocks(session, place.name, keys) for place in session.places}
    places = [place for place in session.places if found[place.name] is None]
    late = [place for place in places if place.name not in loaded]
    loaded = loaded | _loaded(session, late)
    for place in places:
        began = time.perf_counter()
        results = block_tasks.ask_without_each_block(
            session.model,
            session.tokenizer,
            place,
            loaded[place.name],
            limit,
            zero_shot.batch_for(session.device.type),
            progress,
        )
        rows = tuple(block_tasks.costs(results))
        seconds = round(time.perf_counter() - began, 3)
        done = BlockCosts(place.name, rows, **keys[place.name], seconds=seconds)
        found[place.name] = done
        known.put_aside(session.run.book, done.key, vars(done))
        worst = min((row for row in rows if row[0] >= 0), key=lambda row: row[5])
        progress.log(f"{worst[1]}: without block {worst[0]} {worst[2]} changes by {worst[5]:+.4f}.")
    return [costs for place in session.places if (costs := found[place.name]) is not None]


def _reused_blocks(
    session: Session, task: str, keys: dict[str, dict[str, Any]]
) -> BlockCosts | None:
    what = f"Task {task} without each block"
    earlier = session.known(keys[task]["key"], what)
    if not earlier:
        part = session.aside(keys[task]["key"], what)
        return _read(BlockCosts, part) if part else None
    record, row = earlier
    rows = tuple(r for r in read_blocks(record.path) if r[1] in row["names"])
    origin = row.get("reused_from") or record.id
    common = {**keys[task], "seconds": row["seconds"], "reused_from": origin}
    return BlockCosts(task, rows, **common) if rows else None


def _read(kind: Callable[..., Result], value: dict[str, Any]) -> Result:
    """Return a result that was put aside as plain JSON values, whose tuples have become lists."""

    def tuples(part: Any) -> Any:
        return tuple(map(tuples, part)) if isinstance(part, list) else part

    return kind(**{name: tuples(part) for name, part in value.items() if name != "schema"})


def write_blocks(run: Run, found: Sequence[BlockCosts]) -> None:
    """Write skills.csv where something was asked without each block."""
    if found:
        run.write_csv("skills.csv", BLOCK_COLUMNS, [row for costs in found for row in costs.rows])


def read_blocks(folder: Path) -> list[tuple[Any, ...]]:
    """Return the rows of a run's skills.csv; empty where it has none."""
    try:
        with (folder / "skills.csv").open(encoding="utf-8", newline="") as handle:
            rows = [[row[column] for column in BLOCK_COLUMNS] for row in csv.DictReader(handle)]
        return [(int(r[0]), r[1], r[2], *(float(v) if v else None for v in r[3:])) for r in rows]
    except (OSError, KeyError, ValueError):
        return []


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
        complete = all(error is not None for error in errors)
        stderr = math.sqrt(math.fsum(e * e for e in errors)) / len(parts) if complete else None
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
