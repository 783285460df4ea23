"""What runs measured about the checkpoints of a study."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.checkpoint.headers import file_state
from core.errors import DepthcutError
from core.prune.plan import choose, unprotected
from core.prune.score_results import Curve, CurveRow, Importance
from core.prune.scores import BlockScores, load
from core.runs import workspace
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
        summary = workspace.read_json(record.path / "summary.json") or {}
        cwd = record.cwd
        ids: dict[str, str] = {}
        beside: dict[str, Variant] = {}
        missing = []
        for entry in summary.get("variants") or []:
            name, path = str(entry.get("name")), str(entry.get("path") or "")
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
                    parameters=entry.get("parameters"), folder=folder,
                )  # fmt: skip
        if not ids:
            continue
        others |= {v.id: v for v in beside.values()}
        ids |= {name: v.id for name, v in beside.items()}
        rows = read_rows(record.path / "points.csv")
        points = tuple({**row, "id": ids.get(str(row.get("variant")), "")} for row in rows)
        found.append(Benchmark(record, summary, points, tuple(missing)))
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
    for record in records:
        variant = finder(str(record.spec.get("checkpoint") or ""), record.cwd)
        if variant is None:
            continue
        summary = workspace.read_json(record.path / "summary.json") or {}
        if variant.id not in keys:
            info = info_of(variant)
            keys[variant.id] = info.key if info else ""
        measured, now = summary.get("checkpoint_key"), keys[variant.id]
        if measured and now and measured != now:
            continue
        if record.command == "evaluate":
            quality += _evaluated(record, summary, variant)
            tasks += _tasks(record, variant)
        elif record.command == "retrain":
            quality += _retrained(record, summary, variant, dense)
        elif record.command == "importance" and variant.kind == "dense":
            quality += _scored(record, variant)
        elif record.command == "curve" and variant.kind == "dense":
            quality += _curve(record, variant)
    return [q for q in quality if isinstance(q.ppl, (int, float)) and q.ppl > 0], tasks


def _on(record: RunRecord, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the run, device and precision of a perplexity."""
    return {
        "run": record.id,
        "device": str(summary.get("device") or record.device),
        "dtype": str(summary.get("dtype") or ""),
        "started": record.started,
    }


def _evaluated(record: RunRecord, summary: dict[str, Any], variant: Variant) -> list[Quality]:
    """Return the rows of an evaluate run's perplexity.csv."""
    return [
        Quality(
            Protocol(str(row["source"]), row.get("window"), str(row.get("bos"))),
            row["ppl"],
            variant=variant.id,
            tokens=row.get("tokens"),
            parameters=variant.parameters,
            ratio=variant.ratio,
            **_on(record, summary),
        )
        for row in read_rows(record.path / "perplexity.csv")
        if row.get("source") and row.get("ppl") is not None
    ]


def _tasks(record: RunRecord, variant: Variant) -> list[Task]:
    return [
        Task(
            variant.id, str(row["task"]), str(row["metric"]), float(row["value"]),
            row.get("stderr"), row.get("samples"), record.id, record.started,
        )
        for row in read_rows(record.path / "tasks.csv")
        if row.get("task") and isinstance(row.get("value"), (int, float))
    ]  # fmt: skip


def _on_rows(record: RunRecord, found: Importance | Curve) -> dict[str, Any]:
    """Return protocol, run, device and precision of perplexities on calibration rows."""
    detail = f"{found.samples} rows (seed {found.seed})"
    return {
        "protocol": Protocol(str(found.calibration), found.length, "rows", detail),
        "run": record.id,
        "device": found.device or record.device,
        "dtype": found.dtype or "",
        "started": record.started,
    }


def _scored(record: RunRecord, variant: Variant) -> list[Quality]:
    """Return the dense perplexity of an importance run, and those of its criteria's first blocks.

    The sweep measured the model without each block: the one-block plan of every criterion that
    the run scored is among them.
    """
    run = Importance.read(record.path)
    if run is None or not run.dense_ppl:
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
        if (ppl := scores.columns["ppl"][plan.drop[0]]) is not None:
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


def _curve(record: RunRecord, variant: Variant) -> list[Quality]:
    """Return a curve run's plans; their zeroth point is the dense checkpoint."""
    run = Curve.read(record.path) or Curve()
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


def _retrained(
    record: RunRecord, summary: dict[str, Any], variant: Variant, dense: Variant
) -> list[Quality]:
    """Return held-out perplexities of a retrain run: dense, before (its parent) and after."""
    heldout = summary.get("heldout") or {}
    source = str(heldout.get("source") or heldout.get("name") or record.spec.get("data") or "")
    detail = f"{heldout.get('rows')} rows, {heldout.get('tokens')} tokens"
    common = {"protocol": Protocol(source, None, "held-out", detail), **_on(record, summary)}
    rows = (("dense", dense.id, dense), ("before", variant.id, variant),
            ("after", record.id, variant))  # fmt: skip
    return [
        Quality(ppl=ppl, variant=name, parameters=sized.parameters, ratio=sized.ratio, **common)
        for which, name, sized in rows
        if (ppl := summary.get(f"heldout_ppl_{which}"))
    ]
