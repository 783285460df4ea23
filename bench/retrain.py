"""Retraining against the recipe of the paper's scripts, on the same rows in the same order.

    python -m bench.retrain                      the demo without a quarter of its blocks
    python -m bench.retrain --shape 7b --dtype bfloat16 --device cuda     random weights

Theirs: stock Trainer, micro-batches of 4 in random order, padded on the left to the longest row
and a multiple of 8, an attention mask, logits of all tokens, plain AdamW, gradients clipped at 1;
float32 on the CPU, mixed float16 on a GPU (bfloat16 on request). Ours: what ``retrain`` does by
default, but without recomputation at any size. Both take the same optimiser steps on the same rows
from the same adapters: once with the paper's dropout, for which the random numbers differ, and once
without, for which both must reach the same loss up to rounding. They alternate, each in a separate
process; the first step is excluded from the time. Token counts exclude padding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from core.model import loading, memory, precision
from core.retrain import batches, fused, weights
from core.retrain.loss import heldout_loss
from core.retrain.recovery import Held
from core.retrain.rows import Row, prepare
from core.retrain.spec import SMALL, RetrainSpec, settings_of

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "retrain_bench.md"
DROPPED = (4, 5, 6, 7)
DROPOUTS = (0.05, 0.0)
"""The paper's, and none, for which the random numbers of both recipes cannot differ."""
AIM = 2.0
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 26,
           "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048},
}  # fmt: skip


def spec_of(arguments: argparse.Namespace) -> RetrainSpec:
    return RetrainSpec(
        checkpoint="demo", data="demo", format="instruction", out="none", batch=64,
        steps=arguments.steps,
        dropout=arguments.dropout, warmup=0, schedule="constant", lr=1e-3, seed=1,
        dtype=arguments.dtype, device=arguments.device, micro_batch=arguments.micro_batch,
        eval_every=arguments.steps,
    )  # fmt: skip


def build(arguments: argparse.Namespace, spec: RetrainSpec, device: torch.device) -> Any:
    """Return the pruned demo, or random weights of a shape, with adapters; the same for both."""
    if arguments.shape == "demo":
        from core.demo import CHECKPOINT
        from core.prune import depth

        with tempfile.TemporaryDirectory() as folder:
            depth.prune(CHECKPOINT, DROPPED, Path(folder) / "pruned")
            model = loading.load_model(Path(folder) / "pruned", device, torch.float32)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**SHAPES[arguments.shape], attn_implementation="sdpa")
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        with device:
            model = LlamaForCausalLM(config).requires_grad_(False)
        torch.set_default_dtype(before)
    torch.manual_seed(1)
    return weights.with_adapters(model, spec)


def rows_of(arguments: argparse.Namespace, spec: RetrainSpec) -> tuple[list[Row], list[Row]]:
    """Return mixed-length instructions of the demo world, and held-out ones."""
    from core.demo import CHECKPOINT
    from core.retrain.encoders import FileTokenizer

    found = prepare(spec, FileTokenizer(CHECKPOINT), vocab=1206, context=512)
    return found.train, found.heldout[:60]


def ours(arguments: argparse.Namespace, spec: RetrainSpec, rows: list[Row], device: Any) -> Any:
    """Train with the trainer of `retrain`, without its evaluations."""
    from core.retrain.trainer import (
        MicroBatches,
        Objective,
        RetrainTrainer,
        StepWatcher,
    )
    from core.retrain.trainer import (
        arguments as training_arguments,
    )
    from core.runs.progress import SILENT

    packs = batches.sequences(rows, "grouped", spec.cutoff, spec.seed)
    size = 1 if arguments.shape == "demo" else SMALL
    settings = settings_of(spec, len(packs), size)
    lengths = [batches.length(pack) for pack in packs]
    plan = batches.StepPlan(lengths, settings.batch, settings.accumulation, spec.seed)
    compute = precision.decide(spec.dtype, device, "float32", "training").compute
    folder = Path(arguments.folder)
    model = build(arguments, spec, device)
    fused.install(model)
    trainer = RetrainTrainer(
        model,
        training_arguments(spec, settings, folder, device),
        MicroBatches(packs, plan, settings.steps),
        Objective(device, compute),
    )
    held = Held(1.0)
    watcher = StepWatcher(
        settings, SILENT, lambda: held, dense=None, before=held, clip=spec.clip, memory=lambda: 0.0
    )
    watcher.trainer = trainer
    trainer.add_callback(watcher)
    return trainer


def theirs(arguments: argparse.Namespace, spec: RetrainSpec, rows: list[Row], device: Any) -> Any:
    """Train with stock Trainer on left-padded micro-batches of 4; each step uses our rows."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    settings = settings_of(spec, len(rows))
    plan = batches.StepPlan([len(r.ids) for r in rows], settings.batch, 1, spec.seed)
    order = [i for step in range(settings.steps) for i in plan.indices(step)]

    def padded(part: list[Row]) -> dict[str, torch.Tensor]:
        width = math.ceil(max(len(row.ids) for row in part) / 8) * 8
        lines = [(width - len(row.ids), row) for row in part]
        return {
            "input_ids": torch.tensor([[0] * left + list(row.ids) for left, row in lines]),
            "labels": torch.tensor([[-100] * left + list(row.labels) for left, row in lines]),
            "attention_mask": torch.tensor([[0] * left + [1] * len(r.ids) for left, r in lines]),
        }

    class Plain(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    half = device.type == "cuda"
    args = TrainingArguments(
        output_dir=arguments.folder, max_steps=settings.steps, per_device_train_batch_size=4,
        gradient_accumulation_steps=16, learning_rate=spec.lr, lr_scheduler_type="constant",
        optim="adamw_torch", fp16=half and spec.dtype != "bfloat16",
        bf16=half and spec.dtype == "bfloat16", use_cpu=device.type == "cpu", report_to="none",
        save_strategy="no", logging_steps=10, disable_tqdm=True, seed=1,
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    model = build(arguments, spec, device)
    model.config.use_cache = False
    return Plain(model, args, train_dataset=[rows[i] for i in order], data_collator=padded)


def one(arguments: argparse.Namespace) -> None:
    """Train with one recipe in this process and print its measurements as JSON."""
    from transformers import TrainerCallback

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = precision.resolve_device(arguments.device)
    spec = spec_of(arguments)
    rows, heldout = rows_of(arguments, spec)
    trainer = (ours if arguments.way == "ours" else theirs)(arguments, spec, rows, device)
    clock: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            clock.append((time.perf_counter(), time.process_time()))

    trainer.add_callback(Clock())
    memory.reset_peak_memory(device)
    trainer.train()
    peak = memory.peak_memory_mib(device)
    plan = batches.StepPlan([len(r.ids) for r in rows], 64, 1, spec.seed)
    counted = [len(rows[i].ids) for step in range(1, spec.steps or 1) for i in plan.indices(step)]
    seconds, cpu_s = (end - start for start, end in zip(clock[0], clock[-1], strict=True))
    print(
        json.dumps(
            {
                "tokens_per_s": sum(counted) / seconds,
                "tokens_per_cpu_s": sum(counted) / cpu_s,
                "seconds": seconds,
                "peak_mib": peak,
                "loss": heldout_loss(trainer.model, heldout, device),
            }
        )
    )


def run(arguments: argparse.Namespace, way: str, dropout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.retrain", "--way", way, "--dropout", str(dropout)]
    for name in ("shape", "steps", "dtype", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    for name in ("threads", "micro_batch"):
        if getattr(arguments, name):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--folder", folder], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, dropout: float) -> list[str]:
    """Run both recipes in turns with one dropout; return the lines to report."""
    found: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    for turn in range(arguments.repeat):
        for way in found if turn % 2 == 0 else reversed(found):
            found[way].append(run(arguments, way, dropout))
            print(way, json.dumps(found[way][-1]), flush=True)
    middle = {
        way: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for way, runs in found.items()
    }
    ratios, cpu = (
        [o[key] / t[key] for o, t in zip(found["ours"], found["theirs"], strict=True)]
        for key in ("tokens_per_s", "tokens_per_cpu_s")
    )
    gap = abs(middle["ours"]["loss"] - middle["theirs"]["loss"])
    reached = "reached" if statistics.median(ratios) >= AIM else "**not reached**"
    return [
        f"## Dropout {dropout:g}",
        "",
        "| recipe | non-padding tokens/s | per CPU second | peak MiB above the loaded model "
        "| held-out loss after the same rows |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {label} | {m['tokens_per_s']:.0f} | {m['tokens_per_cpu_s']:.0f} "
            f"| {m['peak_mib']:.0f} | {m['loss']:.5f} |"
            for label, m in (("paper's scripts", middle["theirs"]), ("ours", middle["ours"]))
        ),
        "",
        f"Ratio of tokens/s: median {statistics.median(ratios):.2f} (target {AIM:g}: {reached}); "
        f"by turn {', '.join(f'{r:.2f}' for r in ratios)}. Per CPU second, which other load on the "
        f"machine affects less: median {statistics.median(cpu):.2f}. The losses differ by "
        f"{gap:.1e} nats.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="demo")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps of 64 rows")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", *precision.DTYPES), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument(
        "--dropout", type=float, help="run only this dropout. Default: 0.05, then 0"
    )
    parser.add_argument("--way", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    if arguments.way:
        one(arguments)
        return
    dropouts = DROPOUTS if arguments.dropout is None else (arguments.dropout,)
    device = precision.resolve_device(arguments.device)
    threads = arguments.threads or torch.get_num_threads()
    lines = [
        "# Retraining: measured",
        "",
        f"`python -m bench.retrain {' '.join(a for a in sys.argv[1:] if a != '--save')}`:",
        f"{arguments.shape} on {device}, {arguments.dtype}, {threads} threads, torch "
        f"{torch.__version__}; {arguments.steps} steps of 64 mixed-length",
        "instructions of the demo world, up to 256 tokens each; medians of "
        f"{arguments.repeat} turns, without the first step.",
        "",
    ]
    for dropout in dropouts:
        lines += compare(arguments, dropout)
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
