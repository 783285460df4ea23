"""Widen a GGUF file's weights through transformers and save them as safetensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from core.checkpoint.gguf import Header
from core.checkpoint.gguf_config import stop_ids
from core.errors import CheckpointError
from core.model import loading
from core.model.memory import out_of_memory_explained
from core.runs.progress import Progress

SHARD = "5GB"
"""Largest weight file."""


def write(
    header: Header, config: dict[str, Any], dtype: str, folder: Path, progress: Progress
) -> None:
    """Save weights, config.json and generation_config.json of a GGUF file into ``folder``.

    Raises `CheckpointError` if transformers refuses the file or leaves a weight out, and
    `NotFiniteError` if a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    loading.quiet()
    width = getattr(torch, dtype)
    with out_of_memory_explained(f"importing {header.path.name}"), _steps(progress):
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                str(header.path.parent),
                gguf_file=header.path.name,
                config=loading.settings_of(config),
                quantization_config=GgufConfig(dequantize=True),
                dtype=width,
                output_loading_info=True,
                local_files_only=True,
            )
        except loading.REFUSALS as error:
            raise CheckpointError(
                f"transformers cannot read {header.path}: {loading.reason(error)}",
                "Give the safetensors checkpoint it was made from.",
            ) from error
    left = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    left = [
        name for name in left if not (name == "lm_head.weight" and config["tie_word_embeddings"])
    ]
    if left:
        raise CheckpointError(
            f"transformers left out weights of {header.path}: {', '.join(left[:3])}.",
            "Give the safetensors checkpoint it was made from.",
        )
    loading.check_finite(model)
    stops = stop_ids(header)
    model.generation_config = GenerationConfig(
        bos_token_id=config["bos_token_id"],
        eos_token_id=stops if len(stops) > 1 else config["eos_token_id"],
        pad_token_id=config["pad_token_id"],
    )
    progress.log(f"Writing {dtype} weights.")
    model.config.name_or_path = ""
    model.save_pretrained(folder, max_shard_size=SHARD)


@contextlib.contextmanager
def _steps(progress: Progress) -> Iterator[None]:
    """Report each tensor that transformers' reader widens, in place of its progress bar."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def tracked(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        listed = list(tensors)
        for done, tensor in enumerate(listed):
            progress.step(done, len(listed), "widening the weights (tensors)")
            yield tensor
        progress.step(len(listed), len(listed), "widening the weights (tensors)")

    bar = reader.tqdm
    reader.tqdm = tracked
    try:
        yield
    finally:
        reader.tqdm = bar
