"""What a run reads, and its paths at a place: the workspace there mirrors the one here.

A run of this workspace keeps its id below the folder there; any other file or folder goes to
``inputs/NAME-HASH``. So a run that was made there need not be sent again, and ids of runs mean the
same on both sides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core import commands, outside
from core.prune.results import Pruning
from core.runs.workspace import BOOKKEEPING, read_run

READS = (
    *("source", "checkpoint", "checkpoints", "dense", "match", "scores", "plan", "neurons"),
    *("calibration", "data", "holdout_data", "also", "perplexity", "prompts", "task_dir"),
)
"""Options that name something to read."""
OTHERS = (
    *("mlp_width", "criterion", "criteria", "tasks", "system_instruction", "layers", "targets"),
    *("repo", "attention_layers", "mlp_layers", "grid"),
)
"""Options whose text never names something to read; values of ``grid`` may (`stage`)."""


@dataclasses.dataclass(frozen=True)
class Input:
    """A file or folder that is needed there."""

    here: Path
    there: str
    """Absolute path there."""
    run: str = ""
    """Path there of the run that it is or belongs to, if it is one of this workspace."""


@dataclasses.dataclass(frozen=True)
class Staged:
    """A run's options as they are there, and what they need."""

    spec: dict[str, Any]
    inputs: tuple[Input, ...]

    def paths(self) -> dict[str, str]:
        """Return path there -> path here, longest first, to translate what results record."""
        found = {one.there: str(one.here) for one in self.inputs}
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def stage(
    command: str, spec: Mapping[str, Any], out: str, root: str, workspace: Path, cwd: Path
) -> Staged:
    """Return ``spec`` for a place whose folder is ``root``, with ``out`` as its run directory."""
    values = dict(spec) | {"out": out}
    names = {f.name for f in dataclasses.fields(commands.get(command).spec_class)}
    if "dense" in names and not values.get("dense"):
        values["dense"] = _source_of(values.get("checkpoint"), workspace, cwd)
    found: dict[str, Input] = {}

    def moved(text: str) -> str:
        for path, rest in _parts(text, workspace, cwd):
            one = _input(path, root, workspace)
            found[one.there] = one
            return one.there + rest
        return ",".join(map(moved, text.split(","))) if "," in text else text

    for name in READS:
        value = values.get(name)
        if isinstance(value, str):
            values[name] = moved(value)
        elif isinstance(value, list | tuple):
            values[name] = [moved(v) if isinstance(v, str) else v for v in value]
    if values.get("grid"):  # option=value,value of a retraining
        pairs = [text.partition("=") for text in values["grid"]]
        values["grid"] = [
            f"{name}={moved(given)}"
            if name.strip().replace("-", "_") in READS
            else name + mark + given
            for name, mark, given in pairs
        ]
    return Staged(values, tuple(found.values()))


def _parts(text: str, workspace: Path, cwd: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file or folder here that a text names, and what follows it, if it names one."""
    if not text or text in ("demo", "english", "auto", "none") or "\0" in text:
        return
    name, mark, field = text.partition("::")
    for start in (cwd, workspace):
        path = start / outside.path_of(name)
        if outside.exists(path):
            yield Path(os.path.abspath(path)), mark + field
            return


def _input(path: Path, root: str, workspace: Path) -> Input:
    base = Path(os.path.abspath(workspace))
    if path.is_relative_to(base) and path != base:
        inner = path.relative_to(base)
        for folder in (path, *path.parents):
            if folder == base:
                break
            if (folder / BOOKKEEPING / "spec.json").is_file() and read_run(folder):
                run = f"{root}/{folder.relative_to(base).as_posix()}"
                return Input(path, f"{root}/{inner.as_posix()}", run)
    key = hashlib.sha256(str(path).encode()).hexdigest()[:10]
    plain = re.sub(r"[^\w.-]+", "-", path.name).strip("-.") or "input"
    return Input(path, f"{root}/inputs/{key}/{plain}")


def _source_of(name: object, workspace: Path, cwd: Path) -> str | None:
    """Return the dense checkpoint that a pruned one here records, if it is on this machine."""
    if not isinstance(name, str):
        return None
    for path, _ in _parts(name, workspace, cwd):
        for folder in (path, path / "merged"):
            record = Pruning.read(folder)
            source = (record.base_model or record.source) if record else ""
            if source:
                return source
    return None
