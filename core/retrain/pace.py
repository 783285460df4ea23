"""How fast this workspace's finished retrainings went, for estimates of a new one. No torch."""

from __future__ import annotations

import math

from core.retrain.results import Summary
from core.runs import pace
from core.runs.workspace import Workspace


def passes(method: str) -> int:
    """Return how many forward passes a trained token costs: LoRA's frozen weights need no gradient.

    A backward pass through the activations costs one, gradients of the weights another.
    """
    return 2 if method == "lora" else 3


def flops_per_s(method: str, device: str, parameters: int) -> float | None:
    """Return the operations per second of a finished retraining on ``device``.

    As `core.runs.pace.flops_per_s`: the nearest in size counts, then the same method, then the
    newest. Without one, the rate of another command that was measured on this device.
    """
    best: tuple[float, bool] = (math.inf, True)
    rate = None
    for record in Workspace().runs("retrain"):
        ours = record.state == "done" and not record.is_elsewhere
        found = Summary.read(record.path) if ours else None
        if not found or not (found.training_s and found.tokens and found.parameters):
            continue
        if not pace.is_on(found.device, device):
            continue
        apart = abs(math.log(found.parameters / parameters))
        key = (round(apart / pace.NEAR), found.method != method)
        if key < best:
            flops = 2.0 * found.parameters * found.tokens * passes(found.method)
            best, rate = key, flops / found.training_s
    return rate or pace.measured(("importance", "evaluate", "search"), device, parameters)
