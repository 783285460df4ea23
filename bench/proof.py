"""The longer demonstrations: ``make proof``. Each writes its command and output to docs/results.

The whole path on the demo checkpoint, and on a real one if ../shared/real exists: inspect,
importance, plan, prune, and text generated with the smaller checkpoint by stock transformers.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from core.retrain.results import Summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
REAL = ROOT.parent / "shared" / "real"
CONTINUE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""


class Record:
    """Commands and their output, as Markdown."""

    def __init__(self, title: str, folder: str) -> None:
        self.lines = [f"# {title}", "", "Written by `make proof`.", ""]
        self.folder = folder

    def run(self, *argv: str, shown: str = "") -> str:
        """Run a command and record its output (the temporary folder is shown as DIR)."""
        done = subprocess.run(
            [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(argv)} failed:\n{done.stderr}")
        command = shown or "python " + shlex.join(argv)
        self.block(f"$ {command}\n{done.stdout.strip() or done.stderr.strip()}")
        return done.stdout

    def block(self, text: str) -> None:
        clean = text.replace(self.folder, "DIR").replace(str(ROOT) + "/", "")
        self.lines += ["```", clean.replace(str(REAL), "../shared/real"), "```", ""]

    def file(self, path: Path) -> None:
        self.lines += [f"{path.name}:", ""]
        self.block(path.read_text().strip())

    def save(self, name: str) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / name).write_text("\n".join(self.lines))
        print(f"docs/results/{name}")


@contextlib.contextmanager
def recording(title: str, name: str, *about: str) -> Iterator[Record]:
    """Yield a record whose runs go to a temporary workspace; save it as ``name`` at the end."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DEPTHCUT_WORKSPACE"] = folder
        record = Record(title, folder)
        record.lines += [line for text in about for line in (text, "")]
        yield record
        record.save(name)


def whole_path(checkpoint: str, text: str, prompt: str, count: int, title: str, name: str) -> None:
    """Inspect, score, plan, measure the curve, prune, and load the result with transformers."""
    with recording(title, name) as record:
        folder = record.folder
        record.run("-m", "core", "importance", checkpoint, "--calibration", text,
                   "--out", f"{folder}/scores")  # fmt: skip
        record.file(Path(folder) / "scores" / "blocks.csv")
        record.file(Path(folder) / "scores" / "summary.json")
        plan = record.run("-m", "core", "plan", f"{folder}/scores", "--criterion", "ppl",
                          "--count", str(count), "--checkpoint", checkpoint)  # fmt: skip
        Path(folder, "plan.json").write_text(plan)
        record.run("-m", "core", "curve", checkpoint, "--scores", f"{folder}/scores",
                   "--out", f"{folder}/curve")  # fmt: skip
        record.file(Path(folder) / "curve" / "curve.csv")
        record.run("-m", "core", "prune", checkpoint, "--plan", f"{folder}/plan.json",
                   "--out", f"{folder}/smaller")  # fmt: skip
        for which in (checkpoint, f"{folder}/smaller"):
            path = str(ROOT / "core/demo/checkpoint") if which == "demo" else which
            shown = f"stock transformers, greedy, {which}"
            record.run("-c", CONTINUE, path, prompt, shown=shown)


SAMPLES = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.manual_seed(int(sys.argv[3]))
start = torch.full((int(sys.argv[4]), 1), model.config.bos_token_id)
ids = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
                     min_new_tokens=95, max_new_tokens=95, pad_token_id=0)
with open(sys.argv[2], "w") as file:
    file.writelines(json.dumps({"input_ids": row}) + "\\n" for row in ids.tolist())
"""


def retrained(record: Record, out: str, *argv: str, gap: float, share: float) -> None:
    """Retrain, record the summary, and report whether gap, time and share meet the targets."""
    record.run("-m", "core", "retrain", *argv, "--out", out)
    record.file(Path(out) / "summary.json")
    found = Summary.read(Path(out)) or Summary()
    measured_gap, recovered = found.gap_nat or 0.0, found.recovered or 0.0
    seconds = math.inf if found.training_s is None else found.training_s
    facts = (
        (f"gap {measured_gap:.3f} nats", f"at least {gap} nats", measured_gap >= gap),
        (f"{seconds:.1f} s of training", "at most 60 s", seconds <= 60),
        (f"{recovered:.0%} recovered", f"at least {share:.0%}", recovered >= share),
    )
    for measured, target, met in facts:
        record.lines += [f"- {measured} (target: {target}): {'met' if met else 'NOT MET'}"]
    record.lines += [""]


def retraining() -> None:
    """LoRA on the demo without a quarter of its blocks."""
    with recording(
        "Retraining the demo",
        "retrain_demo.md",
        "A quarter of 14 blocks is 4 (3.5 rounded); the cheapest by perplexity are dropped. The "
        "held-out rows are stories of a split that is never trained on.",
    ) as record:
        folder = record.folder
        record.run("-m", "core", "importance", "demo", "--metrics", "ppl",
                   "--out", f"{folder}/scores")  # fmt: skip
        plan = record.run("-m", "core", "plan", f"{folder}/scores", "--criterion", "ppl",
                          "--count", "4", "--checkpoint", "demo")  # fmt: skip
        Path(folder, "plan.json").write_text(plan)
        variant = f"{folder}/smaller"
        record.run("-m", "core", "prune", "demo", "--plan", f"{folder}/plan.json",
                   "--out", variant)  # fmt: skip
        retrained(record, f"{folder}/lora", variant, "--method", "lora",
                  "--data", "demo", "--steps", "40",
                  "--eval-every", "10", gap=0.1, share=0.5)  # fmt: skip


def retraining_real() -> None:
    """stories260K without a block, retrained on text generated by the dense model."""
    source = str(REAL / "stories260k")
    with recording("Retraining stories260K", "retrain_stories260k.md") as record:
        folder = record.folder
        for name, seed, count in (("train", 1, 640), ("heldout", 2, 96)):
            record.run("-c", SAMPLES, source, f"{folder}/{name}.jsonl", str(seed), str(count),
                       shown=f"{count} rows of 96 tokens sampled from the dense model, "
                       f"temperature 1, seed {seed}: {name}.jsonl")  # fmt: skip
        record.run("-m", "core", "prune", source, "--drop", "2", "--out", f"{folder}/smaller")
        retrained(record, f"{folder}/lora", f"{folder}/smaller", "--method", "lora",
                  "--data", f"{folder}/train.jsonl", "--holdout-data", f"{folder}/heldout.jsonl",
                  "--cutoff", "96", "--steps", "80", "--lr", "1e-2", "--rank", "16",
                  "--alpha", "32", "--eval-every", "20", "--merge", gap=0.05,
                  share=0.3)  # fmt: skip


RECIPES = ("ablation", "stability", "domain", "cpt-lora")


def recipes() -> None:
    """The recipes that retrain one variant in several ways, on the demo."""
    with recording(
        "Retraining the demo in several ways",
        "retrain_recipes.md",
        "Each drops a quarter of the demo's parameters by perplexity and retrains the rest "
        "for 40 steps of 16 sequences (docs/command-line.md, `recipe`).",
    ) as record:
        folder = record.folder
        for name in RECIPES:
            record.lines += [f"## {name}", ""]
            record.run("-m", "core", "recipe", name, "--out", f"{folder}/{name}")
            record.file(Path(folder) / name / "table.csv")


def main() -> None:
    retraining()
    recipes()
    if REAL.is_dir():
        retraining_real()
    whole_path(
        "demo",
        "demo",
        "Once upon a time there was",
        3,
        "The whole path on the demo",
        "proof_demo.md",
    )
    if REAL.is_dir():
        text = str(REAL / "wikitext2_test.txt")
        whole_path(str(REAL / "stories260k"), text, "Once upon a time", 1,
                   "The whole path on stories260K", "proof_stories260k.md")  # fmt: skip


if __name__ == "__main__":
    main()
