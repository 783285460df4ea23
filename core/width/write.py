"""Write a width-pruned checkpoint: the source's tensors, cut one at a time.

Unchanged tensors are copied as bytes. Weights keep their stored precision, regardless of the
precision used for scoring. As with depth pruning, the folder only looks like a checkpoint once it
is complete (core.prune.staging).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoint import config_rules, families, headers, locate, own_code
from core.checkpoint.headers import TensorIndex
from core.checkpoint.tensors import TensorEntry
from core.model.streaming import Weights, stored_bytes
from core.prune import staging
from core.prune.depth import copy_range, header_bytes
from core.runs.dtypes import BYTES
from core.runs.progress import SILENT, Progress
from core.width.layout import pruned_config
from core.width.model_card import width_card
from core.width.plan import WidthPlan
from core.width.results import WidthPruning
from core.width.selection import Selection
from core.width.surgery import cut
from core.width.units import BlockUnits

Replaced = Mapping[str, Callable[[], Tensor]]


def write(
    folder: Path,
    target: Path,
    plan: WidthPlan,
    selection: Selection,
    record: WidthPruning,
    progress: Progress = SILENT,
    replaced: Replaced | None = None,
) -> None:
    """Write what ``selection`` keeps of the checkpoint in ``folder`` to the folder ``target``.

    ``record`` goes into pruning.json; ``replaced`` makes refitted tensors, cut already, by their
    names. Raises `OutputError` if the output cannot be written and
    `CheckpointError` for a damaged source; no partial output is left behind.
    """
    staging.check_output(folder, target, overwrite=True)
    counts = {block: keep.counts for block, keep in selection.keep.items()}
    source = locate.at(folder).config
    config = config_rules.for_variant(
        pruned_config(source, plan.units, counts, biases=bool(selection.biases)),
        tied=plan.info.tied,
    )
    with staging.partial_folder(target) as partial:
        staging.check_space(partial, plan.info.disk_bytes)
        _write_weights(folder, partial, plan, selection, progress, replaced or {})
        staging.copy_companions(folder, partial, progress)
        custom = own_code.copy(config, partial)
        card = width_card(record, config, custom_code=custom, imported=plan.info.imported)
        staging.write(partial / "README.md", card)
        staging.write(partial / WidthPruning.FILE, record.to_text())
        staging.write(partial / "config.json", json.dumps(config, indent=2) + "\n")
        headers.inspect(partial, allow_config_only=False)
        progress.check_cancel()
        staging.publish(partial, target)


def _write_weights(
    folder: Path,
    partial: Path,
    plan: WidthPlan,
    selection: Selection,
    progress: Progress,
    replaced: Replaced,
) -> None:
    index = TensorIndex.read(folder)
    shards, stored = index.shards, index.entries.keys()
    unused = set(plan.info.unused_tensors)
    source = Weights(folder, torch.float32, torch.device("cpu"))
    file_of: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        progress.step(number - 1, len(shards), f"Writing {shard.file}")
        kept = (entry for entry in shard.tensors if entry.name not in unused)
        pieces = [p for e in kept for p in _pieces(e, plan.units, selection, stored, replaced)]
        if not pieces:
            continue
        pieces.sort(key=lambda piece: -BYTES[piece.entry.dtype])  # each starts at a multiple of it
        with (folder / shard.file).open("rb") as read, (partial / shard.file).open("wb") as write:
            table = [(piece.entry.name, piece.entry) for piece in pieces]
            write.write(header_bytes(table, {"format": "pt", **shard.metadata}))
            write.flush()
            for piece in pieces:
                progress.check_cancel()
                if piece.make is None:
                    copy_range(read, write, piece.source.start, piece.source.end)
                    continue
                write.write(stored_bytes(piece.make(source.raw)))
                write.flush()
        file_of |= {piece.entry.name: shard.file for piece in pieces}
        size += sum(piece.entry.end - piece.entry.start for piece in pieces)
        progress.step(number, len(shards), f"Writing {shard.file}")
    if len(shards) > 1:
        staging.write_index(partial, file_of, size)


@dataclass(frozen=True)
class _Piece:
    """A tensor of the variant."""

    entry: TensorEntry
    """Its name, format, shape and size."""
    source: TensorEntry
    """What it is made of."""
    make: Callable[[Callable[[Iterable[str]], dict[str, Tensor]]], Tensor] | None
    """Makes it, given what reads stored tensors; None if its bytes are those of the source."""


def _pieces(
    entry: TensorEntry,
    units: Sequence[BlockUnits],
    selection: Selection,
    stored: Collection[str],
    replaced: Replaced,
) -> Iterator[_Piece]:
    """Yield what becomes of a tensor, and the new bias that follows its weight."""
    name, block = entry.name, families.block_of(entry.name)
    if block is None:
        yield _Piece(entry, entry, None)
        return
    inner = name.removeprefix(f"model.layers.{block}.")
    module, _, kind = inner.rpartition(".")
    unit = units[block]
    keep = selection.keep.get(block, unit.all)
    added = _bias(module, unit, selection)
    adds = kind == "bias" and added is not None

    def made(read: Callable[[Iterable[str]], dict[str, Tensor]]) -> Tensor:
        if name in replaced:
            return replaced[name]()
        tensor = read([name])[name]
        if adds and added is not None:
            tensor = (tensor.float() + added).to(tensor.dtype)
        return cut(inner, tensor, keep, unit)

    shape = tuple(cut(inner, torch.empty(entry.shape, device="meta"), keep, unit).shape)
    changes = adds or name in replaced or shape != tuple(entry.shape)
    yield _Piece(_resized(entry, name, shape), entry, made if changes else None)
    bias = f"{name.removesuffix('weight')}bias"
    if kind == "weight" and added is not None and bias not in stored:
        dtype = getattr(torch, entry.dtype)
        new = added
        yield _Piece(_resized(entry, bias, tuple(added.shape)), entry, lambda _: new.to(dtype))


def _resized(entry: TensorEntry, name: str, shape: tuple[int, ...]) -> TensorEntry:
    size = math.prod(shape) * BYTES[entry.dtype]
    return replace(entry, name=name, shape=shape, start=0, end=size)


def _bias(module: str, unit: BlockUnits, selection: Selection) -> Tensor | None:
    """Return what is added to an output projection's bias; zeros in unpruned blocks."""
    if not selection.biases or module not in families.ADDED_BIAS:
        return None
    found = selection.biases.get(unit.block)
    if found is None:
        return torch.zeros(unit.hidden)
    return found.o if module == "self_attn.o_proj" else found.down
