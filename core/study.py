"""A study: a dense checkpoint and every run of a workspace descended from it.

``study(Workspace(), "demo")`` gathers the variants (dense, depth, width, retrained), and what runs
measured about them: perplexities, task scores, benchmark points, and the perplexities of plans
that were never written as checkpoints (importance and curve runs). Everything is read from run
directories; nothing is loaded, and torch is not needed.

A perplexity is only comparable with others of the same `Protocol`: the same text, window and BOS.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import checkpoint, variants, workspace
from core.errors import DepthcutError
from core.prune.outlook import curve_points
from core.retrain.command import LABELS as RETRAINED
from core.tokenizer_files import TOKENIZER_FILES
from core.workspace import BOOKKEEPING, RunRecord, Workspace

CRITERIA = {
    "ppl": "PPL",
    "taylor": "Taylor",
    "magnitude": "Magnitude",
    "block-influence": "Block Influence",
    "angular": "Angular",
    "relative-update": "Relative update",
    "last": "Last blocks",
    "random": "Random",
}
WIDTH = {"llm-pruner": "LLM-Pruner", "flap": "FLAP", "wanda-sp": "Wanda-sp"}
PLUS = ("ppl", "taylor", "magnitude")
"""Criteria whose published runs are called ``+`` where first and last blocks are protected."""


def method_label(method: str, protected: bool = False) -> str:
    """Return how a criterion or a width method is called: ``taylor`` -> Taylor+ or Taylor."""
    name = method.replace("_", "-").removesuffix("+")
    label = CRITERIA.get(name) or WIDTH.get(name) or name.capitalize()
    return label + ("+" if name in PLUS and (protected or method.endswith("+")) else "")


@dataclass(frozen=True)
class Variant:
    """One checkpoint of a study."""

    id: str
    """The run's id; for a dense checkpoint the name it was given."""
    label: str
    """How charts and tables call it; different for every variant of a study."""
    kind: str
    """dense, depth, width, or other: measured beside the study, not descended from it."""
    method: str = ""
    """Criterion or width method as the command line has it; empty where blocks were named."""
    method_label: str = ""
    """PPL+, Taylor+, LLM-Pruner, by hand, dense, ..."""
    retrained: str = ""
    """lora, continued, full, or nothing."""
    dropped: tuple[int, ...] = ()
    """Blocks of the dense model that are gone, in removal order."""
    parameters: int | None = None
    ratio: float | None = None
    """Share of the dense checkpoint's parameters that is gone."""
    parent: str = ""
    """Id of the variant it was made from."""
    folder: Path | None = None
    """Where its checkpoint lies; None where there is none (an adapter not merged, deleted)."""
    record: RunRecord | None = None

    @property
    def is_retrained(self) -> bool:
        """Whether it was trained after the cut."""
        return bool(self.retrained)


@dataclass(frozen=True)
class Protocol:
    """How a perplexity was measured; only equal ones compare."""

    source: str
    window: int | None
    bos: str
    """once, window, or rows: crops of calibration rows (importance, curve), or held-out rows."""
    detail: str = ""
    """What else must be equal: samples and seed of rows."""

    @property
    def label(self) -> str:
        """The protocol in words."""
        name = Path(self.source).name or self.source
        if self.bos == "held-out":
            return f"held-out rows of {name}, {self.detail}"
        if self.bos == "rows":
            return f"{name}, {self.detail} of {self.window} tokens"
        how = "in every window" if self.bos == "window" else "once"
        return f"{name}, windows of {self.window}, BOS {how}"


@dataclass(frozen=True)
class Quality:
    """One measured perplexity: of a variant, or of a plan (``variant`` empty, ``drop`` given)."""

    protocol: Protocol
    ppl: float
    run: str
    variant: str = ""
    criterion: str = ""
    protected: bool = False
    drop: tuple[int, ...] = ()
    parameters: int | None = None
    ratio: float | None = None
    tokens: int | None = None
    device: str = ""
    dtype: str = ""
    started: float = 0.0


@dataclass(frozen=True)
class Task:
    """One row of an evaluate run's tasks.csv."""

    variant: str
    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    run: str
    started: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """One benchmark run: its points, each with the id of its variant, and its summary."""

    record: RunRecord
    summary: dict[str, Any]
    points: tuple[dict[str, Any], ...]
    """Rows of points.csv with numbers as numbers, and ``id``: the variant, empty if it is gone."""
    missing: tuple[str, ...] = ()
    """Names of measured variants whose checkpoint has been deleted since."""

    @property
    def id(self) -> str:
        """The run's id."""
        return self.record.id


@dataclass(frozen=True)
class Study:
    """A dense checkpoint and all that is known of it and of what was made from it."""

    variants: tuple[Variant, ...]
    """The dense one first, then by age; after them others that were measured beside them."""
    quality: tuple[Quality, ...] = ()
    tasks: tuple[Task, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    """Newest first."""
    runs: tuple[RunRecord, ...] = field(default=(), repr=False)
    """All runs that belong to the study, newest first."""

    @property
    def dense(self) -> Variant:
        """The checkpoint everything descends from."""
        return self.variants[0]

    def find(self, name: str) -> Variant | None:
        """Return the variant with this id, else the one with this label."""
        by_id = {v.id: v for v in self.variants}
        return by_id.get(name) or next((v for v in self.variants if v.label == name), None)

    def at(self, folder: str | Path) -> Variant | None:
        """Return the variant whose checkpoint or run a path or a spec's name means."""
        return _Finder(self.variants)(str(folder))

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The ways perplexity was measured, the one with most checkpoints first."""
        counts: dict[Protocol, tuple[int, int]] = {}
        for row in self.quality:
            made, planned = counts.get(row.protocol, (0, 0))
            counts[row.protocol] = (made + bool(row.variant), planned + (not row.variant))
        return tuple(sorted(counts, key=lambda p: counts[p], reverse=True))

    def perplexity(self, variant: str, protocol: Protocol) -> Quality | None:
        """Return the newest perplexity of a variant by a protocol; None where it has none."""
        found = [q for q in self.quality if (q.variant, q.protocol) == (variant, protocol)]
        return max(found, key=lambda q: q.started, default=None)

    def plans(self, protocol: Protocol) -> tuple[Quality, ...]:
        """Return the perplexities of plans by a protocol: criterion, count, blocks."""
        return tuple(q for q in self.quality if not q.variant and q.protocol == protocol)


class _Finder:
    """From what a spec or a summary names to a variant."""

    def __init__(self, known: Sequence[Variant]) -> None:
        self.by_folder: dict[Path, Variant] = {}
        for variant in reversed(known):
            for folder in (variant.folder, variant.record.path if variant.record else None):
                if folder:
                    self.by_folder[folder.resolve()] = variant
        self.by_name = {v.id: v for v in known}

    def __call__(self, name: str, cwd: str = "") -> Variant | None:
        if name in self.by_name:
            return self.by_name[name]
        for path in _meanings(name, cwd):
            for candidate in (path, *path.parents):
                if candidate in self.by_folder:
                    return self.by_folder[candidate]
        return None


def _meanings(name: str, cwd: str = "") -> list[Path]:
    """Return the folders that a spec's name may mean: from here, the workspace, or its cwd."""
    local = checkpoint.local_folder(name)
    starts = [local, Path(name).expanduser(), workspace.default_root() / name]
    starts += [Path(cwd) / name] if cwd else []
    return [start.resolve() for start in starts if start]


def study(where: Workspace, name: str) -> Study:
    """Gather the study that checkpoint ``name`` (dense, or any variant of it) belongs to.

    Raises `CheckpointError` where a local checkpoint cannot be read.
    """
    records = [r for r in where.runs() if r.state == "done"]
    root = _root_of(variants.tree(records), name)
    found = _variants(root)
    finder = _Finder(found)
    benchmarks, others = _benchmarks(records, finder)
    everything = (*found, *others)
    finder = _Finder(everything)
    quality, tasks = _measured(records, finder, found[0])
    belong = {v.record.id for v in found if v.record} | {b.id for b in benchmarks}
    belong |= {q.run for q in quality} | {t.run for t in tasks}
    return Study(
        everything,
        tuple(quality),
        tuple(tasks),
        tuple(benchmarks),
        tuple(r for r in records if r.id in belong),
    )


# --------------------------------------------------------------------------------------- variants


def _root_of(roots: Sequence[variants.Variant], name: str) -> variants.Variant:
    """Return the tree that ``name`` is in, or a tree of its own."""
    local = checkpoint.local_folder(name)
    wanted = local.resolve() if local else None
    for root in roots:
        for _, node in root.walk():
            named = node.record is None and node.parent == name
            if named or (wanted and node.folder and node.folder.resolve() == wanted):
                return root
    return variants.dense(name)


def _variants(root: variants.Variant) -> list[Variant]:
    """Return the study's checkpoints, the dense one first."""
    info = _info(root.folder)
    total = info.parameters if info else None
    dense = Variant(root.parent, root.label, "dense", "", "dense", folder=root.folder)
    dense = _with(dense, parameters=total, ratio=0.0)
    found, parents = [dense], {id(root): dense}
    for _, node in root.walk():
        for child in node.children:
            parents[id(child)] = made = _made(child, parents[id(node)], total, root.blocks)
            found.append(made)
    head, *rest = found
    rest.sort(key=lambda v: v.record.started if v.record else 0.0)
    return _distinct([head, *rest])


def _with(variant: Variant, **changes: Any) -> Variant:
    return Variant(**{**variant.__dict__, **changes})


def _made(
    node: variants.Variant, parent: Variant, total: int | None, blocks: int | None
) -> Variant:
    """Return the variant that a run left behind; the dense one has ``total`` parameters."""
    record = node.record
    assert record is not None
    pruning = workspace.read_json(record.path / "pruning.json") or {}
    left = node.parameters or parent.parameters
    known = pruning.get("ratio")
    ratio = 1 - left / total if left and total else known if isinstance(known, float) else None
    base = Variant(
        record.id, record.name, parent.kind, parameters=left, ratio=ratio, parent=parent.id,
        folder=node.folder, record=record,
    )  # fmt: skip
    share = f" {ratio:.0%}" if ratio else ""
    if record.command == "retrain":
        kept = {name: getattr(parent, name) for name in ("method", "method_label", "dropped")}
        method = str(record.spec.get("method") or "")
        label = f"{parent.label} + {RETRAINED.get(method, method)}"
        made = _with(base, retrained=method, **kept)
    elif record.command == "width":
        method = str(pruning.get("method") or record.spec.get("method") or "width")
        label = f"{method_label(method)}{share}"
        made = _with(base, kind="width", method=method, method_label=method_label(method))
    else:
        plan, method = pruning.get("plan") or {}, str(pruning.get("criterion") or "")
        protected = bool(plan.get("protect_first") or plan.get("protect_last"))
        gone = _gone(pruning, blocks)
        named = method_label(method, protected) if method else "by hand"
        label = (named if method else f"without {', '.join(map(str, gone))}") + share
        made = _with(base, kind="depth", method=method, method_label=named, dropped=gone)
    return made if record.name != record.id else _with(made, label=label)


def _gone(pruning: dict[str, Any], blocks: int | None) -> tuple[int, ...]:
    """Return the blocks of the dense model, which has ``blocks``, that went; the last cut's last.

    Within the last cut they keep their removal order.
    """
    last = list(pruning.get("dropped_original") or pruning.get("dropped") or [])
    left = {*(pruning.get("original_blocks") or []), *last}
    earlier = [b for b in range(blocks or 0) if b not in left] if pruning.get("lineage") else []
    return (*earlier, *last)


def _distinct(found: list[Variant]) -> list[Variant]:
    """Give every variant a label of its own: the same ones are numbered from the second on."""
    seen: dict[str, int] = {}
    result = []
    for variant in found:
        count = seen[variant.label] = seen.get(variant.label, 0) + 1
        result.append(_with(variant, label=f"{variant.label} ({count})") if count > 1 else variant)
    return result


def _info(folder: Path | None) -> checkpoint.CheckpointInfo | None:
    """Return what a local checkpoint is, remembered until its files change."""
    if folder is None:
        return None
    files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors"))
    stamp = tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    return _inspected(folder, stamp)


@functools.lru_cache(maxsize=64)
def _inspected(folder: Path, _: object) -> checkpoint.CheckpointInfo:
    return checkpoint.inspect(folder)


def info_of(variant: Variant) -> checkpoint.CheckpointInfo | None:
    """Return shapes and sizes of a variant; None where its checkpoint is not here or not whole."""
    try:
        return _info(variant.folder)
    except (DepthcutError, OSError):
        return None


# ----------------------------------------------------------------------------------- measurements


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return a CSV file's rows with numbers, true and false as such and empty cells as None.

    Empty where the file is missing or no table.
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


def _cwd(record: RunRecord) -> str:
    return str((workspace.read_json(record.path / BOOKKEEPING / "spec.json") or {}).get("cwd", ""))


def _benchmarks(
    records: Iterable[RunRecord], finder: _Finder
) -> tuple[list[Benchmark], list[Variant]]:
    """Return the benchmark runs with a variant of the study in them, and what else they hold."""
    found: list[Benchmark] = []
    others: dict[str, Variant] = {}
    for record in (r for r in records if r.command == "benchmark"):
        summary = workspace.read_json(record.path / "summary.json") or {}
        cwd = _cwd(record)
        ids: dict[str, str] = {}
        beside: dict[str, Variant] = {}
        missing = []
        for entry in summary.get("variants") or []:
            name, path = str(entry.get("name")), str(entry.get("path") or "")
            variant = finder(path, cwd)
            gone = not any((p / "config.json").is_file() for p in _meanings(path, cwd))
            if gone:
                missing.append(name)
            elif variant:
                ids[name] = variant.id
            else:
                folder = next(p for p in _meanings(path, cwd) if (p / "config.json").is_file())
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


def _measured(
    records: Iterable[RunRecord], finder: _Finder, dense: Variant
) -> tuple[list[Quality], list[Task]]:
    """Return perplexities and task scores of the study's variants and plans."""
    quality: list[Quality] = []
    tasks: list[Task] = []
    readers = {"importance": _scored, "curve": _curve}
    for record in records:
        variant = finder(str(record.spec.get("checkpoint") or ""), _cwd(record))
        if variant is None:
            continue
        summary = workspace.read_json(record.path / "summary.json") or {}
        if record.command == "evaluate":
            quality += _evaluated(record, summary, variant)
            tasks += _tasks(record, variant)
        elif record.command == "retrain":
            quality += _retrained(record, summary, variant, dense)
        elif record.command in readers and variant.kind == "dense":
            quality += readers[record.command](record, summary, variant)
    return [q for q in quality if isinstance(q.ppl, (int, float)) and q.ppl > 0], tasks


def _on(record: RunRecord, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what a perplexity was measured on."""
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


def _rows_protocol(summary: dict[str, Any]) -> Protocol:
    detail = f"{summary.get('samples')} rows (seed {summary.get('seed')})"
    return Protocol(str(summary.get("calibration")), summary.get("length"), "rows", detail)


def _scored(record: RunRecord, summary: dict[str, Any], variant: Variant) -> list[Quality]:
    """Return the dense perplexity of an importance run."""
    if not summary.get("dense_ppl"):
        return []
    common = {"protocol": _rows_protocol(summary), **_on(record, summary)}
    return [
        Quality(ppl=summary["dense_ppl"], variant=variant.id, ratio=0.0,
                parameters=variant.parameters, **common)
    ]  # fmt: skip


def _curve(record: RunRecord, summary: dict[str, Any], variant: Variant) -> list[Quality]:
    """Return a curve run's plans; their zeroth point is the dense checkpoint."""
    common = {"protocol": _rows_protocol(summary), **_on(record, summary)}
    sizes = {(r.get("criterion"), r.get("count")): r for r in read_rows(record.path / "curve.csv")}
    protected = bool(summary.get("protected"))
    found = []
    for point in curve_points(record.path):
        row = sizes[point.criterion, point.count]
        if point.count == 0:
            continue
        found.append(
            Quality(
                ppl=point.ppl,
                criterion=point.criterion,
                protected=protected,
                drop=point.drop,
                parameters=row["params"],
                ratio=row["ratio"],
                **common,
            )
        )
    if summary.get("dense_ppl"):
        found.append(
            Quality(
                ppl=summary["dense_ppl"],
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


# -------------------------------------------------------------------------------------- tokenizer


def tokenizer_key(folder: Path) -> str:
    """Return what identifies a tokenizer's vocabulary; empty where there is none.

    The same vocabulary written by another version of transformers has the same key.
    """
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            stat = path.stat()
            return _vocabulary(path, stat.st_mtime_ns, stat.st_size)
    return ""


@functools.lru_cache(maxsize=128)
def _vocabulary(path: Path, _mtime: int, _size: int) -> str:
    data = path.read_bytes()
    try:
        table = json.loads(data)
        vocab = (table.get("model") or {}).get("vocab") or table
        data = json.dumps(vocab, sort_keys=True).encode()
    except (ValueError, AttributeError):
        pass  # a sentencepiece file: its bytes are the vocabulary
    return hashlib.sha256(data).hexdigest()[:16]


def tokenizer_conflict(chosen: Iterable[Variant]) -> str:
    """Return one sentence where variants have different tokenizers, else nothing.

    Perplexity is per token, so those of different tokenizers do not compare.
    """
    groups: dict[str, list[str]] = {}
    for variant in chosen:
        key = tokenizer_key(variant.folder) if variant.folder else ""
        if key:
            groups.setdefault(key, []).append(variant.label)
    if len(groups) < 2:
        return ""
    names = " and ".join(group[0] for group in list(groups.values())[:2])
    return (
        f"{names} have different tokenizers, so their perplexities do not compare. "
        "Leave one of them out, or compare latency, memory and task scores only."
    )
