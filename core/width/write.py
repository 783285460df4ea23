"""Write a width-pruned checkpoint: the source's tensors, cut one shard at a time.

Weights keep their stored precision, regardless of the precision used for scoring. As with depth
pruning, the folder only looks like a checkpoint once it is complete (core.prune.staging).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import config_rules, families, headers, locate, own_code
from core.checkpoint.headers import TensorIndex
from core.prune import staging
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
    from safetensors import safe_open
    from safetensors.torch import save_file

    index = TensorIndex.read(folder)
    shards, stored = index.shards, index.entries.keys()
    unused = set(plan.info.unused_tensors)
    file_of: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        progress.step(number - 1, len(shards), f"Writing {shard.file}")
        with safe_open(folder / shard.file, "pt") as read:
            tensors = dict(_cut_shard(read, plan.units, selection, stored, unused, replaced))
        if not tensors:
            continue
        save_file(tensors, partial / shard.file, {"format": "pt", **shard.metadata})
        file_of |= dict.fromkeys(tensors, shard.file)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        progress.step(number, len(shards), f"Writing {shard.file}")
    if len(shards) > 1:
        staging.write_index(partial, file_of, size)


def _cut_shard(
    read: Any,
    units: Sequence[BlockUnits],
    selection: Selection,
    stored: Collection[str],
    unused: Collection[str],
    replaced: Replaced,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the cut tensors of one open file; each new bias follows its weight."""
    for name in read.keys():  # noqa: SIM118 - not a mapping
        if name in unused:
            continue
        tensor = read.get_tensor(name)
        block = families.block_of(name)
        if block is None:
            yield name, tensor
            continue
        inner = name.removeprefix(f"model.layers.{block}.")
        module, _, kind = inner.rpartition(".")
        keep = selection.keep.get(block, units[block].all)
        added = _bias(module, units[block], selection)
        if kind == "bias" and added is not None:
            tensor = (tensor.float() + added).to(tensor.dtype)
        if name in replaced:
            yield name, replaced[name]().cpu().contiguous()
        else:
            yield name, cut(inner, tensor, keep, units[block]).contiguous()
        bias = f"{name.removesuffix('weight')}bias"
        if kind == "weight" and added is not None and bias not in stored:
            yield bias, added.to(tensor.dtype)


def _bias(module: str, unit: BlockUnits, selection: Selection) -> Tensor | None:
    """Return what is added to an output projection's bias; zeros in unpruned blocks."""
    if not selection.biases or module not in families.ADDED_BIAS:
        return None
    found = selection.biases.get(unit.block)
    if found is None:
        return torch.zeros(unit.hidden)
    return found.o if module == "self_attn.o_proj" else found.down
