"""Load a checkpoint into memory, from safetensors only.

Only safetensors files are read, and no code from a checkpoint is run. Out of memory and non-finite
weights raise specific errors of `core.errors`.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from core.checkpoint import config_rules, locate
from core.checkpoint.tensors import TensorIndex, read_config
from core.errors import CheckpointError, NotFiniteError
from core.model import memory, quantized_weights
from core.model.memory import out_of_memory_explained
from core.model.precision import DTYPES, Precision, decide, dtype_name, resolve_device
from core.runs.dtypes import Formats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from core.checkpoint.headers import CheckpointInfo
    from core.checkpoint.locate import Checkpoint
    from core.runs.dtypes import Purpose
    from core.runs.spec import DeviceOptions

OWN_CLASSES = {
    "depthcut_llama": "core.model.modeling_depthcut:DepthcutLlamaForCausalLM",
    "depthcut_mistral": "core.model.modeling_depthcut:DepthcutMistralForCausalLM",
    "depthcut_qwen2": "core.model.modeling_depthcut:DepthcutQwen2ForCausalLM",
    "depthcut_qwen3": "core.model.modeling_depthcut:DepthcutQwen3ForCausalLM",
}
"""Classes for model types that transformers does not know: model_type -> ``module:Class``."""

REFUSALS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for a checkpoint that it does not accept."""
_REASON_LINES = 4
_REASON_LENGTH = 400


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


@dataclass(frozen=True)
class Prepared:
    """A checkpoint, and where and in which precision a command will compute it."""

    name: str
    """For the log."""
    folder: Path
    device: torch.device
    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        return self.precision.weights

    @property
    def formats(self) -> Formats:
        """The precision by the names of its formats."""
        return Formats(dtype_name(self.dtype), dtype_name(self.precision.arithmetic))

    def load(self, log: Callable[[str], None]) -> PreTrainedModel:
        """Return the model; raises what `load_model` does."""
        where = f"{self.device} as {dtype_name(self.dtype)}"
        log(f"Loading {self.name} to {where}.")
        return load_model(self.folder, self.device, self.dtype)

    def facts(self) -> dict[str, Any]:
        """Return device, dtype and peak memory as a summary has them."""
        return {
            "device": str(self.device),
            "dtype": dtype_name(self.dtype),
            "peak_memory_mib": round(memory.peak_memory_mib(self.device), 1),
        }


def prepare(spec: DeviceOptions, checkpoint: Checkpoint, purpose: Purpose = "whole") -> Prepared:
    """Decide where and in what a checkpoint is computed, and start measuring memory.

    Raises `OptionError` for a device or a precision that is not available.
    """
    device = resolve_device(spec.device)
    memory.reset_peak_memory(device)
    precision = decide(spec.dtype, device, checkpoint.info.dtype, purpose)
    return Prepared(checkpoint.name, checkpoint.folder, device, precision)


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
        RunError: The weights are quantized and torchao is missing.
        NotFiniteError: A weight tensor contains NaN or infinity; the message names it.
        OutOfMemoryError: The device has too little memory.
    """
    folder = Path(path)
    checkpoint = locate.at(folder, need_weights=True)
    config = dict(checkpoint.config)
    quiet()
    if checkpoint.info.quantization:
        quantized_weights.require()
    options: dict[str, Any] = {
        "use_safetensors": True,
        "attn_implementation": "sdpa",
        "local_files_only": True,
        "dtype": dtype,
        **_placement(device),
        "output_loading_info": True,
        **settings_argument(config),
    }
    with out_of_memory_explained(f"loading {folder.name}"):
        try:
            model, report = model_class(config).from_pretrained(folder, **options)
        except REFUSALS as error:
            raise CheckpointError(
                f"Cannot load {folder}: {reason(error)}",
                "It must contain config.json and the weights as safetensors; "
                "run 'python -m core inspect' to see what is wrong.",
            ) from error
        # Already there, so that transformers and Trainer need not know how it came.
        vars(model).pop("hf_device_map", None)
        _check_report(folder, checkpoint.info, report)
        if model.config.tie_word_embeddings and not checkpoint.info.tied:
            # The stored head is used; whatever is written from this model has to keep it.
            model.config.tie_word_embeddings = False
        if checkpoint.info.quantization:
            # Already on the device; torchao's own `to` would round the scales to the model's dtype.
            quantized_weights.widen_to(model, dtype)
        else:
            model = model.to(device)
        model = model.eval().requires_grad_(False)
    if check:
        check_finite(model)
    return model


def _placement(device: torch.device) -> dict[str, Any]:
    """Return what makes transformers read each tensor straight onto a GPU.

    Otherwise the whole model passes through the host's memory, which may be smaller than the GPU's.
    """
    return {} if device.type == "cpu" else {"device_map": {"": device}}


def settings_argument(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config=`` for `from_pretrained` if transformers could not read the file itself."""
    plain = config_rules.readable(config)
    if plain == config:
        return {}
    return {"config": settings_of(plain)}


def settings_of(config: dict[str, Any]) -> Any:
    """Return the configuration object of a ``config.json``; raises `CheckpointError` if refused."""
    from transformers import CONFIG_MAPPING

    chosen = model_class(config)
    own = getattr(chosen, "config_class", None)
    try:
        return (own or CONFIG_MAPPING[str(config["model_type"])]).from_dict(
            config_rules.readable(config)
        )
    except REFUSALS as error:
        raise CheckpointError(
            f"transformers refuses config.json: {reason(error)}", "Correct it in config.json."
        ) from error


def reason(error: BaseException) -> str:
    """Return why another library refused, as one line: also what follows its first line.

    Strict configurations, for one, name the validator first and the reason below.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:_REASON_LINES]) or type(error).__name__
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."


def _check_report(folder: Path, info: CheckpointInfo, report: dict[str, Any]) -> None:
    """Raise if transformers could not place a tensor, beyond those that the headers explain."""
    known = set(info.unused_tensors)
    for kind, names in (
        ("are missing from the weights", report.get("missing_keys") or ()),
        ("have another shape than config.json implies", report.get("mismatched_keys") or ()),
        ("are not used by the model", set(report.get("unexpected_keys") or ()) - known),
        ("cannot be converted", report.get("error_msgs") or ()),
    ):
        if names:
            listed = sorted(str(name) for name in names)
            raise CheckpointError(
                f"transformers reports on {folder} that {len(listed)} tensors {kind}: "
                f"{', '.join(listed[:3])}{', ...' if listed[3:] else ''}.",
                "Give a checkpoint whose config.json matches its weights.",
            )


def stored_formats(folder: Path) -> dict[str, torch.dtype]:
    """Return the format of every weight in a checkpoint folder, by name."""
    entries = TensorIndex.read(folder).entries
    return {name: DTYPES[e.dtype] for name, e in entries.items() if e.dtype in DTYPES}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; raises `CheckpointError` if it has none."""
    from transformers import AutoTokenizer

    folder = Path(path)
    quiet()
    has_config = (folder / "config.json").is_file()
    settings = settings_argument(read_config(folder / "config.json")) if has_config else {}
    try:
        # Explicit, because transformers otherwise prompts at the terminal about code in the folder.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **settings
        )
    except (*REFUSALS, ImportError) as error:
        raise CheckpointError(
            f"{folder} has no readable tokenizer: {reason(error)}",
            "Copy tokenizer.json and tokenizer_config.json into it.",
        ) from error
    if has_config:
        info = locate.at(folder).info
        if info.tokenizer and info.tokenizer["size"] > info.vocab:
            _leave_out(tokenizer, info.tokenizer["special_beyond"], info.vocab)
    return tokenizer


def _leave_out(tokenizer: Any, special: dict[str, int], rows: int) -> None:
    """Remove special tokens beyond the embedding's ``rows``, so that no text gets their ids.

    Text that spells one out is then read as ordinary characters. If one of them pads, the token
    that ends a text pads instead.
    """
    from tokenizers import Tokenizer

    names = {name for name, number in special.items() if number >= rows}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not names:
        return
    table = json.loads(backend.to_str())
    table["added_tokens"] = [t for t in table["added_tokens"] if t["content"] not in names]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(table))
    if tokenizer.pad_token in names:
        tokenizer.pad_token = tokenizer.eos_token


def quiet() -> None:
    """Keep transformers' progress bars and warnings out of our logs; errors still appear."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def check_finite(model: torch.nn.Module) -> None:
    """Raise `NotFiniteError` naming the weight tensors that contain NaN or infinity.

    One pass over the weights, without temporary copies.
    """
    found = {name: w.dtype for name, w in model.named_parameters() if not is_finite(w)}
    if found:
        kind = torch.float16 if torch.float16 in found.values() else next(iter(found.values()))
        raise not_finite(list(found), kind)


def not_finite(broken: list[str], dtype: torch.dtype) -> NotFiniteError:
    """Return the error about weight tensors, held in ``dtype``, with NaN or infinity."""
    shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    return NotFiniteError(
        f"NaN or infinity in the weights: {shown}.",
        "Use --dtype bfloat16 or float32 if the checkpoint has values above 65,504, the end of "
        "float16's range; otherwise it is damaged, and you need an intact copy."
        if dtype == torch.float16
        else "The checkpoint is damaged; load an intact copy.",
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite; only the extremes are checked, as NaN propagates to them."""
    for part in quantized_weights.parts(tensor.detach()):
        if part.numel() and part.is_floating_point():
            low, high = torch.aminmax(part)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                return False
    return True
