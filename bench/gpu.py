"""The paper's curves on one GPU: dense, depth-pruned and width-pruned LLaMA-7B shapes.

    make bench-gpu            or: python -m bench.gpu [--out DIR] [--minutes 7.5] [--tiny]

Random weights in bfloat16 (latency and memory do not depend on their values), prompt of 12 tokens,
forced output of 128, top-k 50 and top-p 0.95, batches 1 to 256 (Shortened LLaMA, arXiv 2402.02834).
Every variant is built twice, in reversed order, one alive at a time; out of memory ends its
batches.
The time left is shared out over what is still to do; how many runs each point got is in the result.
Needs torch, transformers and the standard library. Writes bench-gpu.json and bench-gpu.md.
``--tiny`` is a self-test of the script on any device.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from core.benchmark import generate, protocol
from core.benchmark.memory import MemoryMeter
from core.benchmark.protocol import Cell, CellResult
from core.benchmark.utilisation import UtilisationSampler
from core.errors import OutOfMemoryError
from core.model import out_of_memory_explained, resolve_device


@dataclasses.dataclass(frozen=True)
class Shape:
    """A variant: every block with these many heads and neurons, or only blocks first to last."""

    name: str
    method: str
    blocks: int
    narrow_heads: int = 0
    narrow_neurons: int = 0
    first: int = 0
    last: int = -1


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
# 4..29, Wanda-sp 20 % of every block), the nearest in parameters to six blocks.
VARIANTS = (
    Shape("dense", "dense", 32),
    Shape("depth-6", "depth", 26),
    Shape("depth-11", "depth", 21),
    Shape("width-llm-pruner", "width", 32, 24, 8256, 4, 29),
    Shape("width-wanda-sp", "width", 32, 26, 8807, 0, 31),
)
TINY_VARIANTS = (
    Shape("dense", "dense", 6),
    Shape("depth-2", "depth", 4),
    Shape("width", "width", 6, 4, 60, 1, 4),
)


def narrow(block: Any, shape: Shape, hidden: int) -> None:
    """Give one block fewer heads and neurons, with new random weights of those shapes."""
    attention, mlp = block.self_attn, block.mlp
    width = shape.narrow_heads * attention.head_dim

    def linear(inputs: int, outputs: int) -> torch.nn.Linear:
        return torch.nn.Linear(inputs, outputs, bias=False)

    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, linear(hidden, width))
    attention.o_proj = linear(width, hidden)
    mlp.gate_proj = linear(hidden, shape.narrow_neurons)
    mlp.up_proj = linear(hidden, shape.narrow_neurons)
    mlp.down_proj = linear(shape.narrow_neurons, hidden)


def build(shape: Shape, sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    """Return the variant with random weights on ``device``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**sizes, "num_hidden_layers": shape.blocks})
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.manual_seed(1234)
    try:
        torch.set_default_dtype(dtype)
        with device:
            model = LlamaForCausalLM(config)
            if shape.narrow_heads:
                for block in model.model.layers[shape.first : shape.last + 1]:
                    narrow(block, shape, config.hidden_size)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def measure(
    model: Any, cell: Cell, visit: int, meter: MemoryMeter, limit_s: float, runs: int, warmup: int
) -> CellResult:
    """Warm up and time one point; stops early when ``limit_s`` is spent."""
    device = meter.device
    vocab = model.config.vocab_size
    ids = torch.tensor([generate.prompt_ids(None, vocab, 12)], device=device)
    ids = ids.repeat(cell.batch_size, 1)
    config = generate.force_length(model, cell.output_tokens)
    began = time.perf_counter()
    try:
        with out_of_memory_explained("generating"):
            for _ in range(warmup):
                generate.timed(model, ids, config)
                if time.perf_counter() - began > limit_s / 3:
                    break
            meter.reset()
            sampler = UtilisationSampler(device)
            sampler.start()
            times: list[tuple[float, float]] = []
            try:
                while len(times) < runs and (not times or time.perf_counter() - began < limit_s):
                    times.append(generate.timed(model, ids, config))
            finally:
                sampler.stop()
    except OutOfMemoryError:
        free(device)
        return CellResult(cell, visit, oom=True)
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


def free(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def collect(
    variants: tuple[Shape, ...],
    sizes: dict[str, int],
    grid: list[Cell],
    device: torch.device,
    dtype: torch.dtype,
    end: float,
    runs: int,
    warmup: int,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int], list[str]]:
    """Measure everything twice in reversed order before ``end`` (of `time.monotonic`)."""
    by_name = {v.name: v for v in variants}
    order = protocol.visit_order(list(by_name), 2)
    results: dict[str, dict[Cell, list[CellResult]]] = {name: {} for name in by_name}
    parameters: dict[str, int] = {}
    left = len(order) * len(grid)
    generate.import_and_settle(device)
    for visit, name in order:
        meter = MemoryMeter(device)
        model = build(by_name[name], sizes, device, dtype)
        parameters[name] = sum(p.numel() for p in model.parameters())
        for cell in grid:
            share = (end - time.monotonic()) / max(1, left)
            left -= 1
            done = results[name].setdefault(cell, [])
            full = any(r.oom for rs in results[name].values() for r in rs)
            if full or (visit and share < 0.2):
                continue
            done.append(measure(model, cell, visit, meter, share, runs, warmup))
            state = "out of memory" if done[-1].oom else f"{len(done[-1].latencies_s)} runs"
            print(f"{name} visit {visit + 1}, batch {cell.batch_size}: {state}", flush=True)
        del model
        free(device)
    rows = {
        name: [protocol.point(name, 12, rs, {}) for rs in cells.values() if rs]
        for name, cells in results.items()
    }
    return rows, parameters, [name for _, name in order]


def table(rows: dict[str, list[dict[str, Any]]], parameters: dict[str, int]) -> str:
    """Return the Markdown table: each point with its speed-up over dense at the same batch."""
    dense = {
        (p["batch_size"], p["output_tokens"]): p["latency_s_mean"]
        for p in next(iter(rows.values()))
    }
    lines = [
        "| variant | parameters | batch | latency s | std | first token s | tokens/s "
        "| speed-up | peak MiB | GPU % | runs |",
        "| --- | " + " | ".join(["---:"] * 10) + " |",
    ]
    for name, points in rows.items():
        for p in points:
            start = f"| {name} | {parameters[name]:,} | {p['batch_size']} |"
            if p["oom"]:
                lines.append(start + " out of memory | | | | | | | |")
                continue
            base = dense.get((p["batch_size"], p["output_tokens"]))
            gain = f"{base / p['latency_s_mean']:.2f} x" if base else "-"
            busy = "-" if p["utilisation_pct"] is None else f"{p['utilisation_pct']:.0f}"
            spread = p["latency_s_std"]
            lines.append(
                f"{start} {p['latency_s_mean']:.3f} | "
                f"{'-' if spread is None else f'{spread:.3f}'} | {p['first_token_s']:.4f} | "
                f"{p['tokens_per_s']:.0f} | {gain} | {p['peak_memory_mib']:.0f} | {busy} | "
                f"{p['runs']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="workspace/bench-gpu")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    began = time.monotonic()
    device = resolve_device(asked.device)
    if device.type == "cpu" and not asked.tiny:
        parser.error("this needs a CUDA device; --tiny tests the script on any")
    variants = TINY_VARIANTS if asked.tiny else VARIANTS
    sizes = TINY if asked.tiny else LLAMA_7B
    batches = (1, 4) if asked.tiny else (1, 8, 16, 32, 64, 128, 256)
    grid = protocol.cells(batches, (8,) if asked.tiny else (128,))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    end = began + 60 * (0.5 if asked.tiny else asked.minutes)
    runs, warmup = (2, 1) if asked.tiny else (10, 5)
    rows, parameters, order = collect(variants, sizes, grid, device, dtype, end, runs, warmup)
    points = [p for group in rows.values() for p in group]
    folder = Path(asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result = {
        "schema": 1,
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "sizes": sizes,
        "variants": [dataclasses.asdict(v) for v in variants],
        "parameters": parameters,
        "order": order,
        "seconds": round(time.monotonic() - began, 1),
        "median_runs": statistics.median(p["runs"] for p in points),
        "points": points,
    }
    (folder / "bench-gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    head = (
        f"{name}, {result['dtype']}, random weights, 12 tokens in, "
        f"{grid[0].output_tokens} out, torch {torch.__version__}.\n\n"
    )
    (folder / "bench-gpu.md").write_text(head + table(rows, parameters))
    print(head + table(rows, parameters))


if __name__ == "__main__":
    main()
