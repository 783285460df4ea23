"""Measure a device's rates: reading weights, multiplying, and the overheads of a step.

Measured on synthetic tensors and on narrow random models, never on the model whose latency is then
estimated.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from core.benchmark.analytic import BlocksLeft, Rates, activations, step_s
from core.benchmark.generate import Clock, force_length, timed, tiny_model

PROBE_WIDTH, PROBE_BATCH, PROBE_INPUT, PROBE_STEPS = 128, 32, 4, 24
"""The narrow random models: so narrow that bytes and operations cost little beside the overheads
that they measure. Chosen, not measured."""
PROBE_BLOCKS = {"cpu": (1, 5), "cuda": (4, 20), "mps": (4, 20)}
"""Blocks of the two models; more on devices whose host launches kernels, at times that vary."""
LOGITS = {"cpu": (16, 4096), "cuda": (64, 32768), "mps": (64, 32768)}
"""Sequences and vocabulary to measure sampling; on a GPU enough for launching to hardly count."""
READ_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30, "mps": 256 * 2**20}
"""Weights read to measure bandwidth; chosen larger than the caches of common devices of a kind."""
SQUARE = {"cpu": 1024, "cuda": 8192, "mps": 2048}
"""Rows of the square matrices that measure multiplying. Chosen to take milliseconds."""


def _median_s(work: Callable[[], object], device: torch.device, least_s: float = 0.2) -> float:
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


def basic(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measure the bytes read and the operations done per second in ``dtype``; in half a second."""
    width = torch.empty(0, dtype=dtype).element_size()
    square = SQUARE[device.type]
    with torch.inference_mode():
        # Rows of 4096, as in a projection; a matrix-vector product reads each weight once.
        weight = torch.randn(READ_BYTES[device.type] // width // 4096, 4096, device=device)
        weight = weight.to(dtype)
        vector = torch.randn(1, 4096, device=device, dtype=dtype)
        read_s = _median_s(lambda: torch.nn.functional.linear(vector, weight), device)
        size = weight.numel() * width
        left = torch.randn(square, square, device=device).to(dtype)
        multiply_s = _median_s(lambda: left @ left, device)
    return size / read_s, 2.0 * square**3 / multiply_s


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure `Rates` on ``device`` in ``dtype``; takes about four seconds."""
    bandwidth, flops = basic(device, dtype)
    with torch.inference_mode():
        logits = torch.randn(*LOGITS[device.type], device=device)
        sampling_s = _median_s(lambda: _sample(logits), device, 0.1)
    rates = Rates(
        bandwidth_bytes_per_s=bandwidth,
        matmul_flops_per_s=flops,
        sampling_s_per_logit=sampling_s / logits.numel(),
        dtype=str(dtype).removeprefix("torch."),
        asynchronous=device.type != "cpu",
    )
    if rates.asynchronous:
        rates = dataclasses.replace(rates, activation_s=_activation_s(device, dtype))
    return _overheads(rates, device, dtype)


def _activation_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds per element of a kernel that reads and writes each element once.

    For GPUs. Narrow models cannot show it: their kernels end before the next one is launched.
    """
    width = torch.empty(0, dtype=dtype).element_size()
    with torch.inference_mode():
        state = torch.ones(READ_BYTES[device.type] // width, device=device, dtype=dtype)
        return _median_s(lambda: torch.nn.functional.silu(state), device, 0.1) / state.numel()


def _overheads(rates: Rates, device: torch.device, dtype: torch.dtype) -> Rates:
    """Return the rates with the overheads of generation beyond bytes and operations.

    Random models of the smallest useful width, with few and many blocks, generate one and many
    sequences: the differences beyond the roofline are the costs of a block and, on a CPU, of an
    activation. On an asynchronous device, one sequence's kernels are too short to count beside
    their launches, which are then all that a block costs.
    """
    few, many = (_Probe(blocks, device, dtype) for blocks in PROBE_BLOCKS[device.type])

    def beyond(probe: _Probe, batch: int) -> tuple[float, float]:
        first, step = probe.seconds(batch)
        context = PROBE_INPUT + PROBE_STEPS // 2
        known = 0.0 if rates.asynchronous else step_s(probe.shapes, rates, batch, context)
        return first - step, step - known

    generation, one_few = beyond(few, 1)
    _, one_many = beyond(many, 1)
    block = max(0.0, (one_many - one_few) / (many.blocks - few.blocks))
    rates = dataclasses.replace(
        rates,
        block_overhead_s=block,
        step_overhead_s=max(0.0, one_few - few.blocks * block),
        generation_overhead_s=max(0.0, generation),
    )
    if rates.asynchronous:
        return rates
    _, crowd = beyond(many, PROBE_BATCH)
    passed = (PROBE_BATCH - 1) * activations(many.shapes)
    return dataclasses.replace(rates, activation_s=max(0.0, crowd - one_many) / passed)


def _sample(logits: torch.Tensor) -> torch.Tensor:
    """Perform the work of top-k and top-p sampling: a sort, a softmax, a running sum, a draw."""
    kept = torch.topk(logits, 50)[0][..., -1, None]
    filtered = logits.masked_fill(logits < kept, -float("inf"))
    ordered, order = torch.sort(filtered)
    remove = ordered.softmax(-1).cumsum(-1) <= 0.05
    filtered = filtered.masked_fill(remove.scatter(1, order, remove), -float("inf"))
    return torch.multinomial(filtered.softmax(-1), 1)


class _Probe:
    """A random model with ``blocks`` narrow blocks, and its time per token."""

    def __init__(self, blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        self.blocks, self.device = blocks, device
        self.model = tiny_model(blocks, device, dtype, width=PROBE_WIDTH)
        config = self.model.config
        heads = config.num_attention_heads
        shape = {"heads": heads, "kv_heads": heads, "intermediate": config.intermediate_size}
        total = sum(p.numel() for p in self.model.parameters())
        embedding = config.vocab_size * config.hidden_size
        self.shapes = BlocksLeft(
            config.hidden_size, config.vocab_size, config.hidden_size // heads, False, total,
            {"embedding": embedding}, (shape,) * blocks,
        )  # fmt: skip

    def seconds(self, batch: int) -> tuple[float, float]:
        """Return the median seconds to the first token and per further token."""
        generation = force_length(self.model, PROBE_STEPS + 1)
        ids = torch.ones(batch, PROBE_INPUT, dtype=torch.long, device=self.device)
        timed(self.model, ids, generation)
        found = [timed(self.model, ids, generation) for _ in range(3)]
        steps = [(whole - first) / PROBE_STEPS for whole, first in found]
        return statistics.median(first for _, first in found), statistics.median(steps)
