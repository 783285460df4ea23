"""Which checkpoint folder a name means: a folder, a run, a Hub id, or the demo. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from core.checkpoint import headers, hub
from core.errors import CheckpointError
from core.runs.progress import SILENT, Progress
from core.runs.workspace import BOOKKEEPING, default_root, read_json

_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as a Hub id (owner/name, optionally @revision) and is no folder."""
    return bool(_HUB_ID.match(name)) and not Path(name).expanduser().exists()


def local_folder(name: str) -> Path | None:
    """Return the checkpoint folder that ``name`` means on this machine, or None if it has none.

    A folder, a run's folder (by path, or by id in the workspace), or ``demo``.
    """
    if name == "demo" and not Path("demo").is_dir():
        from core.demo import CHECKPOINT

        return CHECKPOINT if (CHECKPOINT / "config.json").is_file() else None
    given = Path(name).expanduser()
    for folder in (given, default_root() / name):
        for inner in (folder, folder / "merged"):
            if (inner / "config.json").is_file():
                return inner
    return None


def resolve(
    name: str | Path,
    progress: Progress = SILENT,
    *,
    allow_config_only: bool = False,
    need_tokenizer: bool = True,
) -> Path:
    """Return the folder of the checkpoint that ``name`` means, checked by its headers.

    ``name``: a folder, a run's folder that holds a checkpoint (itself or in ``merged/``), a run's
    id, a Hub id (downloaded into the Hub's cache), or ``demo``. With ``allow_config_only`` a
    folder with only config.json will do, and only that much is downloaded.

    Raises `CheckpointError` with what is wrong and what to do.
    """
    name = str(name)
    folder = local_folder(name)
    if folder is None:
        if not is_hub_id(name):
            raise _not_there(name)
        folder = hub.fetch(name, progress, config_only=allow_config_only)
    config_only = allow_config_only and not headers.has_weights(folder)
    headers.check(
        folder, config_only=config_only, need_tokenizer=need_tokenizer and not config_only
    )
    return folder


def inspect(
    name: str, progress: Progress = SILENT, *, need_tokenizer: bool = True
) -> headers.CheckpointInfo:
    """Return what the checkpoint that ``name`` means is; of one on the Hub only headers are read.

    Raises as `resolve`.
    """
    if local_folder(name) is None and is_hub_id(name):
        return hub.inspect(name, progress)
    folder = resolve(name, progress, allow_config_only=True, need_tokenizer=need_tokenizer)
    return headers.inspect(folder)


def recorded_name(given: str, folder: Path) -> str:
    """Return the name to record: a Hub id and demo as given, a folder as found."""
    return given if given == "demo" or is_hub_id(given) else str(folder)


def _not_there(name: str) -> CheckpointError:
    folder = Path(name).expanduser()
    if name == "demo":
        return CheckpointError(
            "The bundled demo checkpoint is not there.",
            "Train it with: python -m core.demo.train.",
        )
    if folder.is_file():
        return CheckpointError(
            f"{name} is a file, not a checkpoint folder.",
            "Give the folder that holds config.json and the safetensors files.",
        )
    if not folder.is_dir():
        return CheckpointError(
            f"There is no folder {name}, and it is not a Hub id (owner/name).",
            "Give a checkpoint folder, a run's folder, a Hub id, or demo.",
        )
    if (folder / "adapter").is_dir() or (folder / "adapter_config.json").is_file():
        return CheckpointError(
            f"{name} holds an adapter, not a whole checkpoint.",
            "Give its merged/ folder: retrain with --merge writes one.",
        )
    if (folder / BOOKKEEPING).is_dir():
        status = read_json(folder / BOOKKEEPING / "status.json") or {}
        return CheckpointError(
            f"The run {name} holds no checkpoint (its state: {status.get('state', 'unknown')}).",
            "Give a finished prune, width or merged retrain run.",
        )
    return CheckpointError(
        f"{name} has no config.json, so it is not a checkpoint.",
        "Give a Hugging Face checkpoint folder.",
    )
