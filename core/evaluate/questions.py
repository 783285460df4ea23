"""Accuracy of a checkpoint on tasks: measured, or reused from an earlier run with the same key."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from core.checkpoint import chat
from core.evaluate import known, results, suites
from core.evaluate.results import Asked, BlockCost, Prompting, Sample, Score, Skills

if TYPE_CHECKING:
    from core.evaluate.session import Session
    from core.runs.run import Run

LIBRARIES = ("lm-eval", "datasets")
Kind = TypeVar("Kind", bound=Asked | Skills)

MEANS = {"paper": "AVE", "demo": "AVE demo"}
"""Presets whose plain mean is reported if all their tasks were run, and the mean's name."""


@dataclass(frozen=True, kw_only=True)
class AskedTask(Asked):
    """One task or group with its questions."""

    samples: tuple[Sample, ...] = field(default=(), repr=False)

    def entry(self) -> Asked:
        """Return the entry for the summary: everything but the samples."""
        return _only(Asked, self)


@dataclass(frozen=True, kw_only=True)
class BlockCosts(Skills):
    """The cost of removing each single block on one task."""

    rows: tuple[BlockCost, ...] = field(repr=False)

    def entry(self) -> Skills:
        """Return the entry for the summary: everything but the rows."""
        return _only(Skills, self)


def _only(kind: type[Kind], value: Kind) -> Kind:
    """Return the fields that ``kind`` has of an object of a class derived from it."""
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(value, name) for name in names})


def load(session: Session) -> dict[str, Any]:
    """Return the tasks that have to be run, with their data, by name.

    Raises:
        DataError: A task's data is not on this machine, or lm-eval cannot read the task's file.
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

    count = "1 task" if len(places) == 1 else f"{len(places)} tasks"
    session.run.progress.log(f"Loading {count}.")
    manager = zero_shot.manager(places, allow_code=session.spec.allow_task_code)
    return {place.name: zero_shot.load(manager, place, session.spec.fewshot) for place in places}


def measure(session: Session, loaded: dict[str, Any]) -> list[AskedTask]:
    """Run every task, or reuse its result from an earlier run."""
    found: dict[str, AskedTask] = {}
    open_places = []
    keys = _keys(session, "task")
    for place in session.places:
        reused = _reused(session, place.name, keys[place.name])
        if reused:
            found[place.name] = reused
        else:
            open_places.append(place)
    if open_places:
        late = [place for place in open_places if place.name not in loaded]
        found |= _asked(session, open_places, keys, loaded | _loaded(session, late))
    return [found[place.name] for place in session.places]


def _keys(session: Session, kind: str) -> dict[str, dict[str, Any]]:
    """Return the content, limit and key of every requested task."""
    found = {}
    for place in session.places:
        local = suites.files_content(place) if place.local else ""
        content = local or f"lm-eval {known.versions('lm-eval')['lm-eval']}"
        limit, prompting = session.spec.limit, session.spec.prompting
        how: dict[str, Any] = {}
        if prompting != Prompting():  # else the key is what it was before there were options
            how["prompting"] = dataclasses.asdict(prompting)
        if prompting.chat_template:
            how["template"] = chat.source_of(session.folder)
        key = session.key(
            *LIBRARIES, kind=kind, task=place.name, content=content, limit=limit, **how
        )
        common = {"content": content, "key": key, "limit": limit, "prompting": prompting}
        found[place.name] = common
    return found


def _reused(session: Session, task: str, common: dict[str, Any]) -> AskedTask | None:
    """Return the result of an earlier run with the same key, if its samples still exist."""
    earlier = session.known(common["key"], Asked, f"Task {task}")
    if not earlier:
        return session.aside(common["key"], AskedTask, f"Task {task}")
    record, same = earlier
    names = {score.task for score in same.rows}
    samples = tuple(s for s in results.read_samples(record.path) if s.task in names)
    if not samples:
        return None
    return AskedTask(
        task=task,
        scores=same.scores,
        **common,
        task_versions=same.task_versions,
        shots=same.shots,
        output_types=same.output_types,
        batch=same.batch,
        seconds=same.seconds,
        reused_from=same.reused_from or record.id,
        samples=samples,
    )


def _asked(
    session: Session,
    places: Sequence[suites.Place],
    keys: dict[str, dict[str, Any]],
    loaded: dict[str, Any],
) -> dict[str, AskedTask]:
    """Run the tasks of ``places`` with one loaded model."""
    from core.evaluate import zero_shot

    progress = session.run.progress
    batch = zero_shot.batch_for(session.device.type)
    ranks = session.run.ranks
    lm = zero_shot.harness_model(session.model, session.tokenizer, batch, progress, ranks)
    asked = {}
    for place in places:
        progress.begin()
        found = zero_shot.ask(
            lm, place, loaded[place.name], session.spec.limit, progress, session.spec.prompting
        )
        done = AskedTask(
            task=place.name,
            scores=tuple((s.task, s.metric, s.value, s.stderr, s.samples) for s in found.scores),
            **keys[place.name],
            task_versions=found.versions,
            shots=found.shots,
            output_types=found.output_types,
            batch=found.batch,
            seconds=found.seconds,
            samples=found.samples,
        )
        asked[place.name] = done
        if ranks.is_first:
            known.put_aside(session.run.book, done.key, dataclasses.asdict(done))
        first = found.scores[0]
        error = f" ± {first.stderr:.4f}" if first.stderr is not None else ""
        what = f"{first.task}: {first.metric} {first.value:.4f}{error}"
        progress.log(f"{what} ({first.samples} questions).")
    return asked


def measure_blocks(session: Session, loaded: dict[str, Any]) -> list[BlockCosts]:
    """Run every task without each block, or reuse the result of an earlier run."""
    from core.evaluate import block_tasks, zero_shot

    progress, limit = session.run.progress, session.spec.limit
    keys = _keys(session, "each block")
    found = {place.name: _reused_blocks(session, place.name, keys) for place in session.places}
    places = [place for place in session.places if found[place.name] is None]
    late = [place for place in places if place.name not in loaded]
    loaded = loaded | _loaded(session, late)
    for place in places:
        progress.begin()
        began = time.perf_counter()
        answers = block_tasks.ask_without_each_block(
            session.model,
            session.tokenizer,
            place,
            loaded[place.name],
            limit,
            zero_shot.batch_for(session.device.type),
            progress,
            session.spec.prompting,
        )
        rows = tuple(block_tasks.costs(answers))
        done = BlockCosts(
            task=place.name,
            rows=rows,
            **keys[place.name],
            seconds=round(time.perf_counter() - began, 3),
            names=tuple(dict.fromkeys(row.task for row in rows)),
        )
        found[place.name] = done
        known.put_aside(session.run.book, done.key, dataclasses.asdict(done))
        worst = min((row for row in rows if row.block >= 0), key=lambda row: row.delta)
        what = f"{worst.task}: without block {worst.block} {worst.metric}"
        progress.log(f"{what} changes by {worst.delta:+.4f}.")
    return [costs for place in session.places if (costs := found[place.name]) is not None]


def _reused_blocks(
    session: Session, task: str, keys: dict[str, dict[str, Any]]
) -> BlockCosts | None:
    what = f"Task {task} without each block"
    earlier = session.known(keys[task]["key"], Skills, what)
    if not earlier:
        return session.aside(keys[task]["key"], BlockCosts, what)
    record, same = earlier
    rows = tuple(r for r in BlockCost.read(record.path) if r.task in same.names)
    if not rows:
        return None
    return BlockCosts(
        task=task,
        rows=rows,
        **keys[task],
        seconds=same.seconds,
        reused_from=same.reused_from or record.id,
        names=same.names,
    )


def write_blocks(run: Run, found: Sequence[BlockCosts]) -> None:
    """Write skills.csv if a task was run without each block."""
    if found:
        BlockCost.write(run, (row for costs in found for row in costs.rows))


def table(asked: Iterable[AskedTask]) -> list[Score]:
    """Return the rows of tasks.csv: every score, then the means of complete presets."""
    rows = [score for task in asked for score in task.rows]
    return rows + means(rows)


def means(rows: Sequence[Score]) -> list[Score]:
    """Return a row for each preset in `MEANS` with all its tasks in ``rows``.

    It is the plain mean over tasks; its standard error treats the tasks as independent.
    """
    first: dict[str, Score] = {}
    for row in rows:
        first.setdefault(row.task, row)
    found = []
    for preset, name in MEANS.items():
        parts = [first[task] for task in suites.PRESETS[preset] if task in first]
        if len(parts) < len(suites.PRESETS[preset]):
            continue
        errors = [part.stderr for part in parts if part.stderr is not None]
        complete = len(errors) == len(parts)
        stderr = math.sqrt(math.fsum(e * e for e in errors)) / len(parts) if complete else None
        value = math.fsum(part.value for part in parts) / len(parts)
        found.append(Score(name, "mean", value, stderr, sum(part.samples or 0 for part in parts)))
    return found


def write(run: Run, asked: Sequence[AskedTask]) -> None:
    """Write tasks.csv (without rows if no task was run) and samples.jsonl."""
    Score.write(run, table(asked))
    results.write_samples(run, (sample for task in asked for sample in task.samples))
