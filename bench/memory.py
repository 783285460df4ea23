"""Models larger than memory: ``python -m bench.memory --save`` writes docs/results/memory.md.

Writes checkpoints of random weights ``--times`` the size of their limit, runs commands on them
with ``--memory-limit`` and again without a limit, each in a separate process. Shown for each: the
peak resident memory as the kernel counted it for the process, and whether the results are the same
in every digit. Before every run the page cache gives up the checkpoint's pages, so that it is read
from the disk. Rows are saved one by one; those that the report has stay, unless ``--again``.

``--speed`` measures the other part of the file, time: reading the checkpoint once, and each command
streamed and in memory, alternating, ``--rounds`` times. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.runs.devices import GIB, MIB

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "results" / "memory.md"
COMMON = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "initializer_range": 0.02,
}  # fmt: skip
ROWS = "rows.jsonl"
"""The calibration rows in a checkpoint's folder."""
FILE_BYTES = 50 * MIB
"""Blocks share files of about this size."""


@dataclass(frozen=True)
class Shape:
    """A checkpoint of LLaMA's shape, with as many blocks as its size asks for."""

    hidden: int
    inner: int
    heads: int
    keys: int
    head_dim: int
    limit: float
    """GiB that commands may take."""
    blocks: int = 0
    """0: as many as its size asks for."""
    rows: tuple[int, int] = (0, 0)
    """Calibration rows of random tokens that are written beside it, and the length of each."""

    @property
    def config(self) -> dict[str, object]:
        """What config.json has, apart from the number of blocks and the vocabulary."""
        return COMMON | {
            "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_attention_heads": self.heads, "num_key_value_heads": self.keys,
            "head_dim": self.head_dim,
        }  # fmt: skip

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The shapes of a block's matrices."""
        query, key = self.heads * self.head_dim, self.keys * self.head_dim
        return {
            "self_attn.q_proj": (query, self.hidden), "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden), "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.inner, self.hidden), "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }  # fmt: skip


SHAPES = {
    "": Shape(1536, 4096, 12, 4, 128, limit=1.1),
    # healing needs 20 tokens for each hidden dimension: a narrow model, so that it takes minutes
    "narrow": Shape(256, 2048, 4, 4, 64, limit=0.85),
    # hidden states several times the limit, of a small model, so that it takes minutes
    "rows": Shape(384, 128, 1, 1, 64, limit=1.0, blocks=3, rows=(1024, 2048)),
}


@dataclass(frozen=True)
class Case:
    """One command on the checkpoint."""

    name: str
    arguments: tuple[str, ...]
    passes: int
    """How often it reads the blocks, unless its log says how much it read."""
    files: tuple[str, ...]
    """What must be equal; of several files by a pattern, the first."""
    shape: str = ""


CASES = (
    Case("importance: Block Influence, angular distance, relative update",
         ("importance", "--metrics", "block-influence,angular,relative-update",
          "--samples", "4", "--length", "64"), 1, ("blocks.csv", "angular.csv")),
    Case("importance: perplexity and KL without each block",
         ("importance", "--metrics", "ppl,kl", "--samples", "1", "--length", "32"), 1,
         ("blocks.csv", "samples.csv")),
    Case("importance: Taylor and magnitude",
         ("importance", "--metrics", "taylor,magnitude", "--samples", "4", "--length", "64"), 3,
         ("blocks.csv", "weights.csv")),
    Case("evaluate: perplexity",
         ("evaluate", "--perplexity", "demo", "--window", "64", "--max-tokens", "512"), 1,
         ("windows.csv",)),
    Case("search: greedy and all pairs of 12 blocks",
         ("search", "--methods", "greedy,pairs", "--counts", "2", "--samples", "1", "--length",
          "16", "--protect-first", "80", "--protect-last", "2"), 6, ("sets.csv", "pairs.csv")),
    Case("budget: KL of every block dropped and with half an MLP",
         ("budget", "--versions", "drop,mlp50", "--samples", "1", "--length", "16", "--context",
          "16", "--runs", "1", "--check-plans", "1"), 3, ("versions.csv",)),
    Case("prune: healing by refit", ("prune", "--drop", "3", "--heal", "refit", "--samples", "40",
         "--length", "128"), 3, ("pruning.json", "model-00001-of-*.safetensors"), "narrow"),
    Case("width: healing three blocks by refit",
         ("width", "--method", "magnitude", "--ratio", "0.2", "--layers", "3:6", "--heal", "refit",
          "--heal-samples", "40", "--heal-length", "128"), 4,
         ("pruning.json", "model-00000.safetensors"), "narrow"),
    Case("prune: healing by refit on 1,024 rows of 2,048 tokens",
         ("prune", "--drop", "1", "--heal", "refit", "--calibration", ROWS, "--samples", "1024",
          "--length", "2048"), 1, ("pruning.json", "model-*.safetensors"), "rows"),
    Case("width: the whole run with FLAP",
         ("width", "--method", "flap", "--ratio", "0.2", "--samples", "8", "--length", "64"), 2,
         ("pruning.json", "model-00050.safetensors")),
    Case("width: the whole run with Wanda-sp",
         ("width", "--method", "wanda-sp", "--ratio", "0.2", "--samples", "8", "--length", "64"), 1,
         ("pruning.json", "model-00050.safetensors")),
    Case("width: the whole run with LLM-Pruner",
         ("width", "--method", "llm-pruner", "--ratio", "0.2", "--samples", "4", "--length", "64"),
         2, ("pruning.json", "model-00050.safetensors")),
)  # fmt: skip


def write(shape: Shape, folder: Path, size: float) -> int:
    """Write a checkpoint of about ``size`` bytes; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from core.checkpoint import locate

    demo = locate.open("demo").folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in demo.glob("*token*.json"):
        shutil.copy(path, folder)
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    shapes, hidden = shape.projections, shape.hidden
    block = 2 * sum(a * b for a, b in shapes.values())
    blocks = shape.blocks or math.ceil(size / block)
    together = max(1, round(FILE_BYTES / block))
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * 0.02).to(torch.bfloat16)

    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], file: str) -> None:
        if not (folder / file).is_file():
            save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    count, tokens = shape.rows
    if count and not (folder / ROWS).is_file():
        ids = torch.randint(3, vocabulary, (count, tokens), generator=draw).tolist()
        (folder / ROWS).write_text("".join(f"{json.dumps({'input_ids': row})}\n" for row in ids))
    named: dict[str, torch.Tensor] = {}
    for number in range(blocks):
        named |= {f"model.layers.{number}.{n}.weight": random(*s) for n, s in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named[f"model.layers.{number}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        if (number + 1) % together == 0 or number + 1 == blocks:
            save(named, f"model-{number // together:05d}.safetensors")
            named = {}
    save(
        {
            "model.embed_tokens.weight": random(vocabulary, hidden) * 50,
            "lm_head.weight": random(vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden).bfloat16(),
        },
        "model-end.safetensors",
    )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = shape.config | {"num_hidden_layers": blocks, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Let the page cache give up a checkpoint's pages."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> float:
    """Return the seconds of reading a checkpoint from the disk once, in pieces of 8 MiB."""
    forget(folder)
    began, buffer = time.perf_counter(), bytearray(8 * MIB)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - began


@dataclass(frozen=True)
class Ran:
    """One run of a command."""

    peak_bytes: int
    """Resident memory at its highest, as the kernel reports it to the parent."""
    seconds: float
    """Of the computation, without imports, by the summary; of the whole process if it has none."""
    way: str
    passes: float | None
    """How often it read the blocks, if its log says so."""


def ran(case: Case, folder: Path, out: Path, limit: float | None) -> Ran:
    """Run a command in a separate process."""
    shutil.rmtree(out, ignore_errors=True)
    forget(folder)
    command, *rest = (str(folder / ROWS) if a == ROWS else a for a in case.arguments)
    more = [] if limit is None else ["--memory-limit", str(limit)]
    arguments = [sys.executable, "-m", "core", command, str(folder), *rest, *more]
    if command == "evaluate":
        more.append("--fresh")
    began = time.perf_counter()
    child = subprocess.Popen(
        [*arguments, "--device", "cpu", "--out", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    took = time.perf_counter() - began
    log = (out / ".run" / "log.txt").read_text()
    if status:
        raise SystemExit(f"{case.name}: status {status}\n{log[-2000:]}")
    summary = out / "summary.json"
    if summary.is_file():
        spent = json.loads(summary.read_text()).get("seconds")
        took = sum(spent.values()) if isinstance(spent, dict) else spent or took
    way = "streamed" if "read block by block" in log else "in memory"
    way += ", states on the disk" if "are kept on the disk" in log else ""
    read = re.search(r"Read ([\d.]+) GiB of weights", log)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GIB
    return Ran(usage.ru_maxrss * 1024, took, way, float(read[1]) / size if read else None)


def content(folder: Path, name: str) -> object:
    """Return what a result file says, without what names or times the run."""
    path = sorted(folder.glob(name))[0]
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.name == "pruning.json":
        found = json.loads(path.read_text())
        healing = found.get("healing") or {}
        return found.get("blocks"), healing.get("kl_after"), healing.get("seams")
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    timed = [key for key in rows[0] if key.endswith("_s") or "seconds" in key]
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


@dataclass(frozen=True)
class Folder:
    """A checkpoint that was written."""

    path: Path
    limit: float
    size: int


def speed(case: Case, where: Folder, scratch: Path, rounds: int, reading: float) -> str:
    """Return the table's row of a command's times."""
    pairs = [
        [ran(case, where.path, scratch / str(way), way) for way in (where.limit, None)]
        for _ in range(rounds)
    ]
    there, here = (
        statistics.median(one.seconds for one in column) for column in zip(*pairs, strict=True)
    )
    passes = pairs[0][0].passes or case.passes
    bound = max(passes * reading, here)
    return (
        f"| {case.name} | {passes:.1f} | {there:.1f} | {here:.1f} | {bound:.1f} | "
        f"{there / bound:.2f} |"
    )


def peaks(case: Case, where: Folder, scratch: Path) -> str:
    """Return the table's row of a command's memory."""
    there = ran(case, where.path, scratch / "there", where.limit)
    here = ran(case, where.path, scratch / "here", None)
    same = all(
        content(scratch / "there", name) == content(scratch / "here", name) for name in case.files
    )
    for done in ("there", "here"):
        shutil.rmtree(scratch / done)
    share = there.peak_bytes / GIB / where.limit
    return (
        f"| {case.name} | {there.way} | {where.size / GIB:.2f} | {where.limit:.2f} | "
        f"{there.peak_bytes / GIB:.2f} | {share:.0%} | {here.peak_bytes / GIB:.2f} | "
        f"{'the same' if same else 'DIFFERENT'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, help="GiB, for all checkpoints")
    parser.add_argument("--times", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="keeps the checkpoints, and reuses them")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--again", action="store_true", help="also what the report has")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    part = "speed" if arguments.speed else "memory"
    known = {} if arguments.again else rows_of(part)
    cases = [c for c in CASES if arguments.only in c.name and c.name not in known]
    with tempfile.TemporaryDirectory(prefix="depthcut-memory-") as temporary:
        scratch = Path(temporary)
        os.environ["DEPTHCUT_WORKSPACE"] = str(scratch / "ws")
        folders: dict[str, Folder] = {}
        reading: dict[str, float] = {}
        for case in cases:
            if case.shape not in folders:
                shape = SHAPES[case.shape]
                limit = arguments.limit or shape.limit
                path = (arguments.folder or scratch / "model").absolute()
                path = path.with_name(f"{path.name}-{case.shape}") if case.shape else path
                size = write(shape, path, arguments.times * limit * GIB)
                folders[case.shape] = Folder(path, limit, size)
            where = folders[case.shape]
            if arguments.speed:
                if case.shape not in reading:
                    reads = [read_once(where.path) for _ in range(arguments.rounds)]
                    reading[case.shape] = statistics.median(reads)
                    print(f"Reading once: {reading[case.shape]:.1f} s", flush=True)
                row = speed(case, where, scratch, arguments.rounds, reading[case.shape])
            else:
                row = peaks(case, where, scratch)
            print(row, flush=True)
            if arguments.save:
                put(part, {case.name: row})


PARTS = {"memory": "## Memory", "speed": "## Time"}
ABOUT = {
    "memory": "Checkpoints of LLaMA's shape with random bfloat16 weights, each about four times as "
    "large as\nits limit; for many rows a small one, whose hidden states of all rows are.",
    "speed": "The bound is the larger of reading the blocks once from the disk for each pass, and "
    "of computing\nwith the model in memory; the aim is 1.3 times the bound. Rows have one round "
    "at least; the disk\nis not equally fast each time, and on two cores the thread that reads "
    "takes time from the\ncomputation.",
}
TABLES = {
    "memory": "| command | way | checkpoint, GiB | limit, GiB | peak resident memory, GiB | of the "
    "limit | without a limit, GiB | files |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    "speed": "| command | passes | streamed, s | in memory, s | bound, s | times the bound |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |",
}
HEAD = """# Models larger than memory

Measured by `python -m bench.memory` on CPU. Peak resident memory is what the kernel counted for the
process, interpreter and libraries (about 0.42 GiB) included.
"""


def rows_of(part: str) -> dict[str, str]:
    """Return the rows of a part of the report, by the names of their cases."""
    if not REPORT.is_file():
        return {}
    text = REPORT.read_text().partition(f"{PARTS[part]}\n")[2].partition("\n## ")[0]
    lines = (line for line in text.splitlines() if line.startswith("| "))
    found = {line.split("|")[1].strip(): line for line in lines}
    width = TABLES[part].partition("\n")[0].count("|")
    names = {case.name for case in CASES}
    return {n: line for n, line in found.items() if n in names and line.count("|") == width}


def put(part: str, rows: Mapping[str, str]) -> None:
    """Add rows to a part of the report, in the order of `CASES`."""
    parts = []
    for name, title in PARTS.items():
        found = rows_of(name) | (dict(rows) if name == part else {})
        lines = [found[case.name] for case in CASES if case.name in found]
        table = "\n".join([ABOUT[name], "", TABLES[name], *lines]) if lines else "Not measured yet."
        parts.append(f"{title}\n\n{table}")
    REPORT.write_text(f"{HEAD}\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
