"""Overhead of the harness over a bare generate loop: median of pairs with an interval.

    python -m bench.overhead [CHECKPOINT] [--pairs 40] [--batch-size 1] [--output-tokens 64]
                             [--clock wall|cpu] [--save FILE.json]

Each pair runs one bare ``model.generate`` and one run of the harness (utilisation sampler running,
first token timed, length checked), in alternating order; both are timed from outside by the same
clock. On a busy CPU, ``--clock cpu`` counts the process's processor seconds instead, including the
sampler's thread, which other load hardly affects. Prints the median of the pairs' differences as a
percentage of the bare time, with its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from bench import report
from core.benchmark import generate
from core.benchmark.protocol import percentile
from core.benchmark.utilisation import UtilisationSampler
from core.checkpoint import locate
from core.model.loading import load_model
from core.model.precision import decide, resolve_device


def interval(values: list[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    rng = random.Random(seed)
    medians = [statistics.median(rng.choices(values, k=len(values))) for _ in range(draws)]
    return percentile(medians, 0.025), percentile(medians, 0.975)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args()
    now = time.perf_counter if asked.clock == "wall" else time.process_time
    device = resolve_device(asked.device)
    checkpoint = locate.open(asked.checkpoint)
    folder, info = checkpoint.folder, checkpoint.info
    dtype = decide("auto", device, info.dtype).weights
    model = load_model(folder, device, dtype)
    config = generate.force_length(model, asked.output_tokens)
    ids = torch.tensor([generate.prompt_ids(None, info.vocab, 12)], device=device)
    ids = ids.repeat(asked.batch_size, 1)
    clock = generate.Clock(device)

    def bare() -> float:
        clock.wait()
        began = now()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        clock.wait()
        return now() - began

    def harness() -> float:
        sampler = UtilisationSampler(device)
        clock.wait()
        began = now()
        sampler.start()
        generate.timed(model, ids, config)
        spent = now() - began
        sampler.stop()
        return spent

    for _ in range(3):
        bare()
        generate.timed(model, ids, config)
    pairs = []
    for number in range(asked.pairs):
        if number % 2:
            ours, plain = harness(), bare()
        else:
            plain, ours = bare(), harness()
        pairs.append((plain, ours))
    shares = [100 * (ours / plain - 1) for plain, ours in pairs]
    low, high = interval(shares)
    result = {
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "checkpoint": folder.name if asked.checkpoint != "demo" else "demo",
        "batch_size": asked.batch_size,
        "output_tokens": asked.output_tokens,
        "pairs": asked.pairs,
        "clock": asked.clock,
        "bare_median_s": statistics.median(p for p, _ in pairs),
        "overhead_median_pct": statistics.median(shares),
        "overhead_95pct_interval": [low, high],
    }
    report(json.dumps(result, indent=2) + "\n", asked.save)


if __name__ == "__main__":
    main()
