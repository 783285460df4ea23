"""Write a checkpoint so that it only looks like one once it is complete.

Everything goes into a ``.partial`` folder on the target's own disk first; config.json, which
identifies a checkpoint, is written last. Depth and width pruning both use this.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from core import words
from core.checkpoint import headers, own_code
from core.checkpoint.imported import Imported
from core.errors import OutputError
from core.prune.results import Pruning
from core.runs import processes, workspace
from core.runs.progress import SILENT, Progress

_SPARE_BYTES = 16 << 20
# Files copied with the weights: tokenizer, generation defaults, origin, licence; no Python code.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    Imported.FILE,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# All files of a checkpoint written here; replaced as a whole when it is overwritten.
_OURS = (
    *COMPANIONS,
    "*.py",
    "*.safetensors",
    headers.INDEX,
    Pruning.FILE,
    "quantization.json",
    "README.md",
    "config.json",
)


def check_output(folder: Path, target: Path, overwrite: bool) -> None:
    """Raise `OutputError` if the variant of ``folder`` cannot be written to ``target``."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file.", "Give a folder with --out.")
    if target.exists() and target.resolve() == folder.resolve():
        raise OutputError(f"{target} is the checkpoint itself.", "Give another folder with --out.")
    if target.is_dir() and not overwrite:
        ours = (workspace.BOOKKEEPING, _inner(target).name)
        if any(p.name not in ours for p in target.iterdir()):
            raise OutputError(
                f"{target} exists and is not empty.", "Give another --out, or add --overwrite."
            )


def copy_companions(folder: Path, partial: Path, progress: Progress = SILENT) -> None:
    """Copy tokenizer, generation config and licence; files that are already there are kept.

    Code of the source is left out, and so are the config fields that name it; the log says so.
    """
    found = {p for pattern in COMPANIONS for p in folder.glob(pattern) if p.suffix != ".py"}
    for path in sorted(found):
        if path.is_file() and not (partial / path.name).exists():
            own_code.copy_config(path, partial / path.name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir() and not (partial / templates.name).exists():
        shutil.copytree(templates, partial / templates.name)
    left_out = own_code.foreign(folder)
    if left_out:
        progress.log(
            f"Left out, as a variant carries no code of others: {', '.join(left_out)}. "
            "Stock transformers loads it without."
        )


def write(path: Path, text: str) -> None:
    """Write a text file."""
    path.write_text(text, encoding="utf-8")


def write_index(partial: Path, file_of: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of sharded weights: tensor name -> file."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    write(partial / headers.INDEX, json.dumps(index, indent=2) + "\n")


def check_space(partial: Path, size: int, what: str = "The checkpoint needs") -> None:
    """Raise `OutputError` if the disk of ``partial`` has no room for ``size`` bytes."""
    needed = size + _SPARE_BYTES
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise OutputError(
            f"{what} {words.size(needed)}, but {partial.parent} has only {words.size(free)} free.",
            "Free up disk space, or give an --out on another disk.",
        )


# ------------------------------------------------------------------------- the unfinished folder


def _inner(target: Path) -> Path:
    return target / "unfinished.partial"


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder on the target's own disk; it is deleted on exit.

    It is inside the target if that exists (a run directory), otherwise beside it. A folder left by
    an ended process is removed; one that a live process is using is an error.
    """
    partial = _inner(target) if target.is_dir() else target.with_name(target.name + ".partial")
    owner = partial / ".owner.json"
    try:
        if partial.exists():
            left = workspace.read_json(owner) or {}
            if left.get("pid") != os.getpid() and processes.is_alive(
                left.get("pid"), left.get("pid_started")
            ):
                raise OutputError(
                    f"Another process is writing {target}.", "Wait for it, or give another --out."
                )
        workspace.remove(partial)
        partial.mkdir(parents=True)
        write(owner, json.dumps(processes.identity()))
        yield partial
    except OSError as error:
        raise workspace.cannot_write(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, target: Path) -> None:
    """Move the finished folder into place; config.json, which identifies it, comes last."""
    (partial / ".owner.json").unlink()
    if not target.exists():
        partial.rename(target)
        return
    (target / "config.json").unlink(missing_ok=True)
    for stale in {p for pattern in _OURS for p in target.glob(pattern) if p.is_file()}:
        stale.unlink()
    for path in sorted(partial.iterdir(), key=lambda p: p.name == "config.json"):
        if path.is_dir() and (target / path.name).is_dir():
            workspace.remove(target / path.name)
        path.rename(target / path.name)
