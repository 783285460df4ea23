"""Write a checkpoint without some of its blocks, or parts of them, by copying byte ranges.

No tensor is loaded: the kept tensors are copied from file to file in byte order, under new block
numbers, so memory use does not depend on the model's size. The result is only recognizable as a
checkpoint once it is complete: everything is written into a ``.partial`` folder first, and
config.json is written last.
"""

from __future__ import annotations

import array
import dataclasses
import errno
import functools
import itertools
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.checkpoint import config_rules, families, headers, locate, neurons, own_code
from core.checkpoint.drop import Removal, check_removal
from core.checkpoint.headers import CheckpointInfo, TensorEntry, TensorIndex
from core.errors import CheckpointError
from core.prune import model_card, staging
from core.prune.plan import parameters_after
from core.prune.results import Cut, Healing, Pruning
from core.runs.progress import SILENT, Progress

COPYING_BYTES = 32 << 20
"""What a process takes that copies bytes: 27 MiB were measured for a checkpoint of 1.3 GiB."""
_CHUNK = 8 << 20
_PIECE = 256 << 10
_KERNEL_CHUNK = 64 << 20

Replaced = Mapping[str, Callable[[], bytes]]
"""Tensors whose bytes are not copied, by their names in the source; called when written."""


@dataclass(frozen=True)
class _Part:
    """One file to write: its name, and its tensors with their new names."""

    file: str
    metadata: dict[str, str]
    tensors: tuple[tuple[str, TensorEntry], ...]

    @property
    def size(self) -> int:
        return sum(entry.end - entry.start for _, entry in self.tensors)


def prune(
    source: str | Path,
    removal: Removal | Sequence[int],
    out: str | Path,
    *,
    criterion: str | None = None,
    plan: dict[str, Any] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
    healing: Healing | None = None,
    replaced: Replaced | None = None,
) -> Pruning:
    """Write the checkpoint in folder ``source`` without ``removal`` into ``out``.

    ``removal`` are blocks, in removal order, and perhaps parts of others: these need Depthcut's
    modelling code, which is then written too. ``criterion`` and ``plan`` (a printed plan) are
    recorded; ``name`` is the user's name for the source (default: its path). ``replaced`` gives the
    bytes of tensors that were healed, in the source's format and shape, and ``healing`` says how.
    Returns the content of pruning.json.

    Raises `PlanError` (what cannot be dropped), `CheckpointError` (a damaged source) and
    `OutputError` (an output that exists or cannot be written, too little space). On an error, as
    on cancellation, no partial output is left behind.
    """
    folder, target = Path(source), Path(out)
    checkpoint = locate.at(folder, need_weights=True)
    info = checkpoint.info
    asked = removal if isinstance(removal, Removal) else Removal(tuple(removal))
    chosen = check_removal(asked, info.block_shapes)
    staging.check_output(folder, target, overwrite)
    config = own_code.without_parts(checkpoint.config, info.block_shapes, chosen)
    config = config_rules.for_variant(
        own_code.with_own_code(families.without_blocks(config, chosen.drop)), tied=info.tied
    )
    record = make_record(
        folder, info, chosen, criterion=criterion, plan=plan, name=name, healing=healing
    )
    width = [shape["intermediate"] for shape in info.block_shapes]
    kept = neurons.kept(chosen, width, info.key)
    narrow = _Narrow(folder, kept, replaced or {})
    parts = list(_parts(TensorIndex.read(folder), chosen, info.unused_tensors, narrow))
    with staging.partial_folder(target) as partial:
        staging.check_space(partial, sum(part.size for part in parts))
        _write_weights(folder, partial, parts, narrow.replaced, progress)
        staging.copy_companions(folder, partial, progress)
        custom = own_code.copy(config, partial)
        card = model_card.depth_card(record, config, custom_code=custom, imported=info.imported)
        staging.write(partial / "README.md", card)
        staging.write(partial / Pruning.FILE, record.to_text())
        staging.write(partial / "config.json", json.dumps(config, indent=2) + "\n")
        headers.inspect(partial, allow_config_only=False)
        progress.check_cancel()
        staging.publish(partial, target)
    return record


_ROWS = ("mlp.gate_proj", "mlp.up_proj")
_COLUMNS = ("mlp.down_proj",)
_ITEM = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Bytes of an element -> code of an array that holds it unchanged."""


class _Narrow:
    """Cuts the tensors of MLPs that keep some neurons: rows of gate and up, columns of down."""

    def __init__(
        self, folder: Path, kept: Mapping[int, tuple[int, ...]], replaced: Replaced
    ) -> None:
        self.folder, self.kept = folder, kept
        self.replaced: dict[str, Callable[[], bytes]] = dict(replaced)

    def entry(self, entry: TensorEntry) -> TensorEntry:
        """Return the entry as it will be written; its bytes are then made by `replaced`."""
        block = families.block_of(entry.name)
        if block is None or block not in self.kept:
            return entry
        module, _, kind = entry.name.removeprefix(f"model.layers.{block}.").rpartition(".")
        rows = module in _ROWS
        if not rows and not (module in _COLUMNS and kind == "weight"):
            return entry
        count = len(self.kept[block])
        shape = (count, *entry.shape[1:]) if rows else (*entry.shape[:-1], count)
        size = (entry.end - entry.start) // entry.shape[0 if rows else -1] * count
        cut = functools.partial(self._cut, entry, self.kept[block], rows)
        self.replaced.setdefault(entry.name, cut)  # unless it was healed
        return dataclasses.replace(entry, shape=shape, end=entry.start + size)

    def _cut(self, entry: TensorEntry, kept: tuple[int, ...], rows: bool) -> bytes:
        with (self.folder / entry.file).open("rb") as read:
            read.seek(entry.start)
            data = read.read(entry.end - entry.start)
        if rows:
            size = len(data) // entry.shape[0]
            return b"".join(data[n * size : (n + 1) * size] for n in kept)
        code = _ITEM[len(data) // math.prod(entry.shape)]
        values: Sequence[int] = memoryview(data).cast(code)  # type: ignore[call-overload]
        width, several = entry.shape[-1], operator.itemgetter(*kept)

        def pick(row: Sequence[int]) -> Sequence[int]:
            return several(row) if len(kept) > 1 else (row[kept[0]],)

        return b"".join(
            array.array(code, pick(values[at : at + width])).tobytes()
            for at in range(0, len(values), width)
        )


def make_record(
    folder: Path,
    info: CheckpointInfo,
    removal: Removal,
    *,
    criterion: str | None = None,
    plan: dict[str, Any] | None = None,
    name: str | None = None,
    healing: Healing | None = None,
) -> Pruning:
    """Return the content of pruning.json.

    ``original_blocks`` are the kept blocks' numbers in the original base model, even if the source
    is itself a variant; ``lineage`` holds the earlier cuts, oldest first.
    """
    earlier = Pruning.read(folder)
    original = earlier.original_blocks if earlier else ()
    if len(original) != info.blocks:
        original = tuple(range(info.blocks))
    drop = removal.drop
    keep = tuple(block for block in range(info.blocks) if block not in set(drop))
    after = parameters_after(info, removal)
    source = name or str(folder)
    lineage = earlier.lineage if earlier else ()
    if earlier:
        cut = Cut(
            earlier.method,
            earlier.source,
            earlier.criterion,
            earlier.dropped,
            earlier.attention,
            earlier.mlp,
            earlier.healed,
        )
        lineage = (*lineage, cut)

    def lacking(part: str, size: str) -> tuple[int, ...]:
        gone = [b for b in keep if removal.misses(b, part) or not info.block_shapes[b][size]]
        return tuple(original[block] for block in gone)

    return Pruning(
        method="depth",
        source=source,
        base_model=(earlier.base_model if earlier else "") or source,
        source_key=info.key,
        criterion=criterion,
        dropped=tuple(drop),
        attention=removal.attention,
        mlp=removal.mlp,
        mlp_width={str(block): count for block, count in removal.width},
        neurons=removal.order,
        without_attention=lacking("attention", "heads"),
        without_mlp=lacking("mlp", "intermediate"),
        kept=keep,
        dropped_original=tuple(original[block] for block in drop),
        original_blocks=tuple(original[block] for block in keep),
        blocks_before=info.blocks,
        blocks_after=len(keep),
        parameters_before=info.parameters,
        parameters_after=after,
        ratio=1 - after / info.parameters,
        plan=plan,
        lineage=lineage,
        healing=healing,
    )


def _parts(
    index: TensorIndex, removal: Removal, unused: Sequence[str], narrow: _Narrow
) -> Iterator[_Part]:
    """Yield the files to write: the source's shards without what is removed, renumbered.

    Tensors that the model does not use are left out.
    """
    dropped, left_out = set(removal.drop), {*unused, *_tensors_of_parts(index, removal)}
    blocks = {b for b in map(families.block_of, index.entries) if b is not None}
    number = {old: new for new, old in enumerate(sorted(blocks - dropped))}
    kept = []
    for shard in index.shards:
        tensors = tuple(
            (
                entry.name if block is None else families.renamed(entry.name, number[block]),
                narrow.entry(entry),
            )
            for entry in shard.tensors
            if (block := families.block_of(entry.name)) not in dropped
            and entry.name not in left_out
        )
        if tensors:
            kept.append((shard, tensors))
    for position, (shard, tensors) in enumerate(kept, start=1):
        file = headers.SINGLE
        if len(kept) > 1:
            file = f"model-{position:05d}-of-{len(kept):05d}.safetensors"
        yield _Part(file, {"format": "pt", **shard.metadata}, tensors)


def _tensors_of_parts(index: TensorIndex, removal: Removal) -> Iterator[str]:
    gone = set(removal.parts)
    for name in index.entries:
        block = families.block_of(name)
        if block is not None and (block, families.sublayer_of(name)) in gone:
            yield name


def _write_weights(
    folder: Path,
    partial: Path,
    parts: Sequence[_Part],
    replaced: Replaced,
    progress: Progress,
) -> None:
    total = sum(part.size for part in parts)
    mib, done = 1 << 20, 0

    def copied(size: int) -> None:
        nonlocal done
        done += size
        progress.step(done // mib, max(total // mib, 1), "MiB copied")

    for part in parts:
        sources = {entry.file for _, entry in part.tensors}
        (file,) = sources
        with (folder / file).open("rb") as read, (partial / part.file).open("wb") as write:
            write.write(header_bytes(part.tensors, part.metadata))
            write.flush()
            entries = (entry for _, entry in part.tensors)
            for new, group in itertools.groupby(entries, lambda entry: entry.name in replaced):
                if new:
                    for entry in group:
                        _write_replaced(write, entry, replaced[entry.name]())
                        copied(entry.end - entry.start)
                    continue
                for start, end in _ranges(group):
                    copy_range(read, write, start, end, copied)
    if len(parts) > 1:
        weight_map = {name: part.file for part in parts for name, _ in part.tensors}
        staging.write_index(partial, weight_map, total)


def _write_replaced(write: BinaryIO, entry: TensorEntry, data: bytes) -> None:
    if len(data) != entry.end - entry.start:
        raise CheckpointError(
            f"{entry.name} has {entry.end - entry.start:,} bytes in the source, but its new "
            f"weights have {len(data):,}.",
            "Do not change the source during pruning; start again.",
        )
    write.write(data)
    write.flush()


def header_bytes(tensors: Iterable[tuple[str, TensorEntry]], metadata: dict[str, str]) -> bytes:
    """Return the header of a safetensors file: 8-byte length and JSON, padded to 8 bytes.

    The tensors are stored contiguously, in the given order.
    """
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, entry in tensors:
        end = offset + entry.end - entry.start
        table[name] = {
            "dtype": headers.dtype_code(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _ranges(entries: Iterable[TensorEntry]) -> Iterator[tuple[int, int]]:
    """Join adjacent byte ranges, so that consecutive kept blocks are one copy."""
    start = end = -1
    for entry in entries:
        if entry.start == end:
            end = entry.end
            continue
        if end > start:
            yield start, end
        start, end = entry.start, entry.end
    if end > start:
        yield start, end


def copy_range(
    read: BinaryIO,
    write: BinaryIO,
    start: int,
    end: int,
    copied: Callable[[int], None] = lambda size: None,
) -> None:
    """Append bytes ``start`` to ``end`` of one file to another, inside the kernel if it can.

    Raises `CheckpointError` if the source ends early.
    """
    at = start
    in_kernel = hasattr(os, "copy_file_range")
    read.seek(start)
    while at < end:
        if in_kernel:
            try:
                size = os.copy_file_range(
                    read.fileno(), write.fileno(), min(_KERNEL_CHUNK, end - at), at
                )
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                    raise
                size = 0
            if size == 0:
                in_kernel = False
                read.seek(at)
                continue
        else:
            size = _copy_chunks(read, write, min(_CHUNK, end - at))
            if size == 0:
                raise CheckpointError(
                    f"{Path(read.name).name} was truncated while it was being copied.",
                    "Do not change the source during pruning; start again.",
                )
        at += size
        copied(size)


def _copy_chunks(read: BinaryIO, write: BinaryIO, length: int) -> int:
    """Copy up to ``length`` bytes in cache-sized pieces; return the number of bytes copied."""
    done = 0
    while done < length and (piece := read.read(min(_PIECE, length - done))):
        write.write(piece)
        done += len(piece)
    write.flush()
    return done
