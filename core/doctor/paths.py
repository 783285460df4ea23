"""More checks of `core.doctor.plan`: streaming, healing, budgets, generating, other trainings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from core import demo
from core.benchmark.results import CompiledPoint
from core.data.calibration import calibration_rows
from core.doctor import checks, plain
from core.doctor.checks import CPU, DROPPED, LENGTH, SEED, WINDOW, Bench, Outcome, near
from core.generate.results import read_pairs
from core.importance.branches import make_batch
from core.importance.sweep import sweep
from core.importance.taylor import taylor
from core.model import loading
from core.model.blocks import BlockView
from core.model.memory import free_memory
from core.model.streaming import StreamedView
from core.prune.results import Healing, Pruning
from core.prune.version_results import VersionRow

NEAR_STREAMED = 1e-6
"""Largest relative difference of a streamed run: on a CPU there is none."""
HEALED_ROWS = 32
QUANTIZED = 3e-2
"""Largest relative difference of the losses with a frozen model in 8 bits, from one as it is."""


def streamed(bench: Bench) -> Outcome:
    """Score with the weights read block by block, and with all of them in memory."""
    folder, device = demo.CHECKPOINT, bench.device

    def scores(view: BlockView) -> dict[str, list[float]]:
        batch = make_batch(bench.rows, view)
        found = sweep(view, batch, kl=True)
        return {
            "perplexity": found.ppl,
            "KL": found.kl,
            "Block Influence": found.block_influence,
            "Taylor": [score.value for score in taylor(view, batch)],
        }

    there = StreamedView(folder, torch.float32, device)
    streamed = scores(there)
    read = there.source.bytes_read
    there.close()
    here = scores(BlockView(loading.load_model(folder, device, torch.float32)))
    free_memory(device)
    off, where = checks.differ(here, streamed)
    count = sum(map(len, here.values()))
    text = (
        f"{count} numbers differ by at most {off:.1e} from those with all weights in memory; "
        f"{read / 2**20:,.0f} MiB read"
    )
    return Outcome(off <= NEAR_STREAMED, text if off <= NEAR_STREAMED else f"{text} ({where})")


def healing(bench: Bench) -> Outcome:
    """Heal a cut; on the CPU the written model against the dense one, in plain transformers."""
    options: dict[str, Any] = {
        "checkpoint": "demo", "dtype": "float32", "drop": DROPPED, "heal": "refit",
        "samples": HEALED_ROWS, "length": 2 * WINDOW, "calibration": "demo",
    }  # fmt: skip
    found = _healed(bench.run("prune", bench.device, "healed", **options))
    have = {"kl": [found.kl_before or math.nan, found.kl_after or math.nan]}
    if not bench.is_cpu:
        other = _healed(bench.run("prune", CPU, "healed", **options))
        wanted = {"kl": [other.kl_before or math.nan, other.kl_after or math.nan]}
        return near(bench, wanted, have, checks.NEAR_FLOAT32)
    rows = calibration_rows("demo", bench.tokenizer, HEALED_ROWS, 2 * WINDOW, SEED)[3::4]
    models = (plain.without(bench.dense, DROPPED), plain.load(bench.folder / "healed-cpu"))
    wanted = {"kl": [_kl(bench.dense, model, rows) for model in models]}
    outcome = near(bench, wanted, have, checks.NEAR_FLOAT32)
    better = have["kl"][1] < have["kl"][0]
    text = f"KL from the dense model {have['kl'][0]:.4f} to {have['kl'][1]:.4f}: {outcome.text}"
    return Outcome(outcome.agrees and better, text)


def _healed(folder: Path) -> Healing:
    return (Pruning.read(folder) or Pruning()).healing or Healing()


def _kl(dense: Any, other: Any, rows: list[list[int]]) -> float:
    """Return KL(dense || other), the mean over all positions, the last of a row included."""
    found = []
    with torch.no_grad():
        for row in rows:
            p, q = (m(torch.tensor([row]), use_cache=False).logits[0].double().log_softmax(-1)
                    for m in (dense, other))  # fmt: skip
            found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


def budget(bench: Bench) -> Outcome:
    """Measure what versions of blocks cost; on the CPU against models without some blocks."""
    options: dict[str, Any] = {
        "checkpoint": "demo", "dtype": "float32", "versions": ("drop", "no-attention", "mlp50"),
        "samples": 3, "length": LENGTH, "seed": SEED, "calibration": "demo", "context": 12,
        "runs": 1, "check_plans": 0,
    }  # fmt: skip
    rows = VersionRow.read(bench.run("budget", bench.device, **options))
    timed = all((row.decode_s or 0.0) > 0 for row in rows if row.version == "whole")
    if bench.is_cpu:
        text = calibration_rows("demo", bench.tokenizer, 3, LENGTH, SEED)
        cut = {block: plain.without(bench.dense, [block]) for block in DROPPED}
        wanted = {f"block {b}": [plain.divergence(bench.dense, m, text)] for b, m in cut.items()}
        have = {
            f"block {row.block}": [row.kl if row.kl is not None else math.nan]
            for row in rows
            if row.version == "drop" and row.block in DROPPED
        }
    else:
        others = VersionRow.read(bench.run("budget", CPU, **options))
        wanted, have = ({"kl": [_number(row.kl) for row in some]} for some in (others, rows))
    outcome = near(bench, wanted, have, checks.NEAR_FLOAT32)
    text_timed = "" if timed else "; a block was not timed"
    return Outcome(outcome.agrees and timed, f"KL of versions: {outcome.text}{text_timed}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def partial(bench: Bench) -> Outcome:
    """Partial fine-tuning with kept states; on the CPU against the layers of transformers."""
    options: dict[str, Any] = {"method": "partial", "last": 2}
    compare = None
    if bench.is_cpu:
        _, stock = checks.train(
            bench, CPU, "partial-stock", **options, fused="off", keep_states="off"
        )
        compare = {"loss_after": _number(stock.heldout_loss_after)}
    return checks.trained(bench, "partial", checks.NEAR_TRAINED, compare, **options)


def quantized_base(bench: Bench) -> Outcome:
    """LoRA on a frozen model in 8 bits; on the CPU near LoRA on the model as it is."""
    compare = None
    if bench.is_cpu:
        _, stock = checks.train(bench, CPU, "lora-stock", fused="off")
        compare = {"loss_after": _number(stock.heldout_loss_after)}
    return checks.trained(bench, "quantized-base", QUANTIZED, compare, quantized_base="int8")


def generate(bench: Bench) -> Outcome:
    """Let the demo answer prompts; on the CPU against whole passes without a cache."""
    prompts = bench.folder / "prompts.jsonl"
    texts = [bench.tokenizer.decode(row[:24], skip_special_tokens=True) for row in bench.rows[:4]]
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options: dict[str, Any] = {
        "checkpoint": "demo", "prompts": str(prompts), "check": "none", "temperature": 0.0,
        "max_tokens": 12, "prompt_tokens": 8, "dtype": "float32",
    }  # fmt: skip
    found = _answers(bench.run("generate", bench.device, **options))
    if bench.is_cpu:
        end = [int(bench.dense.config.eos_token_id)]
        wanted = []
        for prompt, _ in found:
            ids = bench.tokenizer.encode(prompt)
            more = plain.continuation(bench.dense, ids, 12, end)
            wanted.append((prompt, bench.tokenizer.decode(more, skip_special_tokens=True)))
    else:
        wanted = _answers(bench.run("generate", CPU, **options))
    same = sum(one == other for one, other in zip(found, wanted, strict=True))
    text = f"{same} of {len(found)} answers are those of {bench.other}"
    return Outcome(bool(found) and same == len(found), text)


def _answers(folder: Path) -> list[tuple[str, str]]:
    """Return prompts and the model's own answers."""
    return sorted((pair.prompt, pair.own) for pair in read_pairs(folder))


def compiled(bench: Bench) -> Outcome:
    """Benchmark with a static cache and compiled steps."""
    folder = bench.run(
        "benchmark", bench.device, "compiled", checkpoints=("demo",), batch_sizes=(1,),
        output_tokens=(16,), runs=3, warmup=2, visits=1, compile=True, dtype="float32",
    )  # fmt: skip
    points = CompiledPoint.read(folder)
    if not points or not points[0].latency_s_mean:
        return Outcome(False, "nothing was measured with compiled steps")
    return Outcome(True, f"16 tokens at batch 1: {1000 * points[0].latency_s_mean:.0f} ms")
