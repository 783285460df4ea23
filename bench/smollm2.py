"""The whole path on SmolLM2-135M with real text and questions: ``python -m bench.smollm2 FOLDER``.

Importance of all 30 blocks, depth pruning by PPL+ and Taylor+, the three width methods at the same
number of parameters, LoRA on real instructions, perplexity, the paper's tasks, latency and memory,
and a GGUF file of each checkpoint with its speed in llama.cpp. Every step is a command of the
product and keeps its run in FOLDER: started again, the script repeats only what is missing. It
writes docs/results/smollm2.md after each step; figures that are not measured yet are shown as such.

The questions and texts come from ../shared/real and are not part of the project.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from core.benchmark.results import Point
from core.benchmark.results import Summary as Benchmark
from core.checkpoint import locate
from core.evaluate.results import Score, TextRow
from core.prune.results import Pruning
from core.prune.score_results import BlockRow
from core.retrain.results import Summary as Retraining
from core.runs.workspace import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"
PAGE = ROOT / "docs" / "results" / "smollm2.md"
C4, ALPACA = REAL / "text" / "c4_300.jsonl", REAL / "text" / "alpaca_999.jsonl"
WIKITEXT = REAL / "wikitext2_test.txt"
TASKS = ("piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "boolq")
"""Six of the paper's seven: HellaSwag's questions are not at hand."""
RATIO = "0.2"
WIDTH = ("llm-pruner", "flap", "wanda-sp")
NAMES = {
    "dense": "dense",
    "depth-ppl": "depth, PPL+",
    "depth-taylor": "depth, Taylor+",
    "width-llm-pruner": "width, LLM-Pruner",
    "width-flap": "width, FLAP",
    "width-wanda-sp": "width, Wanda-sp",
    "lora-depth-ppl": "depth, PPL+, with LoRA",
    "lora-width-llm-pruner": "width, LLM-Pruner, with LoRA",
}
SPEED = """
import json, sys, time
from pathlib import Path
from bench.llama_cpp import engine
with engine(Path(sys.argv[1]), threads=2) as llama:
    prompt = llama.tokenize("The Leaning Tower of Pisa is known for")
    llama.greedy(prompt, 16)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        count = len(llama.greedy(prompt, 64))
        seconds.append((time.perf_counter() - began) / count)
print(json.dumps({"tokens_per_s": 1 / sorted(seconds)[2], "tokens": count, "runs": len(seconds)}))
"""


@dataclass
class Proof:
    """The steps' folder, and the commands that made what is in it."""

    folder: Path
    args: argparse.Namespace
    commands: list[str] = field(default_factory=list)
    recording: bool = False
    """Whether steps only list the commands behind the results that are there, and run nothing."""

    def at(self, name: str) -> Path:
        return self.folder / name

    def checkpoint(self, name: str) -> Path:
        if name == "dense":
            return Path(self.args.checkpoint or self.at("smollm2")).resolve()
        return self.at(name) / "merged" if name.startswith("lora-") else self.at(name)

    def run(self, name: str, *argv: str) -> bool:
        """Run a command of the product into FOLDER/NAME unless it is done; True if it is there."""
        out = self.at(name)
        full = [*argv, "--out", str(out)]
        command = self.shown(full)
        status = read_json(out / ".run" / "status.json") or {}
        record = read_json(out / ".run" / "proof.json") or {}
        done_before = status.get("state") == "done" and record.get("command") == command
        if done_before or not self.recording:
            self.commands.append(command)
        if done_before or self.recording:
            return done_before
        began = time.strftime("%H:%M:%S")
        print(f"{began} {name}: {command}", flush=True)
        more = ["--overwrite"] if status.get("state") == "done" else []
        done = subprocess.run(
            [sys.executable, "-m", "core", *full, *more],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            print(f"{name} failed: {done.stderr.strip().splitlines()[-2:]}", flush=True)
            return False
        write_json(out / ".run" / "proof.json", {"command": command})
        self.save()
        return True

    def shown(self, argv: list[str]) -> str:
        text = "python -m core " + shlex.join(argv)
        dense = str(self.checkpoint("dense"))
        return (
            text.replace(str(self.folder), "DIR")
            .replace(dense, "smollm2")
            .replace(str(REAL), "../shared/real")
        )

    def save(self) -> None:
        PAGE.write_text("\n".join(page(self)) + "\n")


P = TypeVar("P", bound=Proof)


def variants(proof: Proof) -> Iterator[str]:
    """Yield the checkpoints that are there, dense first."""
    for name in NAMES:
        if (proof.checkpoint(name) / "config.json").is_file():
            yield name


def make(proof: Proof) -> None:
    """Score, choose, prune by depth and by width."""
    dense = str(proof.checkpoint("dense"))
    proof.run("scores", "importance", dense, "--calibration", str(C4), "--samples", "32")
    for criterion in ("ppl", "taylor"):
        argv = ["plan", str(proof.at("scores")), "--criterion", criterion, "--ratio", RATIO,
                "--checkpoint", dense]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "core", *argv],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        plan = proof.at(f"plan-{criterion}.json")
        plan.write_text(done.stdout)
        proof.commands.append(f"{proof.shown(argv)} > DIR/{plan.name}")
        proof.run(f"depth-{criterion}", "prune", dense, "--plan", str(plan))
    for method in WIDTH:
        proof.run(f"width-{method}", "width", dense, "--method", method, "--match",
                  str(proof.at("depth-ppl")), "--calibration", str(C4),
                  *(() if method == "llm-pruner" else ("--samples", "128")))  # fmt: skip


def retrain(proof: Proof) -> None:
    for name in ("depth-ppl", "width-llm-pruner"):
        proof.run(f"lora-{name}", "retrain", str(proof.at(name)), "--method", "lora", "--data",
                  str(ALPACA), "--dense", str(proof.checkpoint("dense")), "--steps",
                  str(proof.args.steps), "--batch", "16", "--lr", "1e-3", "--holdout", "90",
                  "--merge")  # fmt: skip


def perplexity(proof: Proof) -> None:
    for name in variants(proof):
        proof.run(f"ppl-{name}", "evaluate", str(proof.checkpoint(name)), "--perplexity",
                  str(WIKITEXT), "--window", "128,2048", "--max-tokens",
                  str(proof.args.tokens))  # fmt: skip


def tasks(proof: Proof) -> None:
    names = list(variants(proof))
    for name in (*names, *(("dense-all",) if "dense" in names else ())):
        count = proof.args.dense_questions if name == "dense-all" else proof.args.questions
        ask(proof, name, proof.checkpoint(name.removesuffix("-all")), TASKS, count)


def ask(proof: Proof, name: str, checkpoint: Path, tasks: Sequence[str], count: int) -> None:
    """Ask a checkpoint the first ``count`` questions of each task (0: all); see `score_of`."""
    limit = ["--limit", str(count)] if count else []
    for task in tasks:
        proof.run(f"tasks-{name}-{task}", "evaluate", str(checkpoint), "--tasks", task,
                  "--task-dir", str(REAL / "tasks"), "--allow-task-code", *limit)  # fmt: skip


def measure(proof: Proof) -> None:
    found = [str(proof.checkpoint(name)) for name in variants(proof)]
    proof.run("benchmark", "benchmark", *found, "--batch-sizes", "1,4", "--output-tokens", "32",
              "--time-limit-s", str(proof.args.seconds))  # fmt: skip


def gguf(proof: Proof) -> None:
    """Write a GGUF file of every checkpoint, and time llama.cpp on it."""
    for name in variants(proof):
        file = proof.at("gguf") / f"{name}.gguf"
        file.parent.mkdir(exist_ok=True)
        argv = ["export", str(proof.checkpoint(name)), "--format", "gguf", "--type", "q8_0",
                "--out", str(file)]  # fmt: skip
        proof.commands.append(proof.shown(argv))
        if not file.exists() and not proof.recording:
            subprocess.run([sys.executable, "-m", "core", *argv], cwd=ROOT, check=True,
                           capture_output=True)  # fmt: skip
    if proof.recording:
        return
    speeds: dict[str, list[float]] = {}
    for _ in range(2):  # in turns, so that a slow minute does not hit one file alone
        for name in variants(proof):
            done = subprocess.run(
                [sys.executable, "-c", SPEED, str(proof.at("gguf") / f"{name}.gguf")],
                cwd=ROOT, capture_output=True, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.strip().splitlines()[-1])
            speeds.setdefault(name, []).append(found["tokens_per_s"])
    write_json(proof.at("gguf") / "speeds.json", {"tokens_per_s": speeds})
    proof.save()


STEPS = {
    "make": make,
    "perplexity": perplexity,
    "retrain": retrain,
    "perplexity-again": perplexity,
    "benchmark": measure,
    "gguf": gguf,
    "tasks": tasks,
}


def page(proof: Proof) -> list[str]:
    """Return the page with what has been measured so far."""
    lines = [
        "# SmolLM2-135M-Instruct from end to end",
        "",
        "Written by `python -m bench.smollm2 DIR` (part of `make proof`). All figures are measured "
        "here; a dash stands for what has not been measured yet. The weights come from a 4-bit "
        "file (Q4_1), so the dense model is a little worse than the published one. Speeds are "
        "ratios within one run.",
        "",
        "Versions: " + ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("torch", "transformers", "peft", "lm-eval")
        ) + ". CPU, float32, 2 threads.",
        "",
    ]  # fmt: skip
    lines += ["## What is left, and what it costs", "", *_table(proof), ""]
    lines += ["## The paper's tasks", "", *_tasks_table(proof), ""]
    lines += ["## LoRA on instructions", "", *_lora(proof), ""]
    lines += ["## Importance of the blocks", "", *_importance(proof), ""]
    commands = list(dict.fromkeys(proof.commands))
    lines += ["## Commands", "", "DIR is the folder given.", "", "```", *commands, "```"]
    return lines


def table_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table_head(cells: Sequence[str]) -> list[str]:
    """Return the first two rows of a Markdown table; the first column is of text."""
    return [table_row(cells), "| --- |" + " ---: |" * (len(cells) - 1)]


def _perplexities(proof: Proof, name: str) -> dict[int, float]:
    rows = TextRow.read(proof.at(f"ppl-{name}"))
    return {row.window or 0: row.ppl for row in rows}


def _table(proof: Proof) -> list[str]:
    tokens = f"first {proof.args.tokens:,} tokens"
    lines = [
        f"WikiText-2 test, {tokens}; latency and memory with transformers, 12 tokens in, 32 out, "
        "batch 1 (tokens/s relative to dense); llama.cpp with q8_0 files, 64 tokens, two threads, "
        "median of two visits.",
        "",
        *table_head(["checkpoint", "parameters", "share removed", "perplexity, 128", "2048",
                  "speed, transformers", "peak memory", "speed, llama.cpp", "GGUF"]),
    ]  # fmt: skip
    places = list(variants(proof))
    points = _points(proof)
    speeds = (read_json(proof.at("gguf") / "speeds.json") or {}).get("tokens_per_s", {})
    whole = locate.open(str(proof.checkpoint("dense"))).info.parameters
    for name in places:
        info = locate.open(str(proof.checkpoint(name))).info
        ppl = _perplexities(proof, name)
        point, dense = points.get(name), points.get("dense")
        file = proof.at("gguf") / f"{name}.gguf"
        lines.append(table_row([
            NAMES[name],
            f"{info.parameters:,}",
            f"{1 - info.parameters / whole:.1%}",
            f"{ppl[128]:.1f}" if 128 in ppl else "-",
            f"{ppl[2048]:.1f}" if 2048 in ppl else "-",
            _ratio(point and point.tokens_per_s, dense and dense.tokens_per_s),
            f"{point.peak_memory_mib:,.0f} MiB" if point and point.peak_memory_mib else "-",
            _ratio(_median(speeds.get(name)), _median(speeds.get("dense"))),
            f"{file.stat().st_size / 2**20:,.0f} MiB" if file.exists() else "-",
        ]))  # fmt: skip
    plans = [
        f"{NAMES[f'depth-{c}']} drops blocks {', '.join(map(str, sorted(found.dropped)))}."
        for c in ("ppl", "taylor")
        if (found := Pruning.read(proof.at(f"depth-{c}"))) and found.dropped
    ]
    noise = (
        "The two depth variants have the same shape, so the difference of their speeds is noise of "
        "the measurement."
    )
    return [*lines, "", noise, "", *plans]


def _points(proof: Proof) -> dict[str, Point]:
    """Return the benchmark's points at batch 1, by our names."""
    summary = Benchmark.read(proof.at("benchmark"))
    if summary is None:
        return {}
    folders = {str(proof.checkpoint(name)): name for name in variants(proof)}
    names = {entry.name: folders.get(entry.path, "") for entry in summary.variants}
    return {
        names[point.variant]: point
        for point in Point.read(proof.at("benchmark"))
        if point.batch_size == 1 and names.get(point.variant)
    }


def _median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else "-"


def _tasks_table(proof: Proof) -> list[str]:
    lines = [
        f"Accuracy in % with its standard error, 0-shot, the first {proof.args.questions} "
        "questions of each task (acc_norm for arc_challenge and openbookqa, otherwise acc, as in "
        "the paper); six of its seven tasks, HellaSwag is missing.",
        "",
        *table_head(["checkpoint", *TASKS, "mean"]),
    ]  # fmt: skip
    names = [*variants(proof), "dense-all"]
    for name in names:
        label = "dense, all questions" if name == "dense-all" else NAMES[name]
        scores = [score_of(proof, name, task) for task in TASKS]
        cells = [f"{100 * s.value:.1f} ± {100 * (s.stderr or 0):.1f}" if s else "-" for s in scores]
        if name == "dense-all":
            cells = [
                f"{cell} (n = {s.samples})" if s else "-"
                for cell, s in zip(cells, scores, strict=True)
            ]
        full = [s.value for s in scores if s]
        mean = f"{100 * statistics.fmean(full):.1f}" if len(full) == len(TASKS) else "-"
        lines.append(table_row([label, *cells, mean]))
    return lines


def score_of(proof: Proof, name: str, task: str) -> Score | None:
    """Return a task's score by the paper's metric, as `ask` left it."""
    return score_in(Score.read(proof.at(f"tasks-{name}-{task}")), task)


def score_in(rows: Iterable[Score], task: str) -> Score | None:
    """Return a task's score by the paper's metric."""
    metric = "acc_norm" if task in ("arc_challenge", "openbookqa") else "acc"
    return next((row for row in rows if row.task == task and row.metric == metric), None)


def _lora(proof: Proof) -> list[str]:
    lines = [
        f"LoRA, {proof.args.steps} steps of 16 rows of 906 instructions (lr 1e-3), 90 held out; "
        "nats per token on the held-out responses. KL is that of the model from the dense one, "
        "over the dense model's 128 likeliest next tokens and all others as one.",
        "",
        *table_head(["checkpoint", "loss: dense", "before", "after", "gap recovered", "KL before",
                  "after", "KL closed", "perplexity after, 128", "2048", "tokens trained on"]),
    ]  # fmt: skip
    for name in ("depth-ppl", "width-llm-pruner"):
        found = Retraining.read(proof.at(f"lora-{name}"))
        if found is None or found.heldout_loss_after is None:
            lines.append(table_row([NAMES[name], *["-"] * 10]))
            continue
        ppl = _perplexities(proof, f"lora-{name}")
        shares = (found.recovered, found.recovered_kl)
        recovered, closed = (f"{s:.0%}" if s is not None else "-" for s in shares)
        lines.append(table_row([
            NAMES[name],
            f"{found.heldout_loss_dense or 0:.3f}",
            f"{found.heldout_loss_before or 0:.3f}",
            f"{found.heldout_loss_after:.3f}",
            recovered,
            f"{found.heldout_kl_before or 0:.3f}",
            f"{found.heldout_kl_after or 0:.3f}",
            closed,
            *(f"{ppl[w]:.1f}" if w in ppl else "-" for w in (128, 2048)),
            f"{found.tokens or 0:,}",
        ]))  # fmt: skip
    return lines


def _importance(proof: Proof) -> list[str]:
    rows = BlockRow.read(proof.at("scores"))
    lines = [
        "32 x 128 tokens of C4, seed 1234. Perplexity is that of the model without the block.",
        "",
        *table_head(["block", "perplexity", "Taylor", "magnitude", "block influence"]),
    ]
    for row in rows:
        cells = [row.ppl, row.taylor, row.magnitude, row.block_influence]
        lines.append(
            table_row([str(row.block), *(f"{c:.4g}" if c is not None else "-" for c in cells)])
        )
    return lines


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every proof on SmolLM2 takes: its folder and the checkpoint."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", default="", help="Default: smollm2, imported if missing.")
    return parser


def begun(kind: type[P], args: argparse.Namespace) -> P:
    """Return the proof in the folder given, with the dense model imported."""
    if not REAL.is_dir():
        raise SystemExit(f"Skipped: {REAL}, with the texts and questions, is not there.")
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    proof = kind(args.folder, args)
    if not args.checkpoint:
        proof.run("smollm2", "import", "smollm2")
    return proof


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--dense-questions", type=int, default=0, help="0: all.")
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--only", default=",".join(STEPS), help="Steps to carry out.")
    args = parser.parse_args()
    proof = begun(Proof, args)
    for name in STEPS:
        proof.recording = name not in args.only.split(",")
        STEPS[name](proof)
    proof.save()


if __name__ == "__main__":
    main()
