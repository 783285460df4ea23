"""Trained weights: adapters, merging them, and writing checkpoints that stock libraries load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import headers, own_code
from core.errors import CheckpointError
from core.model import quantized_weights
from core.model.loading import load_model
from core.model.memory import free_memory
from core.model.precision import DTYPES, dtype_name
from core.prune.results import Pruning
from core.prune.staging import copy_companions
from core.quantize.plan import Plan
from core.retrain import sharded, split_files
from core.retrain.loss import collate, heldout_loss
from core.retrain.results import Merged
from core.retrain.rows import Row
from core.retrain.spec import RetrainSpec
from core.runs.progress import SILENT
from core.runs.ranks import ALONE, Ranks
from core.runs.workspace import remove, sweep, temporary_beside

COMPARED_ROWS = 4


def with_adapters(model: Any, spec: RetrainSpec) -> Any:
    """Return ``model`` with LoRA adapters (peft) in float32, drawn from torch's generator."""
    from peft import LoraConfig, get_peft_model

    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in spec.targets if name not in present]
    if missing:
        raise CheckpointError(
            f"The model has no {missing[0]}.", "Remove it from --targets, or use --method full."
        )
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=spec.dropout,
        target_modules=list(spec.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def quantize_base(model: Any, plan: Plan, *, nf4: bool = False) -> None:
    """Round the weights of ``plan`` in a loaded model.

    The result is that of quantizing the checkpoint; with ``nf4``, bitsandbytes' four bits.
    """
    if nf4:
        for matrix in plan.matrices:
            layer, _, name = matrix.name.removesuffix(".weight").rpartition(".")
            owner = model.get_submodule(layer)
            setattr(owner, name, quantized_weights.to_nf4(getattr(owner, name)))
        return
    quantized_weights.require()
    from core.quantize.torchao_tensors import quantize

    for matrix in plan.matrices:
        module = model.get_submodule(matrix.name.removesuffix(".weight"))
        rounded = quantize(module.weight, plan.bits, plan.group)
        module.weight = torch.nn.Parameter(rounded, requires_grad=False)


def train_part(model: Any, blocks: Iterable[int]) -> None:
    """Let only some blocks train, and the output matrix unless it is the embedding as well."""
    model.requires_grad_(False)
    for block in blocks:
        model.model.layers[block].requires_grad_(True)
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        model.lm_head.requires_grad_(True)


def load_trained(model: Any, folder: Path) -> None:
    """Load the trained weights of a checkpoint folder into ``model``, or this process's part."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    if sharded.is_split(model):
        split_files.read(model, folder)
        return
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    own = model.state_dict()
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:  # one tensor at a time
            for name in tensors.keys():  # noqa: SIM118
                if name in own:
                    own[name].copy_(tensors.get_tensor(name))


def reset(model: Any, folder: Path) -> None:
    """Reset ``model`` to the state before the first step; ``folder`` is its checkpoint."""
    if not hasattr(model, "peft_config"):
        load_trained(model, folder)
        return
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()


def replace_folder(folder: Path, write: Any) -> None:
    """Call ``write`` with a temporary folder, then put it in ``folder``'s place.

    What a killed process left of an earlier attempt is removed first.
    """
    sweep(folder.parent)
    temporary = temporary_beside(folder)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        remove(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in the format of peft."""
    replace_folder(folder, model.save_pretrained)


def merge_and_save(
    model: Any,
    source: Path,
    folder: Path,
    *,
    dtype: torch.dtype,
    rows: Sequence[Row],
    device: torch.device,
    compute: torch.dtype | None,
    card: Callable[[Mapping[str, Any], bool], str] | None = None,
    trained_loss: float | None = None,
    trained_logits: list[torch.Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Merged:
    """Write the whole checkpoint in ``dtype`` and measure how it differs from the trained model.

    ``model`` cannot be used afterwards: its weights are freed. Adapters are added to the weights in
    the precision of the training, or that of ``dtype`` if it is wider, and then rounded to it. For
    the measurement, transformers loads the written folder again; if the model is split among
    ``ranks``, each process reads its part again instead, and the first one writes. ``card`` makes
    the model card of the config and whether the checkpoint comes with Depthcut's modelling code.
    ``trained_loss`` and ``trained_logits`` are those of what was trained on ``rows``, if they are
    known; it may differ from ``model``, e.g. if its base was quantized.

    Returns:
        How far the written checkpoint is from what was trained, on ``rows``.
    """
    model.eval()
    if trained_loss is None:
        trained_loss = heldout_loss(model, rows, device, compute, SILENT, ranks)
    trained = trained_logits or logits_of(model, rows, device)
    trained_in = next(model.parameters()).dtype
    split = sharded.is_split(model)
    if dtype.itemsize > trained_in.itemsize and not split:
        # so that the sum with the adapter is not rounded
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
    whole = model.merge_and_unload() if hasattr(model, "peft_config") else model
    for weight in () if split else whole.parameters():  # not the rotary frequencies: float32
        weight.data = weight.data.to(dtype)
    whole.config.use_cache = True

    def write(target: Path, whole: Any = whole) -> None:
        if split:
            split_files.write(whole, target, ranks, dtype)
        else:
            whole.save_pretrained(target, max_shard_size="5GB")
        copy_companions(source, target)
        if (source / Pruning.FILE).is_file():
            shutil.copyfile(source / Pruning.FILE, target / Pruning.FILE)
        config = target / "config.json"
        own = own_code.with_own_code(json.loads(config.read_text(encoding="utf-8")))
        config.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        custom = own_code.copy(own, target)
        if card:
            (target / "README.md").write_text(card(own, custom), encoding="utf-8")
        headers.inspect(target, allow_config_only=False)

    if ranks.is_first:
        replace_folder(folder, write)
    else:
        split_files.write(whole, folder, ranks, dtype)
    ranks.first(None)  # the folder is there
    # The caller still has the model, so its weights are freed here: the device never holds both.
    if split:
        sharded.free(whole)
    else:
        quantized_weights.free(whole)
    del whole, model, write
    free_memory(device)
    if split:
        again = split_files.load(folder, ranks, device, dtype, trained=False)
    else:
        again = load_model(folder, device, dtype)
    gaps = [(a - b).abs() for a, b in zip(trained, logits_of(again, rows, device), strict=True)]
    return Merged(
        dtype=dtype_name(dtype),
        trained_in=dtype_name(trained_in),
        rows_compared=len(gaps),
        max_logit_difference=max(float(gap.max()) for gap in gaps),
        mean_logit_difference=float(torch.cat([gap.flatten() for gap in gaps]).mean()),
        heldout_loss=heldout_loss(again, rows, device, None, SILENT, ranks),
        heldout_loss_trained=trained_loss,
    )


def merged_dtype(spec: RetrainSpec, declared: str) -> torch.dtype:
    """Return the precision to write: as requested, else that of the pruned checkpoint."""
    name = spec.merge_dtype if spec.merge_dtype != "auto" else declared
    return DTYPES.get(name, torch.float32)


def logits_of(model: Any, rows: Sequence[Row], device: torch.device) -> list[torch.Tensor]:
    """Return the logits [tokens, vocabulary] of the first rows, on the CPU."""
    with torch.no_grad():
        return [
            model(input_ids=collate([(row,)])["input_ids"].to(device), use_cache=False)
            .logits[0]
            .float()
            .cpu()
            for row in rows[:COMPARED_ROWS]
        ]


def dense_of(folder: Path) -> str | None:
    """Return the checkpoint that this one was pruned from, according to pruning.json."""
    cut = Pruning.read(folder)
    return (cut.base_model or cut.source or None) if cut else None
