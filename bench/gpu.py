"""One GPU in six minutes: scores and training of a LLaMA-7B, and the paper's curves.

    make bench-gpu            or: python -m bench.gpu [--out DIR] [--minutes 5.25] [--tiny]

First come the figures of `bench.gpu_compute`: leave-one-out of all blocks against a naive loop and
against building a model for each block, Taylor, all pairs, LoRA beside plain peft, KL with a kept
teacher, and cutting. Then generation by dense, depth-pruned and width-pruned shapes:
random weights in bfloat16 (latency and memory do not depend on their values), prompt of 12 tokens,
forced output of 128, top-k 50 and top-p 0.95, batches 1 to 64 (Shortened LLaMA, arXiv 2402.02834),
and at batch 1 with compiled steps too. `PLAN` has the stages with their shares of the time. Within
a stage every variant is built on each visit, the second time in reversed order, one in memory at a
time; running out of memory ends a variant's batches.
A stage gets its share of the time that is left, and divides it among its points; a point that would
not fit is skipped, and `GRACE_S` after ``--minutes`` the script ends wherever it is. Writes
bench-gpu.json and bench-gpu.md after every point, with what was skipped and how many runs each
point got.
Needs torch, transformers, safetensors and the standard library.
``--tiny`` is a self-test of the script on any device.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import gpu_compute
from bench.gpu_report import MEMORY, TIME, Report
from core.benchmark import analytic, generate, meter, protocol, rates
from core.benchmark.meter import MemoryMeter
from core.benchmark.protocol import Cell, CellResult
from core.benchmark.utilisation import UtilisationSampler
from core.errors import OutOfMemoryError
from core.model.memory import free_memory, out_of_memory_explained
from core.model.precision import dtype_name, resolve_device

INPUT_TOKENS = 12
GRACE_S = 15.0
"""Seconds that a generation in progress may continue after the time limit."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A variant: this number of heads and neurons in every block, or in blocks first to last."""

    name: str
    method: str
    blocks: int
    narrow_heads: int = 0
    narrow_neurons: int = 0
    first: int = 0
    last: int = -1
    spread: tuple[int, int] = (0, 0)
    """Heads and neurons by which every third block has fewer, and the next more, as with FLAP."""
    biases: bool = False
    """Whether narrower output projections have biases, as with FLAP."""

    def kept(self, block: int) -> tuple[int, int] | None:
        """Return the heads and neurons of a narrower block, None if it is whole."""
        if not self.narrow_heads or not self.first <= block <= self.last:
            return None
        step = block % 3 - 1
        return (
            self.narrow_heads + step * self.spread[0],
            self.narrow_neurons + step * self.spread[1],
        )


COMPILED = " (compiled)"
"""Ends the name of a variant whose steps are compiled: a series of its own."""
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}
# Depth: the authors' 6, 9 and 11 blocks. Width: METHODS section 2 (LLM-Pruner 0.25 on blocks
# 4..29, Wanda-sp 20 % of every block), the closest in parameters to six blocks.
VARIANTS = (
    Shape("dense", "dense", 32),
    Shape("depth-6", "depth", 26),
    Shape("depth-11", "depth", 21),
    Shape("width-llm-pruner", "width", 32, 24, 8256, 4, 29),
    Shape("width-wanda-sp", "width", 32, 26, 8807, 0, 31),
    # the sizes of Wanda-sp, but other ones in each block, and biases: how far apart is assumed
    Shape("width-flap", "width", 32, 26, 8807, 0, 31, (4, 1376), True),
)
TINY_VARIANTS = (
    Shape("dense", "dense", 6),
    Shape("depth-2", "depth", 4),
    Shape("width", "width", 6, 4, 60, 1, 4, (1, 8), True),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Part of the plan: these variants at these batches, on each visit."""

    title: str
    variants: tuple[str, ...]
    batches: tuple[int, ...]
    visits: int = 2
    runs: int = 1
    warmup: int = 1
    compiled: bool = False
    """Whether steps are compiled, with a static cache; warming up takes `COMPILE_S` more."""

    @property
    def generations(self) -> int:
        """Number of generations, with warm-up."""
        return len(self.variants) * len(self.batches) * self.visits * (self.runs + self.warmup)

    @property
    def seconds(self) -> float:
        """Estimated seconds of the whole stage on an H100, which is also its share of the time."""
        blocks = sum(v.blocks for v in VARIANTS if v.name in self.variants)
        batches = sum(1 + batch / BATCH_THAT_DOUBLES for batch in self.batches)
        passes = self.visits * (self.runs + self.warmup) * batches
        each = BUILD_S + (COMPILE_S if self.compiled else 0.0)
        building = each * len(self.variants) * self.visits
        return building + OUTPUT_TOKENS * BLOCK_S * blocks * passes


OUTPUT_TOKENS = 128
BLOCK_S, BATCH_THAT_DOUBLES, BUILD_S = 0.7e-3, 300, 2.0
"""For the estimates: seconds per block and token at batch 1, where launching kernels takes most of
the time; the batch at which that doubles; and seconds to build a variant. Assumed, not measured."""
COMPILE_S = 12.0
"""Seconds to compile a model's steps. Assumed, not measured."""
DEPTH = ("dense", "depth-6", "depth-11")
WIDTH = ("width-llm-pruner", "width-wanda-sp", "width-flap")
PLAN = (
    Stage("Latency at batch 1, dense and depth", DEPTH, (1,), runs=2),
    Stage("Width at batch 1", WIDTH, (1,), visits=1),
    Stage("Latency at batch 1, compiled", ("dense", "depth-6"), (1,), visits=1, compiled=True),
    Stage("Throughput, dense and depth", DEPTH, (16, 64), visits=1),
    Stage("Throughput, width", WIDTH, (16, 64), visits=1, warmup=0),
)
RATES_S = 10.0
"""For the device's rates, at both ends."""
COMPUTE_S = 110.0
"""For the figures of `bench.gpu_compute`."""
TINY_PLAN = (
    Stage("Latency at batch 1, dense and depth", ("dense", "depth-2"), (1,), runs=2),
    Stage("Throughput, dense and depth", ("dense", "depth-2"), (4,), runs=2),
    Stage("Width at the same batches", ("width",), (1, 4), runs=2),
)


def plan_text(stages: tuple[Stage, ...], minutes: float) -> str:
    """Return the stages with their estimated times, and what they add up to."""
    lines = [
        f"{number}. {stage.title}: {', '.join(stage.variants)}; batch "
        f"{', '.join(map(str, stage.batches))}; {stage.generations} generations, about "
        f"{stage.seconds:.0f} s"
        for number, stage in enumerate(stages, 1)
    ]
    total = sum(stage.seconds for stage in stages) + RATES_S
    total += COMPUTE_S
    lines.append(
        f"With {RATES_S:.0f} s for the device's rates and {COMPUTE_S:.0f} s for scores and "
        f"training: {total:.0f} of {60 * minutes:.0f} s"
    )
    return "\n".join(lines)


def narrow(block: Any, kept: tuple[int, int], hidden: int, biases: bool) -> None:
    """Give one block fewer heads and neurons, with new random weights of those shapes."""
    attention, mlp = block.self_attn, block.mlp
    width, neurons = kept[0] * attention.head_dim, kept[1]

    def linear(inputs: int, outputs: int, bias: bool = False) -> torch.nn.Linear:
        return torch.nn.Linear(inputs, outputs, bias=bias)

    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, linear(hidden, width))
    attention.o_proj = linear(width, hidden, biases)
    mlp.gate_proj = linear(hidden, neurons)
    mlp.up_proj = linear(hidden, neurons)
    mlp.down_proj = linear(neurons, hidden, biases)


def build(shape: Shape, sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    """Return the variant with random weights on ``device``; blocks are built one by one.

    Raises `OutOfMemoryError` if they do not fit.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(**{**sizes, "num_hidden_layers": 0})
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.manual_seed(1234)
    try:
        torch.set_default_dtype(dtype)
        with out_of_memory_explained("making random weights"), device:
            model = LlamaForCausalLM(config)
            config.num_hidden_layers = shape.blocks
            for index in range(shape.blocks):
                block = LlamaDecoderLayer(config, index)
                if kept := shape.kept(index):
                    narrow(block, kept, config.hidden_size, shape.biases)
                model.model.layers.append(block)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def shapes_of(shape: Shape, sizes: dict[str, int]) -> analytic.BlocksLeft:
    """Return a variant's shapes for the analytic model."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    head_dim = hidden // heads
    dense = {"heads": heads, "kv_heads": heads, "intermediate": sizes["intermediate_size"]}
    found = [shape.kept(index) for index in range(shape.blocks)]
    blocks = tuple(
        dense if kept is None else {"heads": kept[0], "kv_heads": kept[0], "intermediate": kept[1]}
        for kept in found
    )
    within = sum(hidden * (4 * b["heads"] * head_dim + 3 * b["intermediate"] + 2) for b in blocks)
    within += 2 * hidden * sum(kept is not None for kept in found) * shape.biases
    table = sizes["vocab_size"] * hidden
    parts = {"embedding": table, "blocks": within, "norm": hidden, "head": table}
    return analytic.BlocksLeft(
        hidden, sizes["vocab_size"], head_dim, False, sum(parts.values()), parts, blocks
    )


def measure(
    model: Any, cell: Cell, visit: int, meter: MemoryMeter, limit_s: float, runs: int,
    warmup: int, compiled: bool = False,
) -> CellResult:  # fmt: skip
    """Warm up and time one point, each at least once; stop early once ``limit_s`` has passed."""
    device = meter.device
    ids = torch.tensor([generate.prompt_ids(None, model.config.vocab_size, INPUT_TOKENS)])
    config = generate.force_length(model, cell.output_tokens, compiled=compiled)
    began = time.perf_counter()
    times: list[tuple[float, float]] = []
    sampler = UtilisationSampler(device)
    try:
        with out_of_memory_explained("generating"):
            ids = ids.to(device).repeat(cell.batch_size, 1)
            for _ in range(warmup):
                generate.timed(model, ids, config)
                if time.perf_counter() - began > limit_s / 3:
                    break
            meter.reset()
            sampler.start()
            while len(times) < runs and (not times or time.perf_counter() - began < limit_s):
                times.append(generate.timed(model, ids, config))
    except OutOfMemoryError:
        return CellResult(cell, visit, oom=True)
    finally:
        sampler.stop()
    peaks = meter.read()
    return CellResult(
        cell,
        visit,
        tuple(t for t, _ in times),
        tuple(f for _, f in times),
        peaks.allocated_mib,
        peaks.reserved_mib,
        peaks.process_mib,
        tuple(sampler.samples),
    )


class Bench:
    """Measures every variant on each visit, in alternating order, until ``end`` (monotonic)."""

    def __init__(
        self,
        report: Report,
        grid: list[Cell],
        device: torch.device,
        end: float,
        runs: int,
        warmup: int,
        visits: int = 2,
        compiled: bool = False,
    ) -> None:
        """Prepare to measure into ``report``."""
        self.compiled = compiled
        self.report, self.grid, self.device, self.end = report, grid, device, end
        self.runs, self.warmup, self.visits = runs, warmup, visits
        self.left = 0

    def run(self, variants: tuple[Shape, ...], sizes: dict[str, int], dtype: torch.dtype) -> None:
        """Visit all variants."""
        by_name = {v.name: v for v in variants}
        order = protocol.visit_order(list(by_name), self.visits)
        self.left = len(order) * len(self.grid)
        generate.import_and_settle(self.device)
        for visit, name in order:
            self.visit(visit, by_name[name], sizes, dtype)

    def visit(self, visit: int, shape: Shape, sizes: dict[str, int], dtype: torch.dtype) -> None:
        """Build one variant and measure its points, small batches first."""
        if self.report.full(shape.name, self.grid[0]) or time.monotonic() >= self.end:
            for cell in self.grid:
                self.point(visit, shape.name, cell, None, None)
            return
        meter = MemoryMeter(self.device)
        model = None
        try:
            model = build(shape, sizes, self.device, dtype)
            self.report.parameters[shape.name] = sum(p.numel() for p in model.parameters())
        except OutOfMemoryError:
            print(f"{shape.name}: the weights alone do not fit", flush=True)
            self.report.take(shape.name, CellResult(self.grid[0], visit, oom=True))
        free_memory(self.device)
        for cell in self.grid:
            self.point(visit, shape.name, cell, model, meter)
        del model
        free_memory(self.device)

    def point(
        self, visit: int, name: str, cell: Cell, model: Any, meter: MemoryMeter | None
    ) -> None:
        """Measure one point within its share of the remaining time, or record why not."""
        remaining = self.end - time.monotonic()
        share, self.left = remaining / self.left, self.left - 1
        if self.report.full(name, cell):
            return self.report.skip(name, visit, cell, MEMORY)
        if meter is None or remaining < (self.report.expected_s(name, cell) or 0.0):
            return self.report.skip(name, visit, cell, TIME)
        result = measure(model, cell, visit, meter, share, self.runs, self.warmup, self.compiled)
        if result.oom:
            free_memory(self.device)
        self.report.take(name, result)
        state = "out of memory" if result.oom else f"{len(result.latencies_s)} runs"
        print(f"{name} visit {visit + 1}, batch {cell.batch_size}: {state}", flush=True)
        return None


def carry_out(
    stages: tuple[Stage, ...],
    report: Report,
    variants: tuple[Shape, ...],
    sizes: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    end: float,
) -> None:
    """Carry out the stages, each within its share of the time left, and print their figures.

    What a stage leaves of its share goes to those after it. The device's rates, which the estimates
    need, are measured first and last, because the speed of a host drifts; their mean counts.
    """
    generate.import_and_settle(device)
    report.rates = rates.measure(device, dtype)
    compute(report, variants[0], sizes, device, dtype, end)
    for number, stage in enumerate(stages):
        now = time.monotonic()
        ahead = sum(later.seconds for later in stages[number:]) + RATES_S
        until = now + max(0.0, end - now) * stage.seconds / ahead
        grid = protocol.cells(stage.batches, (tokens,))
        end_of_name = COMPILED if stage.compiled else ""
        chosen = tuple(
            dataclasses.replace(v, name=v.name + end_of_name)
            for v in variants
            if v.name in stage.variants
        )
        more = (stage.runs, stage.warmup, stage.visits, stage.compiled)
        Bench(report, grid, device, until, *more).run(chosen, sizes, dtype)
        names = tuple(v.name for v in chosen)
        print("\n".join([stage.title, *report.headlines(grid, names), ""]), flush=True)
    if time.monotonic() < end:
        report.rates = analytic.mean_rates([report.rates, rates.measure(device, dtype)])


def compute(
    report: Report,
    dense: Shape,
    sizes: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    end: float,
) -> None:
    """Measure the figures of `bench.gpu_compute`, within their share of the time left."""
    assert report.rates is not None
    now = time.monotonic()
    whole = sum(stage.seconds for stage in PLAN) + RATES_S + COMPUTE_S
    until = now + max(0.0, end - now) * COMPUTE_S / whole

    def made(blocks: int) -> Any:
        return build(dataclasses.replace(dense, blocks=blocks), sizes, device, dtype)

    how = gpu_compute.TINY if sizes is TINY else gpu_compute.Sizes()
    gpu_compute.Compute(made, dense.blocks, device, how, report.rates, until, report.compute).run()


def give_up(report: Report) -> None:
    """End the process immediately, after saving what was measured."""
    report.state = "ended by its time limit"
    report.save()
    print(f"Time limit reached. Results so far are in {report.folder}.", flush=True)
    os._exit(0)


def about(
    device: torch.device, dtype: torch.dtype, grid: list[Cell], sizes: dict[str, int]
) -> dict[str, Any]:
    """Return the conditions of all measurements."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else device.type,
        "capacity_mib": meter.capacity_mib(device) if cuda else None,
        "dtype": dtype_name(dtype),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "input_tokens": INPUT_TOKENS,
        "output_tokens": grid[0].output_tokens,
        "sampling": {"top_k": protocol.TOP_K, "top_p": protocol.TOP_P},
        "sizes": sizes,
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser for the script's options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--out", default="workspace/bench-gpu")
    made.add_argument("--minutes", type=float, default=5.25)
    made.add_argument("--device", default="auto")
    made.add_argument("--tiny", action="store_true")
    return made


def main() -> None:
    """Measure, writing the results after every point."""
    asked = parser().parse_args()
    end = time.monotonic() + 60 * asked.minutes
    device = resolve_device(asked.device)
    if device.type == "cpu" and not asked.tiny:
        parser().error("this needs a CUDA device; --tiny tests the script on any")
    variants = TINY_VARIANTS if asked.tiny else VARIANTS
    sizes = TINY if asked.tiny else LLAMA_7B
    stages = TINY_PLAN if asked.tiny else PLAN
    tokens = 8 if asked.tiny else OUTPUT_TOKENS
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    known = about(device, dtype, protocol.cells((1,), (tokens,)), sizes) | {
        "variants": [dataclasses.asdict(v) for v in variants],
        "plan": [dataclasses.asdict(stage) for stage in stages],
    }
    print(plan_text(stages, asked.minutes), flush=True)
    shapes = {v.name: shapes_of(v, sizes) for v in variants}
    both = {name for stage in stages if stage.compiled for name in stage.variants}
    shapes |= {name + COMPILED: shapes[name] for name in shapes if name in both}
    report = Report(Path(asked.out), known, shapes)
    watchdog = threading.Timer(end + GRACE_S - time.monotonic(), give_up, [report])
    watchdog.daemon = True
    watchdog.start()
    try:
        carry_out(stages, report, variants, sizes, device, dtype, tokens, end)
        short = any(s["why"] == TIME for s in report.skipped)
        report.state = "ended by its time limit" if short else "complete"
    except BaseException as error:
        report.state = f"ended by {type(error).__name__}"
        raise
    finally:
        watchdog.cancel()
        report.save()
    print(report.text())


if __name__ == "__main__":
    main()
