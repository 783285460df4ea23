"""What a checkpoint's name means: a folder, a run, a Hub id, smollm2, or the demo. No torch here.

`open` finds the checkpoint and reads its config and headers. What was read is cached for the whole
process and read again when a file changes, so a command, a page and everything below them can each
open the same checkpoint by its name.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from core import outside
from core.checkpoint import gguf, headers, hub, other_formats
from core.checkpoint.quantized import refuse
from core.errors import CheckpointError
from core.runs.progress import SILENT, Progress
from core.runs.workspace import BOOKKEEPING, default_root, read_json

Need = Literal["weights", "headers", "config"]
"""Which parts of a checkpoint must exist; see `open`."""
SMOLLM2 = "smollm2"
"""The real model that ``import smollm2`` fetches; its run in the workspace has this id."""
KEPT = 2048
"""Checkpoints in the cache; one takes about 50 KB."""
HUB_FRESH_S = 3600.0
"""Seconds after which the headers of a checkpoint on the Hub are requested again."""
_STATE = (".json", ".safetensors", ".model", ".bin", ".pth", ".gguf")
"""Suffixes of all files that determine what a checkpoint is and whether it can be read."""
_HUB_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}(@[\w./-]{1,200})?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, as described by its config and the headers of its weights."""

    name: str
    """The name to record: a Hub id and demo as given, a folder as found."""
    folder: Path
    """Where its files are. If only headers on the Hub were read, the Hub id as a path."""
    info: headers.CheckpointInfo
    config: Mapping[str, Any] = field(repr=False)
    """Content of config.json; shared, so it is never modified in place."""
    state: headers.FileState = field(default=(), repr=False)
    """Changes whenever the checkpoint's files do; empty if they are on the Hub."""


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as a Hub id (owner/name, optionally @revision), not a folder."""
    return bool(_HUB_ID.fullmatch(name)) and not outside.exists(outside.path_of(name))


def local_folder(name: str) -> Path | None:
    """Return the checkpoint folder that ``name`` means on this machine, or None if it has none.

    A folder, a run's folder (by path, or by id in the workspace), or ``demo``.
    """
    if name == "demo" and not outside.is_folder("demo"):
        from core.demo import CHECKPOINT

        return CHECKPOINT if (CHECKPOINT / "config.json").is_file() else None
    given = outside.path_of(name)
    for folder in (given, default_root() / name):
        for inner in (folder, folder / "merged"):
            if outside.is_file(inner / "config.json"):
                return inner
    return None


def open(
    name: str | Path,
    progress: Progress = SILENT,
    *,
    need: Need = "weights",
    need_tokenizer: bool = True,
    quantized: bool = False,
) -> Checkpoint:
    """Return the checkpoint that ``name`` means, checked by its headers.

    ``name``: a folder, a run's folder that holds a checkpoint (itself or in ``merged/``), a run's
    id, a Hub id, or ``demo``. ``need`` names the parts that must exist, and so what is downloaded
    from the Hub into its cache:

    - ``weights``: everything.
    - ``headers``: a folder with only config.json is enough. Of a checkpoint on the Hub only the
      headers of the weights are read; no weights are downloaded.
    - ``config``: like ``headers``, but on the Hub not even the headers are read: shapes are
      computed from config.json.

    ``need_tokenizer`` also requires a tokenizer if there are local weights. Without ``quantized``,
    quantized weights are an error: their blocks cannot be scored, cut or trained. Headers are read
    once, and again when a file changes (on the Hub: after `HUB_FRESH_S`). Safe to call from any
    thread.

    What a user should know of weights that are about to be used is logged to ``progress``.

    Raises `CheckpointError`, which names the problem and what to do.
    """
    name = str(name)
    folder = local_folder(name)
    if folder is None:
        if not is_hub_id(name):
            raise _not_there(name)
        if need == "headers":
            found = _on_hub(name, progress)
            if not quantized:
                refuse(name, found.info.quantization)
            return found
        folder = hub.fetch(name, progress, config_only=need == "config")
    found = at(folder, need_weights=need == "weights")
    if not quantized:
        refuse(recorded_name(name, folder), found.info.quantization)
    headers.check_tokenizer(found.info, needed=need_tokenizer and found.info.has_weights)
    for warning in found.info.warnings if need == "weights" else ():
        progress.log(f"Warning: {warning}")
    return replace(found, name=recorded_name(name, folder))


def at(folder: Path, *, need_weights: bool = False) -> Checkpoint:
    """Return the checkpoint in exactly this folder, from the same cache; needs no tokenizer.

    Raises `CheckpointError` if it is damaged, of an unsupported kind, or (with ``need_weights``)
    without weights; `OSError` if there is no such folder.
    """
    found = _read(folder, headers.file_state(folder, _STATE))
    if need_weights and not found.info.has_weights:
        headers.TensorIndex.read(folder)  # raises an error that names what is missing
    return found


@functools.lru_cache(maxsize=KEPT)
def _read(folder: Path, state: headers.FileState) -> Checkpoint:
    info = headers.inspect(folder)
    config = headers.read_config(folder / "config.json")
    return Checkpoint(str(folder), folder, info, MappingProxyType(config), state)


_hub_kept: dict[str, tuple[float, Checkpoint]] = {}


def _on_hub(name: str, progress: Progress) -> Checkpoint:
    """Return a checkpoint on the Hub without its weights; cached for `HUB_FRESH_S`."""
    read_at, found = _hub_kept.get(name, (0.0, None))
    if found is None or time.monotonic() - read_at > HUB_FRESH_S:
        folder, info = hub.inspect(name, progress)
        config = headers.read_config(folder / "config.json")
        found = Checkpoint(name, Path(name), info, MappingProxyType(config))
        _hub_kept[name] = (time.monotonic(), found)
    return found


def recorded_name(given: str, folder: Path) -> str:
    """Return the name to record: a Hub id and demo as given, a folder as found."""
    return given if given == "demo" or is_hub_id(given) else str(folder)


def plain_name(recorded: str) -> str:
    """Return a recorded name as a person would write it: a folder without the path to it."""
    return recorded if is_hub_id(recorded) else last_part(recorded)


def last_part(name: str) -> str:
    """Return a checkpoint's name without folders, owner and revision."""
    folder = Path(name.split("@")[0])
    if folder.name == "merged" and folder.parent.name:  # where `retrain --merge` writes
        folder = folder.parent
    return folder.name or folder.resolve().name or "model"


def _not_there(name: str) -> CheckpointError:
    folder = outside.path_of(name)
    if name == "demo":
        return CheckpointError(
            "The bundled demo checkpoint is missing.",
            "Train it with: python -m core.demo.train.",
        )
    if gguf.is_gguf(folder):
        return other_formats.gguf_file_error(name)
    if name == SMOLLM2 and not outside.exists(folder):
        return CheckpointError(
            f"{SMOLLM2} has not been imported into {default_root()} yet.",
            f"Import it once (93 MB): python -m core import {SMOLLM2} --out "
            f"{default_root() / SMOLLM2}, or make smollm2.",
        )
    if outside.is_file(folder):
        return CheckpointError(
            f"{name} is a file, not a checkpoint folder.",
            "Give the folder that contains config.json and the safetensors files.",
        )
    if not outside.is_folder(folder):
        return CheckpointError(
            f"There is no folder {outside.brief(name, 200)}, and it is not a Hub id (owner/name).",
            "Give a checkpoint folder, a run's folder, a Hub id, smollm2, or demo.",
        )
    if (folder / other_formats.ADAPTER).is_file():
        return other_formats.adapter_error(folder)
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return other_formats.gguf_error(name, ggufs[0])
    if (folder / "adapter").is_dir():
        return CheckpointError(
            f"{name} contains an adapter, not a whole checkpoint.",
            "Give its merged/ folder; retrain --merge writes one.",
        )
    if (folder / BOOKKEEPING).is_dir():
        status = read_json(folder / BOOKKEEPING / "status.json") or {}
        return CheckpointError(
            f"The run {name} has no checkpoint (its state: {status.get('state', 'unknown')}).",
            "Give a finished prune, width or merged retrain run.",
        )
    return CheckpointError(
        f"{name} has no config.json, so it is not a checkpoint.",
        "Give a Hugging Face checkpoint folder.",
    )
