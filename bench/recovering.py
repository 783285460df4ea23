"""What each way of retraining brings back: ``python -m bench.recovering DIR``.

SmolLM2-135M without blocks 13 to 18, healed by a refit of the seam, is retrained in seven ways on
the same number of tokens. Measured on text that took no part: the share of the loss gap and of the
KL to the dense model that was closed, perplexity, tasks. Every step is a command of the product and
keeps its run in DIR: started again, the script repeats only what is missing, and it writes
docs/results/recovering.md after each step. ``--only`` chooses parts; ``speed`` (tokens/s and
memory, a few steps of each way) is worth something on a quiet machine only.

The texts and questions come from ../shared/real and are not part of the project.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from bench.smollm2 import (
    ALPACA,
    C4,
    REAL,
    ROOT,
    TASKS,
    WIKITEXT,
    Proof,
    ask,
    begun,
    parser_of,
    score_of,
    table_head,
    table_row,
)
from core.checkpoint import locate
from core.evaluate.results import TextRow
from core.generate.results import Summary as Generation
from core.retrain.results import Measure, Summary
from core.runs.workspace import write_text

PAGE = ROOT / "docs" / "results" / "recovering.md"
BLOCKS = "13-18"
STEPS, BATCH, CUTOFF = 30, 4, 256
HELD_ROWS, HELD_CHARACTERS = 16, 1000
KL = ("--loss", "kl")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora-ce": ("LoRA, cross entropy", ("--method", "lora", "--lr", "3e-3")),
    "lora-kl": ("LoRA, KL", ("--method", "lora", "--lr", "3e-3", *KL)),
    "partial-ce": ("partial, cross entropy", ("--method", "partial", "--lr", "3e-4")),
    "partial-kl": ("partial, KL", ("--method", "partial", "--lr", "3e-4", *KL)),
    "full-kl": ("all weights, KL", ("--method", "full", "--lr", "3e-4", *KL)),
    "lora-own": ("LoRA, cross entropy on the dense model's text", ("--method", "lora", "--lr",
                                                                  "3e-3")),
    "lora-both": ("LoRA, cross entropy and KL", ("--method", "lora", "--lr", "3e-3", "--loss",
                                                  "both")),
}  # fmt: skip
"""Label and options of each way, with the learning rates that `bench.rates` led to."""
SEEDS = (1234, 1235)
PATH = {
    "depth": ("depth, healed", ()),
    "llm-pruner": ("width, LLM-Pruner", ()),
    "flap": ("width, FLAP", ("--samples", "128")),
    "wanda-sp": ("width, Wanda-sp", ("--samples", "128")),
}
"""The whole path: checkpoints of one size, all retrained in one way."""
PATH_BLOCKS = "4,5,13-18"
SOURCES = {"held out": "C4", "boolq": "BoolQ passages", "alpaca": "instructions"}


class Recovering(Proof):
    """A proof whose page is recovering.md."""

    def save(self) -> None:
        write_text(PAGE, "\n".join(page(self)) + "\n")

    def checkpoint(self, name: str) -> Path:
        merged = self.at(name) / "merged"
        return merged if merged.is_dir() else super().checkpoint(name)


def texts(proof: Proof) -> None:
    """Write the rows to heal and train on, and three sets that take no part in it."""
    folder = proof.at("text")
    folder.mkdir(exist_ok=True)
    found = [json.loads(line)["text"] for line in C4.open(encoding="utf-8")]
    _write(folder / "train.jsonl", ({"text": text} for text in found[:200]))
    held = (text[:HELD_CHARACTERS] for text in found[200:])
    _write(folder / "c4.jsonl", ({"text": text} for text in list(held)[:HELD_ROWS]))
    boolq = (REAL / "tasks" / "boolq.jsonl").open(encoding="utf-8")
    passages = list(dict.fromkeys(json.loads(line)["passage"] for line in boolq))
    cut = ({"text": text[:HELD_CHARACTERS]} for text in passages[:HELD_ROWS])
    _write(folder / "boolq.jsonl", cut)
    rows = [json.loads(line) for line in ALPACA.open(encoding="utf-8")]
    _write(folder / "alpaca.jsonl", iter(rows[:HELD_ROWS]))


def _write(path: Path, rows: Iterator[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def make(proof: Proof) -> None:
    texts(proof)
    dense, train = str(proof.checkpoint("dense")), str(proof.at("text") / "train.jsonl")
    proof.run("cut", "prune", dense, "--drop", BLOCKS, "--heal", "refit", "--calibration", train,
              "--samples", "64", "--length", "256")  # fmt: skip


def options(proof: Proof, data: Path, seed: int = SEEDS[0]) -> list[str]:
    text = proof.at("text")
    return ["--data", str(data), "--format", "text", "--dense", str(proof.checkpoint("dense")),
            "--holdout-data", str(text / "c4.jsonl"), "--also", str(text / "boolq.jsonl"),
            "--also", str(text / "alpaca.jsonl"), "--steps", str(STEPS), "--batch", str(BATCH),
            "--cutoff", str(CUTOFF), "--holdout", str(HELD_ROWS), "--seed", str(seed),
            "--merge"]  # fmt: skip


def train(proof: Proof, ways: tuple[str, ...] = tuple(WAYS), seed: int = SEEDS[0]) -> None:
    for name in ways:
        if name not in proof.args.ways.split(","):
            continue
        data = proof.at("text") / "train.jsonl"
        if name == "lora-own":
            data = proof.at("own")
            if not (data / "generated.jsonl").is_file():
                continue
        out = name if seed == SEEDS[0] else f"{name}-{seed}"
        proof.run(out, "retrain", str(proof.at("cut")), *WAYS[name][1],
                  *options(proof, data, seed))  # fmt: skip


def own(proof: Proof) -> None:
    """Let the dense model continue the beginnings of the training rows, and train on that."""
    source = str(proof.at("text") / "train.jsonl")
    proof.run("own", "generate", str(proof.checkpoint("dense")), "--prompts", source, "--check",
              "none", "--max-tokens", "224", "--samples", "140")  # fmt: skip
    train(proof, ("lora-own",))


def again(proof: Proof) -> None:
    train(proof, seed=SEEDS[1])


def names(proof: Proof) -> Iterator[str]:
    """Yield the checkpoints to evaluate that are there."""
    path = [f"path-{name}{end}" for name in PATH for end in ("", "-kl")]
    for name in ("dense", "cut", *WAYS, *path):
        if (proof.checkpoint(name) / "config.json").is_file():
            yield name


def perplexity(proof: Proof) -> None:
    for name in names(proof):
        proof.run(f"ppl-{name}", "evaluate", str(proof.checkpoint(name)), "--perplexity",
                  str(WIKITEXT), "--window", "128", "--max-tokens", "8192")  # fmt: skip


def _asked(proof: Proof, tasks: tuple[str, ...]) -> None:
    for name in names(proof):
        ask(proof, name, proof.checkpoint(name), tasks, proof.args.questions)


def lambada(proof: Proof) -> None:
    _asked(proof, ("lambada_openai",))


def tasks(proof: Proof) -> None:
    _asked(proof, TASKS)


def speed(proof: Proof) -> None:
    """Time a few steps of each way; for a quiet machine."""
    data = proof.at("text") / "train.jsonl"
    for name, (_, how) in WAYS.items():
        proof.run(f"speed-{name}", "retrain", str(proof.at("cut")), *how, "--data", str(data),
                  "--format", "text", "--dense", str(proof.checkpoint("dense")), "--steps", "8",
                  "--batch", str(BATCH), "--cutoff", str(CUTOFF), "--holdout-data",
                  str(proof.at("text") / "c4.jsonl"), "--holdout", "2", "--eval-every",
                  "8")  # fmt: skip


def path(proof: Proof) -> None:
    """Make variants with a fifth of the parameters less, and retrain all of them alike."""
    dense, rows = str(proof.checkpoint("dense")), str(proof.at("text") / "train.jsonl")
    proof.run("path-depth", "prune", dense, "--drop", PATH_BLOCKS, "--heal", "refit",
              "--calibration", rows, "--samples", "64", "--length", "256")  # fmt: skip
    for name, (_, more) in PATH.items():
        if name != "depth":
            proof.run(f"path-{name}", "width", dense, "--method", name, "--match",
                      str(proof.at("path-depth")), "--calibration", rows, *more)  # fmt: skip
        proof.run(f"path-{name}-kl", "retrain", str(proof.at(f"path-{name}")),
                  *WAYS["lora-kl"][1], *options(proof, Path(rows)))  # fmt: skip


PARTS = {
    "make": make,
    "train": lambda proof: train(proof, tuple(w for w in WAYS if w != "lora-own")),
    "perplexity": perplexity,
    "lambada": lambada,
    "own": own,
    "perplexity-own": perplexity,
    "lambada-own": lambada,
    "tasks": tasks,
    "path": path,
    "perplexity-path": perplexity,
    "lambada-path": lambada,
    "tasks-path": tasks,
    "again": again,
    "speed": speed,
}
USUAL = ",".join(name for name in PARTS if name != "speed")


def page(proof: Proof) -> list[str]:
    """Return the page with what has been measured so far."""
    told = next((s for name in WAYS if (s := Summary.read(proof.at(name)))), None)
    lines = [
        "# What each way of retraining brings back",
        "",
        "`python -m bench.recovering DIR` (part of `make proof`). All figures are measured here; a "
        "dash stands for what has not been measured.",
        "",
        f"SmolLM2-135M-Instruct without blocks {BLOCKS.replace('-', ' to ')} (24 of 30 left, 113 M "
        "of 135 M parameters), healed by a refit of the seam on 64 rows of 256 tokens of the "
        "training text: the best set of six that is known here. Its weights come from a 4-bit file "
        f"(Q4_1). Every way takes {STEPS} steps of {BATCH} rows of up to {CUTOFF} tokens from 200 "
        "documents of C4, with the default learning rate of its method (retrain_defaults.md), rank "
        "8, linear schedule.",
        "",
    ]
    if told:
        lines += [
            f"{told.device}, {told.compute_dtype}, {told.tokens or 0:,} tokens with seed "
            f"{told.seed}. Held out are {HELD_ROWS} rows each of C4, of BoolQ's passages and of "
            f"instructions, up to {HELD_CHARACTERS:,} characters; none was trained on.",
            "",
        ]
    lines += ["## Recovered shares", "", *_shares(proof), ""]
    lines += ["## Perplexity, tasks and generation", "", *_scores(proof, ["dense", "cut", *WAYS])]
    lines += ["", "## Speed and memory", "", *_speed(proof), ""]
    lines += ["## The whole path: a fifth fewer parameters", "", *_path(proof), ""]
    commands = list(dict.fromkeys(proof.commands))
    return [*lines, "## Commands", "", "DIR is the folder given.", "", "```", *commands, "```"]


def _closed(proof: Proof, run: str, measure: str) -> dict[str, float]:
    """Return the share of the gap that was closed, by the text it was measured on."""
    shares = {}
    for row in Measure.read(proof.at(run)):
        label = next((text for key, text in SOURCES.items() if key in row.source), "")
        if row.measure != measure or not label or row.before is None or row.after is None:
            continue
        aim = (row.dense or 0.0) if measure == "loss" else 0.0
        if row.before - aim > 0:
            shares[label] = (row.before - row.after) / (row.before - aim)
    return shares


def _shares(proof: Proof) -> list[str]:
    labels = list(SOURCES.values())
    lines = [
        "Shares of the loss gap to the dense model that came back, and shares of KL(dense || "
        "model) over the whole vocabulary that were closed. Two figures: two seeds.",
        "",
        *table_head(["", *(f"loss, {x}" for x in labels), *(f"KL, {x}" for x in labels)]),
    ]
    for name, (label, _) in WAYS.items():
        runs = [name, f"{name}-{SEEDS[1]}"]
        cells = []
        for measure in ("loss", "kl"):
            found = [_closed(proof, run, measure) for run in runs]
            for text in labels:
                known = [f"{one[text]:.1%}" for one in found if text in one]
                cells.append(" / ".join(known) or "-")
        lines.append(table_row([label, *cells]))
    return [*lines, "", *_aim(proof, labels)]


def _aim(proof: Proof, labels: list[str]) -> list[str]:
    """Return how the aim of 1.6 times the KL gap stands, in a sentence for each method."""
    sentences = []
    for method in ("lora", "partial"):
        ratios = {}
        for text in labels:
            pairs = [
                (kl[text], ce[text])
                for seed in ("", f"-{SEEDS[1]}")
                if text in (kl := _closed(proof, f"{method}-kl{seed}", "kl"))
                and text in (ce := _closed(proof, f"{method}-ce{seed}", "kl"))
            ]
            if pairs:
                ratios[text] = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
        if not ratios:
            continue
        told = ", ".join(
            f"{text} {kl:.1%} against {ce:.1%}" + (f" ({kl / ce:.2f} x)" if ce > 0 else "")
            for text, (kl, ce) in ratios.items()
        )
        reached = all(kl > 0 and kl >= 1.6 * ce for kl, ce in ratios.values())
        sentences.append(
            f"{'LoRA' if method == 'lora' else 'Partial'}: of the KL to the dense model, KL closed "
            f"against cross entropy: {told}. Aim of 1.6 times on every text: "
            f"{'reached' if reached else '**not reached**'}."
        )
    return [line for sentence in sentences for line in (sentence, "")][:-1]


def _scores(proof: Proof, wanted: list[str]) -> list[str]:
    lines = [
        f"WikiText-2 test, first 8,192 tokens in windows of 128. Accuracy in % on the first "
        f"{proof.args.questions} questions of each task, 0-shot (acc_norm for arc_challenge and "
        "openbookqa); the standard error of a mean of six is about 2 points. LAMBADA asks for the "
        "last word of a passage and counts an answer if greedy decoding writes it: it stands for "
        "generation here, as a model of this size solves next to nothing of GSM8K. On BoolQ the "
        "dense model is below chance, and a model that only says yes is right in 70 of these 100: "
        "the mean of five leaves it out.",
        "",
        *table_head(["", "perplexity", "LAMBADA", *TASKS, "mean of six", "of five"]),
    ]
    labels = {
        "dense": "dense", "cut": "pruned and healed",
        **{name: label for name, (label, _) in WAYS.items()},
        **{f"path-{name}": label for name, (label, _) in PATH.items()},
        **{f"path-{name}-kl": f"{label}, LoRA KL" for name, (label, _) in PATH.items()},
    }  # fmt: skip
    for name in wanted:
        rows = TextRow.read(proof.at(f"ppl-{name}"))
        scores = [score_of(proof, name, task) for task in ("lambada_openai", *TASKS)]
        cells = [f"{100 * s.value:.1f}" if s else "-" for s in scores]
        six = [s.value for s in scores[1:] if s]
        means = ["-", "-"]
        if len(six) == len(TASKS):
            five = [value for task, value in zip(TASKS, six, strict=True) if task != "boolq"]
            means = [f"{100 * statistics.fmean(some):.1f}" for some in (six, five)]
        lines.append(
            table_row([labels[name], f"{rows[0].ppl:.1f}" if rows else "-", *cells, *means])
        )
    return lines


def _speed(proof: Proof) -> list[str]:
    lines = [
        "`python -m bench.recovering DIR --only speed`: 8 steps of each way on a quiet machine. "
        "The dense model's pass over the rows, once for all runs, is not part of it.",
        "",
        *table_head(["", "tokens/s", "peak memory", "trained parameters"]),
    ]
    for name, (label, _) in WAYS.items():
        found = Summary.read(proof.at(f"speed-{name}"))
        trained = found or Summary.read(proof.at(name))
        count = trained.trainable_parameters if trained else None
        lines.append(table_row([
            label,
            f"{found.tokens_per_s:.0f}" if found and found.tokens_per_s else "-",
            f"{found.peak_memory_mib:,.0f} MiB" if found and found.peak_memory_mib else "-",
            f"{count:,}" if count else "-",
        ]))  # fmt: skip
    generated = Generation.read(proof.at("own"))
    if generated:
        lines += [
            "",
            f"The dense model wrote {generated.own} of {generated.rows} rows itself "
            f"({generated.new_tokens:,} tokens, temperature {generated.temperature:g}).",
        ]
    return lines


def _path(proof: Proof) -> list[str]:
    wanted = [f"path-{name}{end}" for name in PATH for end in ("", "-kl")]
    sizes = []
    for name in PATH:
        folder = proof.checkpoint(f"path-{name}")
        if (folder / "config.json").is_file():
            parameters = locate.open(str(folder)).info.parameters
            sizes.append(f"{PATH[name][0]} {parameters:,}")
    return [
        f"Depth: without blocks {PATH_BLOCKS.replace('-', ' to ')}, healed. Width: each method as "
        "near to the same number of parameters as it comes (Wanda-sp removes the same number of "
        "heads everywhere), calibrated on the same text. All are retrained with LoRA "
        f"and KL on the same {STEPS} steps. Parameters: {'; '.join(sizes) or '-'}.",
        "",
        *_scores(proof, ["dense", *wanted]),
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--ways", default=",".join(WAYS), help="Ways of retraining to carry out.")
    parser.add_argument("--only", default=USUAL, help=f"Parts: {', '.join(PARTS)}.")
    args = parser.parse_args()
    proof = begun(Recovering, args)
    wanted = args.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        raise SystemExit(f"--only: unknown part {unknown[0]}; there are {', '.join(PARTS)}.")
    for name, part in PARTS.items():
        proof.recording = name not in wanted
        part(proof)
    proof.save()


if __name__ == "__main__":
    main()
