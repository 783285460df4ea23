"""Load a checkpoint into memory: device, dtype, safetensors only, and what can go wrong.

Weights come from safetensors files alone and no code from a checkpoint is run. Running out of
memory and weights that are not finite end in errors of `core.errors` that say which.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.errors import CheckpointError, NotFiniteError, OptionError, OutOfMemoryError
from core.processes import memory_mib

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OWN_CLASSES = {
    "depthcut_llama": "core.width.modeling_depthcut:DepthcutLlamaForCausalLM",
    "depthcut_mistral": "core.width.modeling_depthcut:DepthcutMistralForCausalLM",
    "depthcut_qwen2": "core.width.modeling_depthcut:DepthcutQwen2ForCausalLM",
    "depthcut_qwen3": "core.width.modeling_depthcut:DepthcutQwen3ForCausalLM",
}
"""Classes for model types that transformers does not know: model_type -> ``module:Class``."""

MIB = 2.0**20


# --- device and dtype ---------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """Return the device of ``auto``, ``cpu``, ``cuda``, ``cuda:K`` or ``mps``.

    Raises `OptionError` when the name is unknown or the machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise OptionError(
            f"--device: '{name}' is not known.", "Use auto, cpu, cuda, cuda:1 or mps."
        )
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise OptionError(
                f"--device: '{name}' asks for CUDA, which is not available here.",
                "Use --device cpu, or install a CUDA build of torch and a driver.",
            )
        count = torch.cuda.device_count()
        number = int(index) if index else torch.cuda.current_device()
        if number >= count:
            raise OptionError(
                f"--device: '{name}' does not exist.", f"There are {count}, counted from cuda:0."
            )
        return torch.device("cuda", number)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise OptionError("--device: 'mps' is not available here.", "Use --device cpu.")
    return torch.device(kind)


def resolve_dtype(name: str, device: torch.device, config: Any = None) -> torch.dtype:
    """Return the dtype in which weights are held on ``device``.

    ``auto`` keeps the dtype that ``config`` (a transformers configuration, a dictionary, or None)
    declares, with one exception: float16 becomes bfloat16 where a GPU has it and float32
    elsewhere, because float16 activations overflow in LLaMA models. Raises `OptionError` for an
    unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise OptionError(f"--dtype: '{name}' is not known.", f"Use auto, {', '.join(DTYPES)}.")
        return DTYPES[name]
    declared = _declared_dtype(config)
    if declared == torch.float32:
        return declared
    if device.type == "cpu":
        return torch.bfloat16 if declared == torch.bfloat16 else torch.float32
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _declared_dtype(config: Any) -> torch.dtype:
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    value = (get("dtype") or get("torch_dtype")) if config is not None else None
    if isinstance(value, torch.dtype):
        return value
    return DTYPES.get(str(value).removeprefix("torch."), torch.float32)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        torch.zeros(1, dtype=torch.bfloat16, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for `torch.float32`, and so on."""
    return str(dtype).removeprefix("torch.")


# --- loading ------------------------------------------------------------------------------------


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
        device: Where the weights go.
        dtype: What they are held in.
        check: Look at every weight once and raise when one is NaN or infinite.

    Raises:
        CheckpointError: The folder cannot be read as a causal language model.
        NotFiniteError: A weight tensor holds NaN or infinity; it is named.
        OutOfMemoryError: The device is too small.
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
                f"{folder} cannot be loaded: {first}",
                "It must hold config.json and the weights as safetensors; "
                "'python -m core inspect' says what is wrong with it.",
            ) from error
        model = model.to(device).eval().requires_grad_(False)
    if check:
        check_finite(model)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; raises `CheckpointError` where there is none."""
    from transformers import AutoTokenizer

    folder = Path(path)
    _quiet()
    try:
        # Said outright: left open, transformers asks at the terminal about code in the folder.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read: {first}",
            "Copy tokenizer.json and tokenizer_config.json into it.",
        ) from error


def _quiet() -> None:
    """Keep the library's bars and remarks out of our logs; its errors still come."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no config.json that can be read.", "Give a Hugging Face checkpoint."
        ) from error


def _dtype_keyword() -> str:
    """Return how this transformers calls the dtype: ``dtype`` since 4.56, else ``torch_dtype``."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def check_finite(model: torch.nn.Module) -> None:
    """Raise `NotFiniteError` naming the weight tensors that hold NaN or infinity.

    One pass over the weights, without temporary copies.
    """
    broken = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if broken:
        shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise NotFiniteError(
            f"NaN or infinity in the weights: {shown}.",
            "The checkpoint is damaged; load an undamaged copy of it.",
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite; the extremes alone decide, and NaN spreads to them."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


# --- memory -------------------------------------------------------------------------------------


@contextlib.contextmanager
def out_of_memory_explained(what: str) -> Iterator[None]:
    """Turn the ways in which torch runs out of memory into `OutOfMemoryError`, saying in what."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = str(error)
        raise OutOfMemoryError(
            f"Out of memory while {what}: {(text.splitlines() or ['no detail'])[0][:200]}",
            "Use --dtype bfloat16, fewer samples or shorter rows, or a larger device.",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is one of the ways in which memory runs out."""
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def free_memory(device: torch.device) -> None:
    """Give memory that no tensor uses any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


_baseline_mib: dict[str, float] = {}


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring peak memory on ``device`` from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
        _baseline_mib["cpu"] = memory_mib()


def peak_memory_mib(device: torch.device) -> float:
    """Return peak memory since `reset_peak_memory`, in MiB.

    CUDA: peak allocated by torch. MPS: what the driver holds for this process now (it keeps no
    peak). CPU: growth of the process's peak resident memory, so it covers more than tensors.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / MIB
    return max(0.0, memory_mib("VmHWM:") - _baseline_mib.get("cpu", 0.0))
