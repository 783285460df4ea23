"""Tokens per second and memory of each way to train, next to plain peft and to the limit.

    python -m bench.training PRUNED --data SOURCE [--threads 2] [--tokens 256] [--rows 4] [--save]

One micro-batch, forward, backward and a step of AdamW, in a process for each way, in turns. Plain
peft is the model of transformers with its own loss over all tokens. The limit is what the matrix
products alone would take at the speed of the machine's own: 4 operations for every parameter and
token with LoRA, 6 if all weights train. ``--only`` chooses ways. ``rows`` and ``packed`` take a
step of the same `SHORT` rows as they come, in micro-batches of similar length, and packed into
sequences: the same loss from fewer padded tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import locate
from core.model.loading import load_model, load_tokenizer
from core.model.memory import peak_memory_mib, reset_peak_memory
from core.model.precision import decide, dtype_name
from core.quantize import plan as quantize_plan
from core.retrain import batches, fused, loss, partial, rows, states, weights
from core.retrain.encoders import ModelTokenizer, config_eos
from core.retrain.spec import RetrainSpec, base_bits
from core.retrain.trainer import Objective, with_kept
from core.runs.progress import SILENT

RESULT = Path(__file__).parents[1] / "docs" / "results" / "training_bench.md"
DEVICE = torch.device("cpu")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft": ("plain peft", {"dtype": "float32"}),
    "peft-half": ("plain peft", {"dtype": "bfloat16"}),
    "lora-wide": ("LoRA", {"dtype": "float32"}),
    "lora": ("LoRA", {}),
    "lora-dry": ("LoRA without dropout", {"dropout": 0.0}),
    "lora-int8": ("LoRA on an int8 base", {"quantized_base": "int8"}),
    "lora-int4": ("LoRA on an int4 base", {"quantized_base": "int4"}),
    "full": ("all weights", {"method": "full"}),
    "partial": ("partial, last 3, first epoch", {"method": "partial"}),
    "partial-kept": ("partial, last 3, later epochs", {"method": "partial"}),
    "rows": ("LoRA, rows as they come", {"layout": "grouped"}),
    "packed": ("LoRA, the same rows packed", {"layout": "packed"}),
}
SHORT = 64
"""Rows of a step of the ways ``rows`` and ``packed``."""


def one(asked: argparse.Namespace) -> None:
    """Time one way in this process and print its figures as JSON."""
    torch.set_num_threads(asked.threads)
    given = {"checkpoint": asked.pruned, "data": asked.data, "out": "none", "format": "text"}
    spec = RetrainSpec(**{**given, "cutoff": asked.tokens, **WAYS[asked.way][1]})
    opened = locate.open(asked.pruned)
    info = opened.info
    encoder = ModelTokenizer(load_tokenizer(opened.folder), config_eos(opened.folder))
    found = rows.prepare(spec, encoder, vocab=info.vocab, context=info.context, most=200)
    made = sorted(found.train, key=lambda row: -len(row.ids))[: asked.rows]
    lora = spec.method == "lora"
    precision = decide(spec.dtype, DEVICE, info.dtype, "adapters" if lora else "training")
    reset_peak_memory(DEVICE)
    model = load_model(opened.folder, DEVICE, precision.weights)
    if bits := base_bits(spec):
        weights.quantize_base(model, quantize_plan.make(info, bits, None))
    torch.manual_seed(1)
    blocks = partial.blocks_of(spec, info.blocks, opened.folder)
    if lora:
        model = weights.with_adapters(model, spec)
    elif spec.method == "partial":
        weights.train_part(model, blocks)
    else:
        model.requires_grad_(True)
    plain = asked.way.startswith("peft")
    if not plain:
        fused.install(model)
    parts = [[(row,) for row in made]]
    if asked.way in ("rows", "packed"):
        made = found.train[:SHORT]
        parts = _short(made, spec, asked.rows)
    with tempfile.TemporaryDirectory() as place:
        below = None
        if asked.way.endswith("kept"):
            how = DEVICE, precision.compute
            below = states.write(Path(place) / "key", model, made, blocks[0], 0, how, SILENT)
        items = {"items": sum(row.items for row in made)}
        micro_batches = [with_kept(packs, None, below) | items for packs in parts]
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, 1e-4, fused=True)
    objective = Objective(DEVICE, precision.compute)

    def step() -> float:
        total = 0.0
        for batch in micro_batches:
            if plain:
                with loss.autocast(DEVICE, precision.compute):
                    ids, labels = batch["input_ids"], batch["labels"]
                    value = model(input_ids=ids, labels=labels, use_cache=False).loss
            else:
                value = objective(model, batch)[0]
            value.backward()
            total += float(value.detach())
        optimiser.step()
        optimiser.zero_grad()
        return total

    first = step()
    seconds = []
    for _ in range(asked.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    print(
        json.dumps(
            {
                "seconds": statistics.median(seconds),
                "tokens": sum(len(row.ids) for row in made),
                "peak_mib": peak_memory_mib(DEVICE),
                "loss": first,
                "computed": dtype_name(precision.arithmetic),
                "trained": sum(weight.numel() for weight in trained),
            }
        )
    )


def _short(made: list[rows.Row], spec: RetrainSpec, at_once: int) -> list[list[batches.Pack]]:
    """Return the micro-batches of one step: ``at_once`` sequences, or rows of as many tokens."""
    packs = batches.sequences(made, str(spec.layout), spec.cutoff, spec.seed)
    lengths = [batches.length(pack) for pack in packs]
    tokens = at_once * spec.cutoff
    parts = -(-sum(lengths) // tokens) if spec.layout == "grouped" else -(-len(packs) // at_once)
    plan = batches.StepPlan(lengths, len(packs), parts, spec.seed)
    return [[packs[i] for i in some] for some in plan.step(0)]


def products(dtype: torch.dtype, threads: int) -> float:
    """Return the operations per second of matrix products as the model's."""
    torch.set_num_threads(threads)
    x, w = torch.randn(1024, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    best = float("inf")
    for _ in range(40):
        began = time.perf_counter()
        x @ w.t()
        best = min(best, time.perf_counter() - began)
    return 2 * x.shape[0] * w.numel() / best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pruned")
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    asked = parser.parse_args()
    if asked.way:
        one(asked)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.only.split(",")}
    for _ in range(asked.repeat):
        for name in found:
            command = [sys.executable, "-m", "bench.training", asked.pruned, "--way", name]
            for option in ("data", "threads", "tokens", "rows", "steps"):
                command += [f"--{option}", str(getattr(asked, option))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    text = "\n".join(page(asked, found)) + "\n"
    print(text)
    if asked.save:
        RESULT.write_text(text, encoding="utf-8")


def page(asked: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the page of results."""
    info = locate.open(asked.pruned).info
    speeds = {
        name: products(getattr(torch, name), asked.threads) for name in ("float32", "bfloat16")
    }
    first = next(iter(found.values()))[0]
    lines = [
        "# Training: tokens per second and memory",
        "",
        f"`python -m bench.training PRUNED --data SOURCE --threads {asked.threads}`: "
        f"{Path(asked.pruned).name} ({info.blocks} blocks, {info.parameters:,} parameters), "
        f"{asked.rows} rows, {first['tokens']:,} tokens in a step, on the CPU; medians of "
        f"{asked.repeat} processes with {asked.steps} steps each. Matrix products reach "
        + " and ".join(f"{v / 1e9:,.0f} GFLOP/s in {name}" for name, v in speeds.items())
        + ".",
        "",
        "| | computed in | tokens/s | against plain peft | against all weights | share of the "
        "limit | peak memory, MiB | loss of the first step | trained parameters |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rates = {
        name: runs[0]["tokens"] / statistics.median(run["seconds"] for run in runs)
        for name, runs in found.items()
    }
    for name, runs in found.items():
        computed = runs[0]["computed"]
        rival = rates.get("peft" if computed == "float32" else "peft-half")
        spec = replace(
            RetrainSpec(checkpoint="", data="", out=""), **WAYS[name][1]
        )  # its method decides what is counted
        limit = speeds[computed] / (info.parameters * (4 if spec.method == "lora" else 6))
        share = "-" if spec.method == "partial" else f"{rates[name] / limit:.0%}"
        full = rates.get("full")
        lines.append(
            f"| {WAYS[name][0]} | {computed} | {rates[name]:.0f} | "
            f"{f'{rates[name] / rival:.2f} x' if rival and spec.method == 'lora' else '-'} | "
            f"{f'{rates[name] / full:.2f} x' if full else '-'} | {share} | "
            f"{statistics.median(run['peak_mib'] for run in runs):,.0f} | "
            f"{runs[0]['loss']:.4f} | {runs[0]['trained']:,} |"
        )
    return lines


if __name__ == "__main__":
    main()
