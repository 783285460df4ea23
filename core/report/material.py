"""What a report is made from: a study, its runs, and their commands and versions."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import outside
from core.benchmark.results import known_rates
from core.checkpoint import locate
from core.compare.scene import Scene
from core.compare.verdict import Verdict, verdict_of, whole_scene
from core.errors import InputError
from core.prune.results import Pruning
from core.prune.score_results import Importance
from core.runs.results import JsonResult
from core.runs.workspace import CHAINS, RunRecord, Workspace, read_run
from core.study import Study, store, study
from core.study.names import Names, names
from core.study.settings import Settings


@dataclass(frozen=True)
class Material:
    """A study with the runs that belong to it."""

    study: Study
    scene: Scene
    runs: tuple[RunRecord, ...]
    """Oldest first; recipes before their steps."""
    names: Names
    """What the workspace's runs and checkpoints are called."""
    settings: Settings
    """The study's: evaluation text, tasks and targets."""

    @functools.cached_property
    def verdict(self) -> Verdict:
        """The verdict on the study."""
        return verdict_of(self.study, self.settings, seen=self.scene)

    @property
    def scores(self) -> RunRecord | None:
        """The importance run to show: one with perplexities, the most metrics, then the newest."""
        found = [r for r in self.runs if r.command == "importance"]

        def worth(record: RunRecord) -> tuple[bool, int, float]:
            run = Importance.read(record.path) or Importance()
            return bool(run.dense_ppl), len(run.metrics), record.started

        return max(found, key=worth, default=None)

    @property
    def retrained(self) -> list[RunRecord]:
        """The retrainings, newest first."""
        return [r for r in reversed(self.runs) if r.command == "retrain"]


@dataclass(frozen=True, kw_only=True)
class Setting(JsonResult):
    """What any run's summary.json says about where and with what it was made."""

    device: str | None = None
    device_name: str | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    torch: str = ""
    """A benchmark's own version fields; other runs have ``versions``."""
    transformers: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def gather(name: str, where: Workspace | None = None) -> Material:
    """Return the material on ``name``: a checkpoint, or the folder of a run, recipe, workspace.

    Raises `InputError` if it is none of these, or a folder with more than one study.
    """
    where = where or Workspace()
    place, model = _meant(name, where)
    known = study(place, model)
    settings = store.of(known.dense.id, place).settings
    seen = whole_scene(known, settings, known_rates(place))
    return Material(known, seen, tuple(_runs(place, known)), names(place.runs()), settings)


def _meant(name: str, where: Workspace) -> tuple[Workspace, str]:
    """Return the workspace to read and the checkpoint that ``name`` means."""
    for path in (outside.path_of(name), where.root / name):
        record = read_run(path) if path.is_dir() else None
        if record and record.command in CHAINS:
            return Workspace(path), str(record.spec.get("checkpoint") or "demo")
        if record and record.command == "import" and _is_used(path, where):
            return where, name  # a dense checkpoint, wherever it lies
        if record:
            return _home(record, where), _checkpoint_of(record, path)
    if locate.local_folder(name) or locate.is_hub_id(name):
        return where, name
    folder = outside.path_of(name)
    if folder.is_dir() and Workspace(folder).runs():
        return Workspace(folder), _only_study(Workspace(folder))
    locate.open(name, need="config", quantized=True)  # raises what is wrong with it
    return where, name


def _home(record: RunRecord, where: Workspace) -> Workspace:
    """Return the workspace that a run is in: ``where``, else the folder above the run."""
    above = record.path.resolve().parent
    inside = where.root.resolve() in (above, above.parent if record.parent else above)
    return where if inside else Workspace(record.path.parent)


def _is_used(folder: Path, where: Workspace) -> bool:
    """Whether a run of the workspace works on the checkpoint in ``folder``."""
    names = {str(r.spec.get("checkpoint") or "") for r in where.runs()}
    found = (locate.local_folder(name) for name in names if name)
    return any(one.resolve() == folder.resolve() for one in found if one)


def _checkpoint_of(record: RunRecord, path: Path) -> str:
    local = locate.local_folder(str(path))
    if local:
        return str(path)
    several = record.spec.get("checkpoints")
    first = several[0] if isinstance(several, list) and several else ""
    name = str(record.spec.get("checkpoint") or first)
    if not name:
        raise InputError(
            f"{path} is not a run on a checkpoint.", "Give a checkpoint or one of its runs."
        )
    return name


def _only_study(where: Workspace) -> str:
    names = {str(n) for r in where.runs() if (n := r.spec.get("checkpoint"))}
    roots = {study(where, n).dense.id for n in names}
    if len(roots) == 1:
        return roots.pop()
    raise InputError(
        f"{where.root} contains {len(roots)} studies: {', '.join(sorted(roots)[:5]) or 'none'}.",
        f"Give one of their checkpoints, with --workspace {where.root}.",
    )


def _runs(where: Workspace, known: Study) -> list[RunRecord]:
    """Return the finished runs of the study, with the recipes they are steps of, oldest first."""
    finder = known.finder()
    ids = {r.id for r in known.runs}
    records = where.runs()
    own = read_run(where.root)
    found = [
        r
        for r in records
        if r.state == "done" and (r.id in ids or finder(str(r.spec.get("checkpoint") or ""), r.cwd))
    ]
    parents = {r.parent for r in found if r.parent}
    chains = [r for r in (*records, *([own] if own else [])) if r.command in CHAINS]
    found += [r for r in chains if r.path.name in parents and r not in found]
    return sorted(found, key=lambda r: (r.started, r.id))


def commands(runs: Iterable[RunRecord]) -> list[str]:
    """Return the command of every run in order; the blocks of a plan file follow in a comment."""
    lines = []
    for record in runs:
        if record.argv:
            lines.append(f"{shlex.join(record.argv)}{_dropped(record)}")
    return lines


def _dropped(record: RunRecord) -> str:
    if record.command != "prune" or not record.spec.get("plan"):
        return ""
    cut = Pruning.read(record.path) or Pruning()
    lists = {"drops": cut.dropped, "attention of": cut.attention, "MLP of": cut.mlp}
    found = [f"{name} {','.join(map(str, blocks))}" for name, blocks in lists.items() if blocks]
    return f"   # the plan {', '.join(found)}"


def versions(runs: Iterable[RunRecord]) -> list[dict[str, Any]]:
    """Return one row per setup of the runs: device, precision, versions."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in runs:
        found = Setting.read(record.path) or Setting()
        own = {"torch": found.torch, "transformers": found.transformers}
        used = found.versions | {name: value for name, value in own.items() if value}
        row = {
            "device": found.device,
            "device name": found.device_name,
            "precision": found.compute_dtype or found.dtype,
            **{n: used.get(n) for n in ("depthcut", "torch", "transformers", "peft", "lm_eval")},
        }
        if used:
            kept = rows.setdefault(tuple(row.values()), {**row, "runs of": ""})
            names = {*filter(None, str(kept["runs of"]).split(", ")), record.command}
            kept["runs of"] = ", ".join(sorted(names))
    return list(rows.values())
