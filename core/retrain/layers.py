"""Which decoder layers a retraining uses: the hand-written ones or transformers'. No torch.

The hand-written layers (`core.retrain.fused`) keep what their backward pass reads. They cannot be
combined with gradient checkpointing, which calls a layer's forward pass a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.checkpoint import families
from core.retrain.spec import RetrainSpec

LARGE = 1_000_000_000
"""Above this number of parameters, activations are recomputed if free memory is not known."""
PIECE_BYTES = 24 * 2**20
"""Float32 logits of which the loss is computed at once (`core.retrain.head`): from 32 MiB on,
glibc returns such memory to the system every time."""


def recomputes(spec: RetrainSpec, parameters: int) -> bool:
    """Whether activations are recomputed in the backward pass (gradient checkpointing).

    ``auto`` goes by the size alone; `core.retrain.estimate.fit` decides by what fits, and
    a run and its dry run replace ``auto`` by that.
    """
    wanted = spec.gradient_checkpointing
    return wanted == "on" or (wanted == "auto" and parameters > LARGE)


def why_stock(spec: RetrainSpec, parameters: int, config: Mapping[str, Any]) -> str | None:
    """Return why the layers of transformers are used, None if the hand-written ones are.

    ``config`` is the content of config.json.
    """
    if spec.fused == "off":
        return "--fused off"
    if recomputes(spec, parameters):
        return "gradient checkpointing is on"
    return unsupported(config)


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Return what the hand-written layers lack for a model with this config, None if nothing."""
    name = str(config.get("model_type"))
    family = families.FAMILIES.get(name.removeprefix(families.CUSTOM_PREFIX))
    if family is None:
        return f"the model type {name} is not supported"
    if family.qk_norm:
        return f"{family.label} normalises queries and keys"
    if (config.get("hidden_act") or "silu") != "silu":
        return f"the activation function is {config['hidden_act']}, not silu"
    if config.get("attention_dropout"):
        return "the model has attention dropout"
    return None


def enable_recomputation(model: Any) -> None:
    """Make ``model`` compute activations again in the backward pass instead of keeping them.

    transformers 5.24 calls this activation checkpointing; earlier versions, gradient checkpointing.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
