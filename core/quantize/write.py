"""Write a quantized checkpoint, one tensor at a time, in torchao's safetensors layout.

As with pruning, the folder only looks like a checkpoint once it is complete
(`core.prune.staging`).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import config_rules, headers, locate, own_code
from core.checkpoint.headers import CheckpointInfo, TensorIndex
from core.errors import NotFiniteError, RunError
from core.prune import staging
from core.prune.results import Pruning
from core.quantize import torchao_tensors
from core.quantize.model_card import quantized_card
from core.quantize.plan import Plan
from core.quantize.results import QuantizationRecord
from core.runs.progress import SILENT, Progress


def write(
    folder: Path,
    target: Path,
    plan: Plan,
    record: QuantizationRecord,
    progress: Progress = SILENT,
) -> None:
    """Write the checkpoint in ``folder``, quantized as planned, to ``target``.

    ``record`` goes into quantization.json. Raises `OutputError` if the output cannot be written,
    `NotFiniteError` for weights that are not finite, and `CheckpointError` for a damaged source;
    no partial output is left behind.
    """
    staging.check_output(folder, target, overwrite=True)
    checkpoint = locate.at(folder, need_weights=True)
    config = config_rules.for_variant(
        own_code.with_own_code(checkpoint.config), tied=checkpoint.info.tied
    )
    config["quantization_config"] = torchao_tensors.configuration(plan.bits, plan.group)
    with staging.partial_folder(target) as partial:
        staging.check_space(partial, plan.bytes_after)
        _write_weights(folder, partial, plan, checkpoint.info, progress)
        staging.copy_companions(folder, partial, progress)
        custom = own_code.copy(config, partial)
        if (folder / Pruning.FILE).is_file():
            shutil.copyfile(folder / Pruning.FILE, partial / Pruning.FILE)
        card = quantized_card(
            record,
            config,
            Pruning.read(folder),
            custom_code=custom,
            imported=checkpoint.info.imported,
        )
        staging.write(partial / "README.md", card)
        staging.write(partial / QuantizationRecord.FILE, record.to_text())
        staging.write(partial / "config.json", json.dumps(config, indent=2) + "\n")
        _check(partial, plan)
        progress.check_cancel()
        staging.publish(partial, target)


def _check(partial: Path, plan: Plan) -> None:
    """Raise `RunError` unless the headers of the written files agree with the plan."""
    found = headers.inspect(partial, allow_config_only=False).quantization
    if not found or (found.tensors, found.parameters) != (len(plan.matrices), plan.parameters):
        raise RunError("The written weights are not quantized as planned.", "Report this.")


def _write_weights(
    folder: Path, partial: Path, plan: Plan, info: CheckpointInfo, progress: Progress
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    index = TensorIndex.read(folder)
    chosen = {matrix.name for matrix in plan.matrices}
    unused = set(info.unused_tensors)
    notes = _notes(index, plan, unused)
    file_of: dict[str, str] = {}
    size = done = 0
    for shard in index.shards:
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(folder / shard.file, "pt") as read:
            for entry in shard.tensors:
                if entry.name in unused:
                    continue
                tensor = read.get_tensor(entry.name)
                if entry.name not in chosen:
                    tensors[entry.name] = tensor
                    continue
                tensors |= _quantized(entry.name, tensor, plan, notes)
                done += 1
                progress.step(done, len(chosen), f"Quantizing {shard.file}")
                progress.check_cancel()
        if not tensors:
            continue
        # transformers keeps the metadata of the last file it reads, so each describes all tensors
        save_file(tensors, partial / shard.file, {"format": "pt", **notes})
        file_of |= dict.fromkeys(tensors, shard.file)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(index.shards) > 1:
        staging.write_index(partial, file_of, size)


def _quantized(
    name: str, weight: torch.Tensor, plan: Plan, notes: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    low, high = torch.aminmax(weight)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise NotFiniteError(
            f"NaN or infinity in the weights: {name}.",
            "The checkpoint is damaged; quantize an intact copy.",
        )
    parts, note = torchao_tensors.flatten(
        name, torchao_tensors.quantize(weight, plan.bits, plan.group)
    )
    if note != notes[name]:
        raise RunError(f"torchao describes '{name}' in an unexpected way: {note}.", "Report this.")
    return {key: tensor.contiguous() for key, tensor in parts.items()}


def _notes(index: TensorIndex, plan: Plan, unused: set[str]) -> dict[str, str]:
    """Return the metadata of all files: how each tensor is stored, which shapes determine."""

    @functools.cache
    def note(columns: int, dtype: torch.dtype) -> str:
        row = torch.zeros(1, columns, dtype=dtype)
        return torchao_tensors.flatten(
            "w.weight", torchao_tensors.quantize(row, plan.bits, plan.group)
        )[1]

    wide = {matrix.name: matrix.columns for matrix in plan.matrices}
    plain = json.dumps({"_type": torch.Tensor.__name__})
    notes: dict[str, str] = {}
    for name, entry in index.entries.items():
        if name in unused:
            continue
        dtype: Any = getattr(torch, entry.dtype)
        notes[name] = note(wide[name], dtype) if name in wide else plain
    return {**notes, "tensor_names": json.dumps(list(notes))}
