"""The leave-one-out sweep and Taylor against naive implementations, in one run on one model.

    python -m bench.importance                      both models of the project's goals, float32
    python -m bench.importance --dtype bfloat16 --blocks 12 --hidden 768 --save
    python -m bench.importance --dtype bfloat16 --without-bfloat16     as on a CPU that lacks it

(a) removes each block in place and evaluates; (b) builds a smaller model for every block and
copies the weights into it, as the paper's scripts do. All methods take turns on the same rows in
the same run; medians and ratios are compared. FLOPs count blocks, attention and head.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.importance.branches import Batch, make_batch
from core.importance.sweep import sweep
from core.importance.taylor import taylor
from core.model import memory, precision
from core.model.blocks import BlockView

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "importance_bench.md"
SHAPES = ((12, 768), (32, 512))


def build(blocks: int, hidden: int, vocab: int, device: Any, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=hidden,
        intermediate_size=int(hidden * 8 / 3) // 64 * 64,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocab,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval().requires_grad_(False)


def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Return the perplexity computed the obvious way: one batch, stock model, stock logits."""
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(float(loss))


def in_place(model: Any, ids: torch.Tensor) -> list[float]:
    """Score by (a): the same model object without one layer at a time."""
    layers, result = model.model.layers, [perplexity(model, ids)]
    for block in range(len(layers)):
        model.model.layers = nn.ModuleList([x for i, x in enumerate(layers) if i != block])
        model.config.num_hidden_layers = len(layers) - 1
        result.append(perplexity(model, ids))
    model.model.layers = layers
    model.config.num_hidden_layers = len(layers)
    return result


def rebuilt(model: Any, ids: torch.Tensor) -> list[float]:
    """Score by (b): a new, smaller model for every block, with the weights copied into it."""
    count, state = model.config.num_hidden_layers, model.state_dict()
    result = [perplexity(model, ids)]
    for block in range(count):
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = count - 1
        smaller = type(model)(config).to(device=ids.device, dtype=model.dtype).eval()
        weights = {}
        for name, tensor in state.items():
            parts = name.split(".")
            if parts[1] == "layers":
                number = int(parts[2])
                if number == block:
                    continue
                parts[2] = str(number - (number > block))
            weights[".".join(parts)] = tensor
        smaller.load_state_dict(weights)
        result.append(perplexity(smaller, ids))
    return result


def plain_taylor(model: Any, ids: torch.Tensor) -> float:
    """Score by Taylor with a whole-model forward and backward pass; return the sum."""
    model.requires_grad_(True)
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    total = 0.0
    for name, weight in model.named_parameters():
        if ".layers." in name:
            total += float((weight.detach() * weight.grad).abs().float().sum())
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return total


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]
"""The clock of all measurements; ``--clock cpu`` sets it."""


def timed(function: Callable[[], Any], device: Any) -> tuple[float, Any]:
    began = clock()
    value = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began, value


def matmul_rate(device: Any, dtype: torch.dtype, size: int = 1536) -> float:
    """Return the machine's rate in operations per second: the best of ten square matmuls."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = [timed(lambda: a @ a, device)[0] for _ in range(10)]
    return 2 * size**3 / min(times)


def flops(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Return the operations of one block pass and of one head pass over all rows."""
    rows, tokens = ids.shape
    config = model.config
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    attention = 2.0 * rows * tokens * tokens * config.hidden_size
    head = 2.0 * config.vocab_size * config.hidden_size * rows * (tokens - 1)
    return 2.0 * block * rows * tokens + attention, head


def peak(arguments: argparse.Namespace, blocks: int, hidden: int, way: str) -> float:
    """Return the peak MiB above the loaded model, in a new process so that nothing is reused."""
    command = [sys.executable, "-m", "bench.importance", "--peak", way]
    for name in ("vocab", "samples", "length", "dtype", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--blocks", str(blocks), "--hidden", str(hidden)]
    command += ["--without-bfloat16"] * arguments.without_bfloat16
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def prepared(arguments: argparse.Namespace, blocks: int, hidden: int) -> dict[str, Any]:
    """Return the model, the rows, and every way of scoring them."""
    device = precision.resolve_device(arguments.device)
    dtype = precision.DTYPES[arguments.dtype]
    model = build(blocks, hidden, arguments.vocab, device, dtype)
    generator = torch.Generator().manual_seed(1)
    size = (arguments.samples, arguments.length)
    ids = torch.randint(0, arguments.vocab, size, generator=generator).to(device)
    view = BlockView(model)
    batch: Batch = make_batch(ids.tolist(), view)
    ways = {
        "sweep": lambda: sweep(view, batch),
        "in place": lambda: in_place(model, ids),
        "rebuilt": lambda: rebuilt(model, ids),
        "taylor": lambda: taylor(view, batch),
        "plain taylor": lambda: plain_taylor(model, ids),
    }
    return {"device": device, "dtype": dtype, "model": model, "ids": ids, "ways": ways}


def only_peak(arguments: argparse.Namespace) -> None:
    ready = prepared(arguments, arguments.blocks, arguments.hidden)
    memory.reset_peak_memory(ready["device"])
    start = memory.peak_memory_mib(ready["device"]) if ready["device"].type == "cuda" else 0.0
    ready["ways"][arguments.peak]()
    print(memory.peak_memory_mib(ready["device"]) - start)


def measure(arguments: argparse.Namespace, blocks: int, hidden: int) -> list[str]:
    ready = prepared(arguments, blocks, hidden)
    device, dtype, model, ids = (ready[k] for k in ("device", "dtype", "model", "ids"))
    ways = ready["ways"]
    times: dict[str, list[float]] = {name: [] for name in ways}
    rates, values = [], {}
    ways["sweep"]()
    for _ in range(arguments.repeat):
        rates.append(matmul_rate(device, precision.arithmetic_of(dtype, device)))
        for name, way in ways.items():
            seconds, values[name] = timed(way, device)
            times[name].append(seconds)
    median = {name: statistics.median(found) for name, found in times.items()}
    one, head = flops(model, ids)
    ours = blocks * (blocks + 1) / 2 * one + (blocks + 1) * head
    naive = (blocks * (blocks - 1) + blocks) * one + (blocks + 1) * head
    difference = max(
        abs(x / y - 1)
        for x, y in zip(
            [values["sweep"].dense_ppl, *values["sweep"].ppl], values["in place"], strict=True
        )
    )
    share = ours / median["sweep"] / statistics.median(rates)
    ratio_a = median["in place"] / median["sweep"]
    memory = [peak(arguments, blocks, hidden, way) for way in ("taylor", "plain taylor")]
    return [
        f"| {blocks} x {hidden} | {arguments.dtype} | {naive / ours:.2f} | {ratio_a:.2f} "
        f"| {100 * ratio_a / (naive / ours):.0f} % | {median['rebuilt'] / median['sweep']:.2f} "
        f"| {100 * share:.0f} % | {median['taylor'] / median['plain taylor']:.2f} "
        f"| {memory[0]:.0f} / {memory[1]:.0f} | {difference:.1e} |"
    ]


HEAD = [
    "| model | dtype | FLOPs (a)/sweep | time (a)/sweep | share of the FLOP ratio "
    "| time (b)/sweep | share of matmul rate | time Taylor/plain "
    "| peak MiB Taylor/plain | largest difference to (a) |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=tuple(precision.DTYPES), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: this process's own CPU seconds, for one thread on a busy machine",
    )
    parser.add_argument(
        "--without-bfloat16",
        action="store_true",
        help="limit oneDNN to AVX2, as on a CPU without bfloat16 instructions",
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=f"append to {RESULT.name}")
    arguments = parser.parse_args()
    global clock
    clock = CLOCKS[arguments.clock]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.without_bfloat16:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # read at the first matmul
        precision.cpu_has_bfloat16 = lambda: False
    if arguments.peak:
        only_peak(arguments)
        return
    shapes: tuple[tuple[int, int], ...] = SHAPES
    if arguments.blocks and arguments.hidden:
        shapes = ((arguments.blocks, arguments.hidden),)
    print("\n".join(HEAD), flush=True)
    rows = []
    for shape in shapes:
        rows += measure(arguments, *shape)
        print(rows[-1], flush=True)
    device = precision.resolve_device(arguments.device)
    one = len(shapes) == 1
    shape = f" --blocks {shapes[0][0]} --hidden {shapes[0][1]}" if one else ""
    threads = f" --threads {arguments.threads}" if arguments.threads else ""
    native = "with" if precision.cpu_has_bfloat16() else "without"
    held = " --without-bfloat16" if arguments.without_bfloat16 else ""
    about = (
        f"`python -m bench.importance --dtype {arguments.dtype} --repeat {arguments.repeat} "
        f"--clock {arguments.clock}{threads}{held}{shape}` on {device} ({native} bfloat16 "
        f"instructions), threads: {torch.get_num_threads()}, torch {torch.__version__}: "
        f"{arguments.samples} x {arguments.length} random tokens, random weights, vocabulary "
        f"{arguments.vocab}, medians of {arguments.repeat} turns."
    )
    text = "\n".join([about, "", *HEAD, *rows, ""])
    print("\n" + about)
    if arguments.save:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        old = RESULT.read_text() if RESULT.exists() else "# Importance: measured\n"
        RESULT.write_text(old + "\n" + text)


if __name__ == "__main__":
    main()
