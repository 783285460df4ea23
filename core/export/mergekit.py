"""A mergekit recipe that builds a depth-pruned variant from its dense checkpoint.

``merge_method: passthrough`` copies the blocks of each ``layer_range`` (from its first number up to
the last, exclusive) one after another; embedding, final norm and head come from the same model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.checkpoint import families, locate, quantized
from core.checkpoint.locate import Checkpoint
from core.checkpoint.tensors import TensorEntry, TensorIndex
from core.errors import CheckpointError
from core.prune.results import Pruning
from core.runs.progress import SILENT, Progress

_CHUNK = 8 << 20
_HINT = "Export it with --format gguf or hub instead."


def ranges(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Return blocks in ascending order as [first, end) ranges: 0, 1, 4 -> (0, 2), (4, 5)."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return found


def recorded(checkpoint: Checkpoint) -> Pruning:
    """Return what a variant's pruning.json records.

    Raises `CheckpointError` if passthrough slices cannot build it, with the reason; the weights are
    not compared here.
    """
    quantized.refuse(checkpoint.name, checkpoint.info.quantization)
    record = Pruning.read(checkpoint.folder)
    if record is None or not record.base_model:
        raise CheckpointError(
            f"{checkpoint.name} is not a pruned variant: it has no {Pruning.FILE}.",
            "A mergekit recipe needs the dense checkpoint and the blocks that were dropped.",
        )
    widths = [m for m in (record.method, *(cut.method for cut in record.lineage)) if m != "depth"]
    if widths:
        raise CheckpointError(
            f"{checkpoint.name} was pruned in width ({widths[0]}); passthrough slices can only "
            "leave out whole blocks.",
            _HINT,
        )
    lacking = (*record.without_attention, *record.without_mlp)
    if lacking:
        raise CheckpointError(
            f"{checkpoint.name} lacks the attention or the MLP of block {lacking[0]}; passthrough "
            "slices can only leave out whole blocks.",
            _HINT,
        )
    if len(record.original_blocks) != checkpoint.info.blocks:
        raise CheckpointError(
            f"{Pruning.FILE} lists {len(record.original_blocks)} blocks of the base model, but "
            f"{checkpoint.name} has {checkpoint.info.blocks}.",
            "Prune the dense checkpoint again.",
        )
    return record


def recipe(checkpoint: Checkpoint, progress: Progress = SILENT) -> str:
    """Return the YAML whose slices build exactly this variant.

    Every weight is compared with the dense checkpoint's. Raises `CheckpointError` if one differs
    (a retrained variant), or if the dense checkpoint cannot be read.
    """
    record = recorded(checkpoint)
    try:
        dense = locate.open(record.base_model, progress, need_tokenizer=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"The recipe needs the dense checkpoint {record.base_model}: {error.message}",
            error.hint,
        ) from error
    _compare(checkpoint, dense, record.original_blocks, progress)
    return text(record.base_model if dense.name != "demo" else str(dense.folder), record, dense)


def text(model: str, record: Pruning, dense: Checkpoint) -> str:
    """Return the recipe for ``model``, the dense checkpoint's name; strings are quoted as JSON."""
    slices = [
        f"  - sources:\n      - model: {json.dumps(model)}\n        layer_range: [{first}, {end}]\n"
        for first, end in ranges(record.original_blocks)
    ]
    kept, count = len(record.original_blocks), dense.info.blocks
    return (
        f"# {kept} of {count} blocks. Build it with: mergekit-yaml FILE.yaml OUT_FOLDER\n"
        f"slices:\n{''.join(slices)}merge_method: passthrough\ndtype: {dense.info.dtype}\n"
    )


def _compare(
    variant: Checkpoint, dense: Checkpoint, blocks: Sequence[int], progress: Progress
) -> None:
    """Raise `CheckpointError` unless every weight of ``variant`` is the dense checkpoint's."""
    ours, theirs = TensorIndex.read(variant.folder), TensorIndex.read(dense.folder)
    unused = set(variant.info.unused_tensors)
    entries = [e for name, e in ours.entries.items() if name not in unused]
    total = max(sum(e.end - e.start for e in entries) >> 20, 1)
    done = 0
    for entry in entries:
        block = families.block_of(entry.name)
        name = entry.name if block is None else families.renamed(entry.name, blocks[block])
        other = theirs.entries.get(name)
        if other is None or not _same(variant.folder, entry, dense.folder, other):
            raise CheckpointError(
                f"'{entry.name}' differs from the dense checkpoint's '{name}': the variant was "
                "retrained or changed after it was pruned, which passthrough slices cannot "
                "reproduce.",
                _HINT,
            )
        done += entry.end - entry.start
        progress.step(min(done >> 20, total), total, "MiB compared")


def _same(folder: Path, one: TensorEntry, dense: Path, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pieces = zip(_read(folder, one), _read(dense, other), strict=True)
    return all(a == b for a, b in pieces)


def _read(folder: Path, entry: TensorEntry) -> Iterator[bytes]:
    with (folder / entry.file).open("rb") as file:
        file.seek(entry.start)
        for at in range(entry.start, entry.end, _CHUNK):
            yield file.read(min(_CHUNK, entry.end - at))
