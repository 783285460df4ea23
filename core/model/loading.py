"""Load a checkpoint into memory, from safetensors only.

Only safetensors files are read, and no code from a checkpoint is run. Out of memory and non-finite
weights raise specific errors of `core.errors`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.errors import CheckpointError, NotFiniteError
from core.model.memory import out_of_memory_explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OWN_CLASSES = {
    "depthcut_llama": "core.model.modeling_depthcut:DepthcutLlamaForCausalLM",
    "depthcut_mistral": "core.model.modeling_depthcut:DepthcutMistralForCausalLM",
    "depthcut_qwen2": "core.model.modeling_depthcut:DepthcutQwen2ForCausalLM",
    "depthcut_qwen3": "core.model.modeling_depthcut:DepthcutQwen3ForCausalLM",
}
"""Classes for model types that transformers does not know: model_type -> ``module:Class``."""


def model_class(config: dict[str, Any]) -> Any:
    """Return the class that loads a checkpoint with this ``config.json``.

    Stock `AutoModelForCausalLM`, or one of `OWN_CLASSES` by its ``model_type``.
    """
    own = OWN_CLASSES.get(str(config.get("model_type")))
    if own:
        module, _, name = own.partition(":")
        return getattr(importlib.import_module(module), name)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def load_model(
    path: str | Path, device: torch.device, dtype: torch.dtype, *, check: bool = True
) -> PreTrainedModel:
    """Load a checkpoint folder for scoring: eval mode, sdpa attention, gradients off.

    Args:
        path: Folder with config.json and safetensors files.
        device: Device for the weights.
        dtype: Dtype of the loaded weights.
        check: Check every weight once and raise an error if one is NaN or infinite.

    Raises:
        CheckpointError: The folder cannot be read as a causal language model.
        NotFiniteError: A weight tensor contains NaN or infinity; the message names it.
        OutOfMemoryError: The device has too little memory.
    """
    folder = Path(path)
    config = _read_config(folder)
    _quiet()
    options: dict[str, Any] = {
        "use_safetensors": True,
        "attn_implementation": "sdpa",
        "local_files_only": True,
        _dtype_keyword(): dtype,
    }
    with out_of_memory_explained(f"loading {folder.name}"):
        try:
            model = model_class(config).from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"Cannot load {folder}: {first}",
                "It must contain config.json and the weights as safetensors; "
                "run 'python -m core inspect' to see what is wrong.",
            ) from error
        model = model.to(device).eval().requires_grad_(False)
    if check:
        check_finite(model)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; raises `CheckpointError` if it has none."""
    from transformers import AutoTokenizer

    folder = Path(path)
    _quiet()
    try:
        # Explicit, because transformers otherwise prompts at the terminal about code in the folder.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder} has no readable tokenizer: {first}",
            "Copy tokenizer.json and tokenizer_config.json into it.",
        ) from error


def _quiet() -> None:
    """Keep transformers' progress bars and warnings out of our logs; errors still appear."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no readable config.json.", "Give a Hugging Face checkpoint."
        ) from error


def _dtype_keyword() -> str:
    """Return how this transformers calls the dtype: ``dtype`` since 4.56, else ``torch_dtype``."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def check_finite(model: torch.nn.Module) -> None:
    """Raise `NotFiniteError` naming the weight tensors that contain NaN or infinity.

    One pass over the weights, without temporary copies.
    """
    broken = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if broken:
        shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise NotFiniteError(
            f"NaN or infinity in the weights: {shown}.",
            "The checkpoint is damaged; load an intact copy.",
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite; only the extremes are checked, as NaN propagates to them."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))
