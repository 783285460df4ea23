"""Weights that are in a folder but not where transformers looks, each with its way out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from core import outside
from core.checkpoint.tensors import INDEX, SINGLE
from core.errors import CheckpointError

ADAPTER = "adapter_config.json"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


def check(folder: Path) -> None:
    """Raise `CheckpointError` if the weights beside config.json cannot be loaded as they are."""
    if (folder / ADAPTER).is_file():
        raise adapter_error(folder)
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if names:
        raise _unindexed(folder, names)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        raise gguf_error(str(folder), files[0])


def adapter_error(folder: Path) -> CheckpointError:
    """Return what to do about a folder with an adapter."""
    base = adapter_base(folder / ADAPTER)
    beside = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    if beside:
        return CheckpointError(
            f"{folder} contains whole weights and an adapter for {base} ({ADAPTER}), which "
            "transformers loads on top of the weights.",
            "Merge the adapter into the weights, or move its files to another folder.",
        )
    return CheckpointError(
        f"{folder} contains an adapter for {base}, not a whole checkpoint.",
        "Merge it onto its base and give the result: PeftModel.from_pretrained("
        f'AutoModelForCausalLM.from_pretrained("{base}"), "{folder}").merge_and_unload()'
        '.save_pretrained("merged"), and copy the tokenizer there.',
    )


def adapter_base(path: Path) -> str:
    """Return the name of the checkpoint that an adapter belongs to, as its file says."""
    try:
        value = outside.read_json(path)
    except (OSError, outside.Malformed):
        value = None
    name = value.get("base_model_name_or_path") if isinstance(value, dict) else None
    return outside.brief(name, 200) if isinstance(name, str) and name else "an unnamed base"


def gguf_error(name: str, file: str, *, on_hub: bool = False) -> CheckpointError:
    """Return what to do about weights that are stored as GGUF only, in a folder or on the Hub."""
    return CheckpointError(
        f"The weights in {name} are available only as GGUF ({file}).",
        f"Download the file and import it once: {import_command(file)}"
        if on_hub
        else f"Import it once, and give the folder it is written to: "
        f"{import_command(str(Path(name) / file))}",
    )


def gguf_file_error(name: str) -> CheckpointError:
    """Return what to do about a GGUF file that was given as a checkpoint."""
    return CheckpointError(
        f"{outside.brief(name, 300)} is a GGUF file, not a checkpoint.",
        f"Import it once, and give the folder it is written to: {import_command(name)}",
    )


def import_command(file: str) -> str:
    """Return the command that makes a checkpoint of a GGUF file."""
    folder = Path(file).stem
    return shlex.join(["python", "-m", "core", "import", file, "--out", folder])


def _unindexed(folder: Path, names: Sequence[str]) -> CheckpointError:
    parts = [match for name in names if (match := _PART.search(name))]
    if not parts:
        return CheckpointError(
            f"{folder} has {names[0]}, but transformers reads only {SINGLE}, or the files that "
            f"{INDEX} lists.",
            f"If it holds the whole model under Hugging Face's names, rename it to {SINGLE}.",
        )
    total = int(parts[0][2])
    held = f"{len(parts)} of {total} safetensors shards"
    if len(parts) < total:
        return CheckpointError(
            f"{folder} has only {held} and no {INDEX}, which lists them.",
            "Download the missing files into this folder.",
        )
    return CheckpointError(
        f"{folder} has {held} ({names[0]}, ...) but no {INDEX}, which lists what each holds.",
        "Download that file from where the shards are from, or make it: "
        f"python -m core.checkpoint.make_index {folder}",
    )
