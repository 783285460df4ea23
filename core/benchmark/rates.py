"""What a device does in a second: reading weights, multiplying, and what else a step costs.

Measured on synthetic tensors and on a model with next to nothing in its blocks, never on the model
whose latency is then estimated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from core.benchmark.analytic import Rates
from core.benchmark.generate import Clock, force_length, timed, tiny_model

READ_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30, "mps": 256 * 2**20}
SQUARE = {"cpu": 1024, "cuda": 8192, "mps": 2048}


def _median_s(work: Callable[[], object], device: torch.device, least_s: float = 0.3) -> float:
    clock = Clock(device)
    work()
    clock.wait()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < least_s and len(times) < 200):
        start = clock.mark()
        work()
        end = clock.mark()
        clock.wait()
        times.append(clock.between_s(start, end))
    return statistics.median(times)


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure `Rates` on ``device`` in ``dtype``; takes about four seconds."""
    width = torch.empty(0, dtype=dtype).element_size()
    square = SQUARE[device.type]
    with torch.inference_mode():
        # Rows of 4096, as in a projection: a matrix-vector product reads each weight once.
        weight = torch.randn(READ_BYTES[device.type] // width // 4096, 4096, device=device)
        weight = weight.to(dtype)
        vector = torch.randn(1, 4096, device=device, dtype=dtype)
        read_s = _median_s(lambda: torch.nn.functional.linear(vector, weight), device)
        size = weight.numel() * width
        left = torch.randn(square, square, device=device).to(dtype)
        multiply_s = _median_s(lambda: left @ left, device)
        logits = torch.randn(16, 4096, device=device)
        sort_s = _median_s(lambda: _sample(logits), device, 0.1)
    few, many = (_empty_step_s(blocks, device, dtype) for blocks in (1, 5))
    block_s = max(0.0, (many - few) / 4)
    sorted_logits = sort_s / logits.numel() if device.type == "cpu" else 0.0
    return Rates(
        bandwidth_bytes_per_s=size / read_s,
        matmul_flops_per_s=2.0 * square**3 / multiply_s,
        block_overhead_s=block_s,
        step_overhead_s=max(0.0, few - block_s),
        sampling_s_per_logit=sorted_logits,
        dtype=str(dtype).removeprefix("torch."),
    )


def _sample(logits: torch.Tensor) -> torch.Tensor:
    """Do what top-k and top-p cost: a sort, a softmax, a running sum, a draw."""
    kept = torch.topk(logits, 50)[0][..., -1, None]
    filtered = logits.masked_fill(logits < kept, -float("inf"))
    ordered, order = torch.sort(filtered)
    remove = ordered.softmax(-1).cumsum(-1) <= 0.05
    filtered = filtered.masked_fill(remove.scatter(1, order, remove), -float("inf"))
    return torch.multinomial(filtered.softmax(-1), 1)


def _empty_step_s(blocks: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of a decoding step of a model with almost empty blocks."""
    model = tiny_model(blocks, device, dtype)
    generation = force_length(model, 33)
    ids = torch.ones(1, 4, dtype=torch.long, device=device)
    timed(model, ids, generation)
    steps = []
    for _ in range(5):
        whole, first = timed(model, ids, generation)
        steps.append((whole - first) / 32)
    return statistics.median(steps)
