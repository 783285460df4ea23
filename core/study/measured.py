"""What runs measured about the checkpoints of a study."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.benchmark import results as benchmark
from core.checkpoint.headers import file_state
from core.errors import DepthcutError
from core.evaluate import results as evaluate
from core.evaluate.suites import is_written
from core.prune.plan import choose, unprotected
from core.prune.results import perplexity
from core.prune.score_results import Curve, CurveRow, Importance
from core.prune.scores import BlockScores, load
from core.prune.set_results import Search, SetRow
from core.retrain import results as retrain
from core.retrain.shares import Share, shares
from core.runs.workspace import RunRecord
from core.study.kinds import Benchmark, Finder, Protocol, Quality, Task, Variant, info_of, meanings


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return a CSV file's rows with numbers, true and false as such and empty cells as None.

    Empty if the file is missing or is not a table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            return [{k: _value(v) for k, v in row.items()} for row in csv.DictReader(handle)]
    except (OSError, csv.Error, UnicodeDecodeError):
        return []


def _value(text: Any) -> Any:
    if text in ("", None):
        return None
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def benchmarks(
    records: Iterable[RunRecord], finder: Finder
) -> tuple[list[Benchmark], list[Variant]]:
    """Return the benchmark runs of the study's variants, and the other variants in these runs."""
    found: list[Benchmark] = []
    others: dict[str, Variant] = {}
    folders: dict[tuple[str, str], Path | None] = {}
    for record in (r for r in records if r.command == "benchmark"):
        summary = benchmark.Summary.read(record.path)
        if summary is None:
            continue
        cwd = record.cwd
        ids: dict[str, str] = {}
        beside: dict[str, Variant] = {}
        missing = []
        for entry in summary.variants:
            name, path = entry.name, entry.path
            variant = finder(path, cwd)
            if (path, cwd) not in folders:
                there = (p for p in meanings(path, cwd) if (p / "config.json").is_file())
                folders[path, cwd] = next(there, None)
            folder = folders[path, cwd]
            if folder is None:
                missing.append(name)
            elif variant:
                ids[name] = variant.id
            else:
                beside[name] = Variant(
                    str(folder), name, "other", method_label="other",
                    parameters=entry.parameters, folder=folder,
                )  # fmt: skip
        if not ids:
            continue
        others |= {v.id: v for v in beside.values()}
        ids |= {name: v.id for name, v in beside.items()}
        points = benchmark.Point.read(record.path)
        compiled = benchmark.CompiledPoint.read(record.path) if summary.compiled else ()
        found.append(Benchmark(record, summary, points, ids, tuple(missing), compiled))
    return found, list(others.values())


def perplexities_and_tasks(
    records: Iterable[RunRecord], finder: Finder, dense: Variant
) -> tuple[list[Quality], list[Task]]:
    """Return perplexities and task scores of the study's variants and plans.

    Runs are left out if, by their summary, they measured other weights than the variant's folder
    now holds: the checkpoint was replaced in the meantime.
    """
    quality: list[Quality] = []
    tasks: list[Task] = []
    keys: dict[str, str] = {}

    def current(variant: Variant, measured: str) -> bool:
        """Whether a run that measured weights with this key measured those of the folder now."""
        if variant.id not in keys:
            info = info_of(variant)
            keys[variant.id] = info.key if info else ""
        now = keys[variant.id]
        return not measured or not now or measured == now

    for record in records:
        variant = finder(str(record.spec.get("checkpoint") or ""), record.cwd)
        if variant is None:
            continue
        if record.command == "evaluate":
            found = evaluate.Summary.read(record.path) or evaluate.Summary()
            if current(variant, found.checkpoint_key):
                quality += _evaluated(record, found, variant)
                tasks += _tasks(record, found, variant)
        elif record.command == "retrain":
            quality += _retrained(record, variant, dense)
        elif record.command == "importance" and variant.kind == "dense":
            scores = Importance.read(record.path)
            if scores and current(variant, scores.checkpoint_key or ""):
                quality += _scored(record, scores, variant)
        elif record.command == "curve" and variant.kind == "dense":
            curve = Curve.read(record.path) or Curve()
            if current(variant, curve.checkpoint_key or ""):
                quality += _curve(record, curve, variant)
        elif record.command == "search" and variant.kind == "dense":
            search = Search.read(record.path)
            if search and current(variant, search.checkpoint_key):
                quality += _searched(record, search, variant)
    return [q for q in quality if isinstance(q.ppl, (int, float)) and q.ppl > 0], tasks


def _on(record: RunRecord, device: str, dtype: str) -> dict[str, Any]:
    """Return the run, device and precision of a perplexity."""
    return {
        "run": record.id,
        "device": device or record.device,
        "dtype": dtype,
        "started": record.started,
    }


def _evaluated(record: RunRecord, summary: evaluate.Summary, variant: Variant) -> list[Quality]:
    """Return the rows of an evaluate run's perplexity.csv."""
    parts = {(text.source, text.window, text.bos): _part(text) for text in summary.perplexity}
    return [
        Quality(
            Protocol(
                row.source,
                row.window,
                row.bos,
                parts.get((row.source, row.window or 0, row.bos), ""),
            ),
            row.ppl,
            variant=variant.id,
            tokens=row.tokens,
            parameters=variant.parameters,
            ratio=variant.ratio,
            **_on(record, summary.device, summary.dtype),
        )
        for row in evaluate.TextRow.read(record.path)
        if row.source
    ]


def _part(text: evaluate.Text) -> str:
    """Return the part of a text that was evaluated, in words; empty for the whole text."""
    return f"first {text.windows:,} windows" if text.max_tokens is not None else ""


def _tasks(record: RunRecord, summary: evaluate.Summary, variant: Variant) -> list[Task]:
    how = {row.task: asked.prompting.label for asked in summary.tasks for row in asked.rows}
    kinds = {task: kind for asked in summary.tasks for task, kind in asked.output_types.items()}
    usual = next(iter(how.values()), "")  # of all tasks of a run, so also of a preset's mean
    return [
        Task(
            variant.id, row.task, row.metric, row.value, row.stderr, row.samples,
            record.id, record.started, how.get(row.task, usual),
            is_written(row.task, row.metric, kinds.get(row.task, "")),
        )
        for row in evaluate.Score.read(record.path)
        if row.task
    ]  # fmt: skip


def _on_rows(record: RunRecord, found: Importance | Curve | Search) -> dict[str, Any]:
    """Return protocol, run, device and precision of perplexities on calibration rows."""
    detail = f"{found.samples} rows (seed {found.seed})"
    if found.text.chat_template:
        detail += " in the chat template"
    protocol = Protocol(str(found.calibration), found.length, "rows", detail)
    return {"protocol": protocol, **_on(record, found.device or "", found.dtype or "")}


def _scored(record: RunRecord, run: Importance, variant: Variant) -> list[Quality]:
    """Return the dense perplexity of an importance run, and those of its criteria's first blocks.

    The sweep measured the model without each block: the one-block plan of every criterion that
    the run scored is among them.
    """
    if not run.dense_ppl:
        return []
    common = _on_rows(record, run)
    dense = Quality(
        ppl=run.dense_ppl, variant=variant.id, ratio=0.0,
        parameters=variant.parameters, **common,
    )  # fmt: skip
    return [dense, *_first_blocks(record.path, variant, common)]


def _first_blocks(folder: Path, variant: Variant, common: dict[str, Any]) -> list[Quality]:
    """Return the one-block plan of each criterion of an importance run, with default protection.

    ``common`` holds the fields shared by all perplexities of the run: protocol, run, device.
    Empty if the run has no perplexities without single blocks, or its checkpoint was deleted.
    """
    info = info_of(variant)
    try:
        scores = _scores(folder, file_state(folder, (".csv",))) if info else None
    except (DepthcutError, OSError):
        return []
    if not info or not scores or scores.blocks != info.blocks or "ppl" not in scores.columns:
        return []
    found = []
    for criterion in scores.available:
        try:
            plan = choose(scores, criterion, count=1, info=info)
        except DepthcutError:
            continue
        if plan.drop and (ppl := scores.columns["ppl"][plan.drop[0]]) is not None:
            found.append(
                Quality(
                    ppl=ppl,
                    criterion=plan.criterion,
                    protected=bool(plan.protected),
                    drop=plan.drop,
                    cut_in=unprotected(plan.blocks, plan.protected),
                    parameters=plan.params,
                    ratio=plan.ratio,
                    **common,
                )
            )
    return found


@functools.lru_cache(maxsize=64)
def _scores(folder: Path, _: object) -> BlockScores:
    return load(folder)


def _curve(record: RunRecord, run: Curve, variant: Variant) -> list[Quality]:
    """Return a curve run's plans; their zeroth point is the dense checkpoint."""
    common = _on_rows(record, run)
    info = info_of(variant)
    cut_in = unprotected(info.blocks if info else 0, run.protected)
    found = []
    for row in CurveRow.read(record.path):
        if row.count == 0 or row.ppl is None:
            continue
        found.append(
            Quality(
                ppl=row.ppl,
                criterion=row.criterion,
                protected=bool(run.protected),
                drop=run.drop_of(row.criterion, row.count),
                cut_in=cut_in,
                parameters=row.params,
                ratio=row.ratio,
                **common,
            )
        )
    if run.dense_ppl:
        found.append(
            Quality(
                ppl=run.dense_ppl,
                variant=variant.id,
                parameters=variant.parameters,
                ratio=0.0,
                **common,
            )
        )
    return found


def recoveries(made: Iterable[Variant]) -> dict[str, tuple[Share, ...]]:
    """Return by the id of each retrained variant what came back on the texts its run measured."""
    found = {}
    for variant in made:
        record = variant.record
        if record is None or record.command != "retrain":
            continue
        if summary := retrain.Summary.read(record.path):
            found[variant.id] = shares(summary, retrain.read_measures(record.path))
    return found


def _searched(record: RunRecord, run: Search, variant: Variant) -> list[Quality]:
    """Return the dense perplexity of a search, and those of the sets of blocks that it found.

    They are of the rows that chose the sets, as a curve's are. Empty if sets were healed: these
    were measured on other rows. Sets with parts of blocks are left out.
    """
    if run.heal != "none" or (dense := perplexity(run.dense_nll)) is None:
        return []
    common = _on_rows(record, run)
    protected = range(run.protect_first), range(run.blocks - run.protect_last, run.blocks)
    kept = tuple(block for side in protected for block in side)
    found = [
        Quality(
            ppl=ppl,
            criterion=row.method,
            protected=bool(kept),
            drop=row.blocks,
            cut_in=unprotected(run.blocks, kept),
            parameters=row.params,
            ratio=row.ratio,
            **common,
        )
        for row in SetRow.read(record.path)
        if row.blocks and not row.removal.partial and (ppl := perplexity(row.nll)) is not None
    ]
    whole = Quality(
        ppl=dense, variant=variant.id, parameters=variant.parameters, ratio=0.0, **common
    )
    return [*found, whole]


def _retrained(record: RunRecord, variant: Variant, dense: Variant) -> list[Quality]:
    """Return held-out perplexities of a retrain run: dense, before (its parent) and after."""
    summary = retrain.Summary.read(record.path)
    if summary is None:
        return []
    heldout = summary.heldout
    source = heldout.source or str(record.spec.get("data") or "")
    protocol = Protocol(source, None, "held-out", f"{heldout.rows} rows, {heldout.tokens} tokens")
    common = {"protocol": protocol, **_on(record, summary.device, summary.dtype)}
    rows = (
        (summary.heldout_ppl_dense, dense.id, dense),
        (summary.heldout_ppl_before, variant.id, variant),
        (summary.heldout_ppl_after, record.id, variant),
    )
    return [
        Quality(ppl=ppl, variant=name, parameters=sized.parameters, ratio=sized.ratio, **common)
        for ppl, name, sized in rows
        if ppl
    ]
