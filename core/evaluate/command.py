"""``python -m core evaluate CHECKPOINT --out DIR``: perplexity and zero-shot tasks.

Its options are `core.evaluate.spec.EvaluateSpec`. Nothing here imports torch at its top.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from core.checkpoint import locate
from core.data import sources
from core.evaluate import estimate as work
from core.evaluate import known, suites, task_code
from core.evaluate.results import Summary, Text
from core.evaluate.spec import EvaluateSpec, check_model, check_template, with_texts
from core.runs import dtypes, ranks
from core.runs.devices import MIB
from core.runs.progress import InParts

if TYPE_CHECKING:
    from core.evaluate.session import Session
    from core.runs.run import Run

__all__ = ("EvaluateSpec", "check", "dry_run", "run")


def check(spec: EvaluateSpec) -> None:
    """Raise `OptionError` for unknown tasks, and for those that run code without consent."""
    if spec.tasks:
        places = suites.find(suites.expand(spec.tasks), spec.task_dir)
        task_code.check(places, allowed=spec.allow_task_code)


def dry_run(spec: EvaluateSpec) -> dict[str, Any]:
    """Return the estimated operations, memory and time; null if data must be downloaded first."""
    checkpoint = locate.open(spec.checkpoint, need="config", quantized=True)
    folder, info = checkpoint.folder, checkpoint.info
    spec = with_texts(spec, folder)
    check_model(spec, info)
    check_template(spec, folder)
    tasks = suites.expand(spec.tasks)
    check(spec)
    texts: list[dict[str, Any]] = []
    for source in spec.perplexity:
        sources.describe(source)
        tokens = work.text_tokens(source, folder)
        for window in spec.window:
            if tokens is not None and spec.max_tokens is not None:
                tokens = min(tokens, spec.max_tokens)
            flops = None if tokens is None else work.perplexity_flops(info, tokens, window)
            texts.append({"source": source, "window": window, "tokens": tokens, "flops": flops})
    asked: list[dict[str, Any]] = [
        {
            "task": t,
            "flops": work.task_flops(info, t, spec.limit, folder, each_block=spec.each_block),
        }
        for t in tasks
    ]
    parts = [part["flops"] for part in (*texts, *asked)]
    flops = None if None in parts else sum(parts)
    rate, origin = work.rate(spec.device, info.parameters)
    seconds = [p["flops"] / rate if p["flops"] and rate else None for p in texts]
    seconds += [work.task_s(info, t, spec, folder, rate) for t in tasks]
    known = [one for one in seconds if one is not None]
    formats = dtypes.expected(spec.dtype, info.dtype, spec.device)
    rooms = [
        work.capacity(spec, info, formats, (t["tokens"] or 0) // t["window"], t["window"])
        for t in texts
    ]
    if tasks:
        work.check_whole(spec, info, formats)
    room = max(rooms, key=lambda found: found.streamed_bytes, default=None)
    each = [
        work.text_footprint(spec, info, formats, max(t["tokens"] or 0, t["window"]), t["window"])
        for t in texts
    ]
    if tasks:
        each.append(work.tasks_footprint(spec, info, formats, 0.0))
    taken = max(each, key=lambda one: one.memory_bytes, default=None)
    time_s = work.START_S + sum(known) if len(known) == len(seconds) else None
    windows = [t["tokens"] // t["window"] for t in texts if t["tokens"] is not None]
    return {
        "checkpoint": spec.checkpoint,
        "perplexity": texts,
        "tasks": asked,
        "bos": spec.bos,
        "limit": spec.limit,
        "prompting": spec.prompting.label,
        "flops": flops,
        "memory_mib": round(taken.memory_bytes / MIB, 1) if taken else None,
        **(taken.facts() if taken else {}),
        "seconds": ranks.shared_seconds(time_s, spec.device, spec.processes),
        **(room.facts() if room else {}),
        **(ranks.facts(spec.processes, min(windows)) if windows else {}),
        "kind": "estimated",
        "seconds_from": origin if len(known) == len(seconds) else None,
    }


def _rate(session: Session, measured: list[Text]) -> float | None:
    """Return the operations per second over the texts that this run measured."""
    own = [text for text in measured if text.reused_from is None]
    if session.spec.processes > 1:
        return None
    flops = sum(work.forward_flops(session.info, t.windows, t.window) for t in own)
    spent = sum(text.seconds for text in own)
    return flops / spent if flops and spent else None


def run(spec: EvaluateSpec, run: Run) -> None:
    """Measure the requested texts and tasks and write the result files."""
    from core.evaluate import questions, texts
    from core.evaluate.session import Session

    began = time.perf_counter()
    checkpoint = locate.open(spec.checkpoint, run.progress, need="config", quantized=True)
    spec = with_texts(spec, checkpoint.folder)
    session = Session(spec, run)
    loaded = questions.load(session)  # before any work, to report missing data immediately
    run.progress = InParts(run.progress, work.weights(spec, session.info, session.folder))
    measured = []
    for source in spec.perplexity:
        for window in spec.window:
            run.progress.begin()
            measured.append(texts.measure(session, source, window))
    texts.write(run, measured)  # the other processes' runs write nothing
    asked = questions.measure(session, loaded)
    questions.write(run, asked)
    skills = questions.measure_blocks(session, loaded) if spec.each_block else []
    questions.write_blocks(run, skills)
    Summary(
        checkpoint=spec.checkpoint,
        checkpoint_key=session.info.key,
        content=session.content,
        family=session.info.family,
        blocks=session.info.blocks,
        parameters=session.info.parameters,
        perplexity=tuple(result.text for result in measured),
        tasks=tuple(task.entry() for task in asked),
        skills=tuple(task.entry() for task in skills),
        limit=spec.limit,
        flops_per_s=_rate(session, [result.text for result in measured]),
        seconds=round(time.perf_counter() - began, 3),
        processes=spec.processes,
        **session.prepared.facts(),
        versions=known.versions(*(questions.LIBRARIES if asked else ())),
    ).write(run)
    if run.ranks.is_first:
        known.clear_aside(run.book)
