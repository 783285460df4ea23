"""Recipe ``drop-one``: drop the least important block; measure what that gains and costs."""

from __future__ import annotations

from typing import Any

from core.benchmark import results as benchmark
from core.compare.speed import Speed, speed_up
from core.prune.results import Pruning
from core.recipes import parts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.spec import RecipeSpec
from core.words import rounded

NAME = "without-one"
OUTPUT = 64
CPU_SECONDS = 20.0


def steps(spec: RecipeSpec) -> list[Step]:
    """Score, drop the cheapest block by perplexity, then evaluate and time both models."""
    return [
        parts.scored(spec),
        *parts.cut(spec, NAME, "ppl", count=1),
        parts.evaluated(spec, "dense"),
        parts.evaluated(spec, NAME),
        Step("speed", "benchmark", lambda chain: timing(chain, NAME)),
    ]


def timing(chain: Chain, *names: str) -> dict[str, Any]:
    """Return the options of a benchmark of the dense model and the steps ``names``."""
    on_cpu = chain.spec.device in ("auto", "cpu")
    return {
        "checkpoints": (chain.spec.checkpoint, *(str(chain.dir(name)) for name in names)),
        "batch_sizes": (1,),
        "output_tokens": (min(OUTPUT, parts.context(chain.spec) // 2),),
        "time_limit_s": CPU_SECONDS if on_cpu else None,
    }


def speeds(chain: Chain, step: str) -> list[Speed]:
    """Return the speed-up of every variant of a benchmark over its first one, at batch size 1."""
    dense, *others = parts.latencies(chain, step).values()
    return [speed_up(dense, own) for own in others]


def verdict(chain: Chain) -> Verdict:
    """Report what dropping one block gains (parameters, speed) and costs (perplexity)."""
    record = chain.read(NAME, Pruning)
    (speed,) = speeds(chain, "speed")
    dense, pruned = (parts.perplexity(chain, name) for name in ("dense", NAME))
    (block,) = record.dropped
    text = (
        f"Without block {block} the model has {record.ratio:.1%} fewer parameters and runs at "
        f"{speed}; its perplexity on held-out text is {pruned / dense:.3f} x dense."
    )
    expected = (record.blocks_before or 1) / (record.blocks_after or 1)
    device = chain.read("speed", benchmark.Summary).device or "this device"
    return Verdict(
        text,
        (
            f"Perplexity {rounded(dense)} dense, {rounded(pruned)} without the block.",
            "If time scaled with the number of blocks alone, the speed-up would be "
            f"{expected:.2f} x (estimated).",
            f"Timed on {device}, one prompt at a time.",
        ),
        {
            "block": block,
            "ratio": record.ratio,
            "ppl_dense": dense,
            "ppl": pruned,
            "speedup": speed.factor,
            "noise": speed.noise,
        },
    )


RECIPE = Recipe(
    "drop-one",
    "Drop one block",
    "Drops the block whose removal increases perplexity least, and measures speed and quality.",
    steps,
    verdict,
)
