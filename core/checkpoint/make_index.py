"""Make the index of a folder's safetensors shards: ``python -m core.checkpoint.make_index FOLDER``.

transformers finds the tensors of a checkpoint with several files through
``model.safetensors.index.json``. Everything in it is also in the headers of the shards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from core.checkpoint.tensors import INDEX, SINGLE, read_shard
from core.errors import CheckpointError, DepthcutError, OutputError


def make_index(folder: Path) -> Path:
    """Write the index of ``model-*-of-*.safetensors`` in ``folder`` and return its path.

    Raises `CheckpointError` if a shard is missing or damaged, or if two hold the same tensor;
    `OutputError` if the folder has an index already or cannot be written.
    """
    target = folder / INDEX
    if target.exists() or (folder / SINGLE).exists():
        raise OutputError(f"{folder} needs no index: it has {SINGLE} or {INDEX} already.")
    files = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    wanted = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    if not files or files != wanted:
        raise CheckpointError(
            f"{folder} does not hold a complete set of shards ({len(files)} found).",
            "Download the missing files into this folder.",
        )
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        for tensor in read_shard(folder / file).tensors:
            if tensor.name in weight_map:
                raise CheckpointError(
                    f"'{tensor.name}' is in {weight_map[tensor.name]} and in {file}.",
                    "These shards are from different checkpoints; download them again.",
                )
            weight_map[tensor.name] = file
            size += tensor.end - tensor.start
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    try:
        target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"Cannot write {target}: {error.strerror}.", "Copy the folder to a writable place."
        ) from error
    return target


def main(arguments: list[str]) -> int:
    """Make the index of the one folder named; return the exit status."""
    if len(arguments) != 1:
        print("Usage: python -m core.checkpoint.make_index FOLDER", file=sys.stderr)
        return 2
    try:
        print(make_index(Path(arguments[0])))
    except DepthcutError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
