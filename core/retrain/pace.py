"""How fast this workspace's finished retrainings went, for estimates of a new one. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from core.retrain.results import Summary
from core.runs import pace


def passes(method: str) -> int:
    """Return how many forward passes a trained token costs: LoRA's frozen weights need no gradient.

    A backward pass through the activations costs one, gradients of the weights another.
    """
    return 2 if method == "lora" else 3


def flops_per_s(method: str, device: str, parameters: int) -> float | None:
    """Return the operations per second of a finished retraining on ``device``.

    As `core.runs.pace.nearest` chooses among them: a run of the same ``method`` does the same kind
    of work. Without one, the rate of another command that was measured on this device.
    """
    rate = pace.nearest(_rates(method, device), parameters)
    return rate or pace.measured(("importance", "evaluate", "search"), device, parameters)


def _rates(method: str, device: str) -> Iterator[pace.Rate]:
    for record in pace.finished("retrain"):
        found = Summary.read(record.path)
        if not found or not (found.training_s and found.tokens and found.parameters):
            continue
        if pace.is_on(found.device, device):
            flops = 2.0 * found.parameters * found.tokens * passes(found.method)
            alike = found.method == method
            yield pace.Rate(flops / found.training_s, found.parameters, alike)
