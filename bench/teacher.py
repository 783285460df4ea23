"""Training on kept distributions of the dense model against cross entropy and a live teacher.

    python -m bench.teacher PRUNED --dense DENSE --data SOURCE [--tokens 256] [--rows 4] [--save]

LoRA on the same micro-batch, the three losses in turns, in processor seconds, which other work on
the machine changes little. Also what keeping only the k likeliest tokens leaves of the divergence.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import locate
from core.model.loading import load_model, load_tokenizer
from core.model.precision import decide
from core.retrain import caches, fused, layers, rows, teacher, weights
from core.retrain.encoders import ModelTokenizer, config_eos
from core.retrain.loss import autocast, collate, kl_sum, predicted_logits
from core.retrain.spec import Goal, RetrainSpec
from core.retrain.trainer import Objective, with_kept
from core.runs.progress import SILENT

RESULT = Path(__file__).parents[1] / "docs" / "results" / "teacher_bench.md"
DEVICE = torch.device("cpu")
KEPT = (8, 32, 128, 512)
GOALS = {
    "cross entropy": Goal(True, 0.0, 0),
    "KL, kept distributions": Goal(False, 1.0, 128),
    "KL, live teacher": Goal(False, 1.0, 0),
}


def step(objective: Objective, model: Any, batch: dict[str, Any]) -> float:
    """Return the processor seconds of one micro-batch, forward and backward."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    objective(model, batch)[0].backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pruned")
    parser.add_argument("--dense", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    spec = RetrainSpec(
        checkpoint=asked.pruned, dense=asked.dense, data=asked.data, out="x", cutoff=asked.tokens
    )
    pruned, dense = locate.open(asked.pruned), locate.open(asked.dense)
    encoder = ModelTokenizer(load_tokenizer(pruned.folder), config_eos(pruned.folder))
    info = pruned.info
    made = rows.prepare(spec, encoder, vocab=info.vocab, context=info.context, most=200).train
    made = sorted(made, key=lambda row: -len(row.ids))[: asked.rows]
    packs = [(row,) for row in made]
    precision = decide("auto", DEVICE, info.dtype, "adapters")
    model = weights.with_adapters(load_model(pruned.folder, DEVICE, precision.weights), spec)
    if layers.why_stock(spec, info.parameters, pruned.config) is None:
        fused.install(model)
    model.train()
    live = load_model(dense.folder, DEVICE, precision.arithmetic).eval()
    items = sum(row.items for row in made)
    how = DEVICE, precision.compute
    with tempfile.TemporaryDirectory() as place:
        began = time.process_time()
        kept = teacher.write(Path(place) / "key", live, made, 128, how, SILENT)
        once = time.process_time() - began
        batch = with_kept(packs, kept) | {"items": items}
    objectives = {
        name: Objective(*how, live if goal.is_live else None, goal) for name, goal in GOALS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in GOALS}
    for number in range(asked.repeat + 1):
        for name, objective in objectives.items():
            taken = step(objective, model, batch)
            if number:
                seconds[name].append(taken)
    tokens = sum(len(row.ids) for row in made)
    base = statistics.median(seconds["cross entropy"])
    held = sum(p.nbytes for p in live.parameters())
    lines = [
        "# A teacher that was asked once",
        "",
        f"`python -m bench.teacher PRUNED --dense DENSE --data SOURCE --tokens {asked.tokens} "
        f"--rows {asked.rows}`: {Path(asked.pruned).name} ({info.blocks} blocks, "
        f"{info.parameters:,} parameters), LoRA of rank {spec.rank}, {asked.rows} rows of "
        f"{Path(asked.data).name}, {tokens:,} tokens in a micro-batch, {precision.arithmetic} on "
        f"the CPU. Processor seconds of forward and backward pass, in turns, median of "
        f"{asked.repeat}.",
        "",
        "| loss | seconds | against cross entropy | teacher in memory | teacher on disk |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, goal in GOALS.items():
        median = statistics.median(seconds[name])
        memory = f"{held / 2**20:,.0f} MiB" if goal.is_live else "none"
        disk = (
            f"{caches.needed_bytes(1000, goal.top_k) / 2**20:.2f} MiB per 1,000 tokens"
            if goal.is_kept
            else "none"
        )
        lines.append(f"| {name} | {median:.3f} | {median / base:.2f} x | {memory} | {disk} |")
    lines += [
        "",
        f"Asking the dense model once takes {once / base:.2f} x the time of one step of cross "
        "entropy on the same rows, and is saved by every later epoch and run.",
        "",
        "What is left of KL(dense || pruned) if only the k likeliest tokens are kept, and all "
        "others as one, on the same rows:",
        "",
        "| k | KL in nats per token | share of the whole | probability kept |",
        "| ---: | ---: | ---: | ---: |",
    ]
    with torch.no_grad(), autocast(*how):
        plain = collate(packs)
        wanted, own = predicted_logits(live, plain)[0], predicted_logits(model.eval(), plain)[0]
        whole = float(kl_sum(own, wanted)) / items
        for k in KEPT:
            found = teacher.largest(wanted, k)
            part = float(teacher.kl_kept(own, *found)) / items
            mass = 1 - float(found[2].float().exp().mean())
            lines.append(f"| {k} | {part:.4f} | {part / whole:.1%} | {mass:.2%} |")
    lines.append(f"| all | {whole:.4f} | 100% | 100% |")
    print("\n".join(lines))
    if asked.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
