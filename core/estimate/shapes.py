"""Shapes of LLaMA 3.1 models, for estimates without a checkpoint; no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.checkpoint import headers, locate
from core.checkpoint.headers import CheckpointInfo
from core.errors import OptionError
from core.runs.progress import StderrProgress

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
}  # fmt: skip


def _shape(hidden: int, blocks: int, heads: int, neurons: int) -> dict[str, Any]:
    return _LLAMA | {
        "hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "intermediate_size": neurons,
    }  # fmt: skip


SHAPES = {
    "8b": _shape(4096, 32, 32, 14336),
    "70b": _shape(8192, 80, 64, 28672),
    "405b": _shape(16384, 126, 128, 53248),
}


_SIZE = re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?b")


def opened(name: str) -> tuple[CheckpointInfo, Mapping[str, Any]]:
    """Return the shapes and the config of ``8b``, ``70b`` or ``405b``, or of a checkpoint.

    Of a checkpoint config.json will do.
    """
    known = SHAPES.get(name.lower())
    if known:
        return headers.describe(name.lower(), known, None, None), known
    if _SIZE.fullmatch(name.lower()) and not Path(name).exists():
        raise OptionError(
            f"There is no shape '{name}'.",
            f"Choose from: {', '.join(SHAPES)}; or give a folder with a config.json.",
        )
    found = locate.open(name, StderrProgress(), need="config", need_tokenizer=False)
    return found.info, found.config


def info_of(name: str) -> CheckpointInfo:
    """Return the shapes alone."""
    return opened(name)[0]
