"""The analytic model against measured generations, on a CPU in processor seconds.

    python -m bench.analytic [CHECKPOINT ...] [--batch-sizes 1,4,16,64] [--save FILE.md]

Uses one thread, so that processor seconds are what an idle core would take and other load hardly
matters. The device's rates are measured first, on synthetic tensors and random models; none of the
checkpoints measured here contributes to them. Speed-ups are relative to the first checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch

from bench import report
from core.benchmark import analytic, generate, rates
from core.checkpoint import locate
from core.model.loading import load_model
from core.runs.spec import parse_numbers

DEVICE = torch.device("cpu")


def processor_clock() -> None:
    """Make every timing of the harness use this thread's processor seconds."""
    generate.Clock.mark = lambda self: time.thread_time()  # type: ignore[method-assign]


def measured_s(model, vocab: int, batch: int, output: int) -> float:
    ids = torch.tensor([generate.prompt_ids(None, vocab, 12)]).repeat(batch, 1)
    config = generate.force_length(model, output)
    generate.timed(model, ids, config)
    return statistics.median(generate.timed(model, ids, config)[0] for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", default=["demo"])
    parser.add_argument("--batch-sizes", default="1,4,16,64")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    processor_clock()
    found = rates.measure(DEVICE, torch.float32)
    lines = [
        f"`python -m bench.analytic {' '.join(asked.checkpoints)} --batch-sizes "
        f"{asked.batch_sizes}`, variants from `python -m core recipe depth-vs-width demo`.",
        "",
        f"Generations of {asked.output_tokens} tokens after 12, float32, one thread of a CPU, "
        "processor seconds, median of 3.",
        "",
        "| checkpoint | parameters | batch | measured s | estimated s | error | speed-up |",
        "| --- |" + " ---: |" * 6,
    ]
    pairs, base = [], {}
    for given in asked.checkpoints:
        checkpoint = locate.open(given, need_tokenizer=False)
        folder, info = checkpoint.folder, checkpoint.info
        model = load_model(folder, DEVICE, torch.float32, check=False)
        name = given if given == "demo" else folder.resolve().name
        for batch in parse_numbers(asked.batch_sizes):
            real = measured_s(model, info.vocab, batch, asked.output_tokens)
            guess = analytic.latency_s(info, found, batch, 12, asked.output_tokens)
            pairs.append((guess, real))
            over = base.setdefault(batch, real) / real
            lines.append(
                f"| {name} | {info.parameters:,} | {batch} | {real:.3f} | {guess:.3f} | "
                f"{guess / real - 1:+.0%} | {over:.2f} x |"
            )
    error = analytic.errors(pairs)
    lines += [
        "",
        f"Error over {error.points} points: median {error.median_error_pct:.1f} %, "
        f"worst {error.worst_error_pct:.1f} %.",
        "",
        f"Rates: `{json.dumps({k: v for k, v in dataclasses.asdict(found).items()})}`",
    ]
    report("\n".join(lines) + "\n", asked.save)


if __name__ == "__main__":
    main()
