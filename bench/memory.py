"""Models larger than memory: ``python -m bench.memory --save`` writes docs/results/memory.md.

Writes a checkpoint of random weights ``--times`` the size of ``--limit`` (GiB), runs commands on it
with ``--memory-limit`` and again without a limit, each in a separate process. Shown for each: the
peak resident memory as the kernel counted it for the process, and whether the results are the same
in every digit. Before every run the page cache gives up the checkpoint's pages, so that it is read
from the disk.

``--speed`` measures the other part of the file, time: reading the checkpoint once, and each command
streamed and in memory, alternating, ``--rounds`` times. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from core.runs.devices import GIB, MIB

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "results" / "memory.md"
SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1536,
    "intermediate_size": 4096, "num_attention_heads": 12, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "initializer_range": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One command on the checkpoint."""

    name: str
    arguments: tuple[str, ...]
    passes: int
    """How often it reads the blocks."""
    files: tuple[str, ...]
    """What must be equal."""


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
    Case("width: statistics for FLAP",
         ("width", "--method", "flap", "--ratio", "0.2", "--samples", "8", "--length", "64"), 1,
         ("pruning.json",)),
    Case("evaluate: perplexity",
         ("evaluate", "--perplexity", "demo", "--window", "64", "--max-tokens", "512"), 1,
         ("windows.csv",)),
)  # fmt: skip


def write(folder: Path, size: float) -> int:
    """Write a checkpoint of about ``size`` bytes; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from core.checkpoint import locate

    demo = locate.open("demo").folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in demo.glob("*token*.json"):
        shutil.copy(path, folder)
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    assert isinstance(hidden, int)
    assert isinstance(inner, int)
    shapes = {
        "self_attn.q_proj": (1536, hidden), "self_attn.k_proj": (512, hidden),
        "self_attn.v_proj": (512, hidden), "self_attn.o_proj": (hidden, 1536),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    block = 2 * sum(a * b for a, b in shapes.values())
    blocks = math.ceil(size / block)
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * 0.02).to(torch.bfloat16)

    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], file: str) -> None:
        if not (folder / file).is_file():
            save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for number in range(blocks):
        named = {f"model.layers.{number}.{n}.weight": random(*s) for n, s in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named[f"model.layers.{number}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        save(named, f"model-{number:05d}.safetensors")
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
    config = SHAPE | {"num_hidden_layers": blocks, "vocab_size": vocabulary}
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


def ran(case: Case, folder: Path, out: Path, limit: float | None) -> Ran:
    """Run a command in a separate process."""
    shutil.rmtree(out, ignore_errors=True)
    forget(folder)
    command, *rest = case.arguments
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
    streamed = "read block by block" in log
    return Ran(usage.ru_maxrss * 1024, took, "streamed" if streamed else "in memory")


def content(path: Path) -> object:
    """Return what a result file says, without what names the run."""
    if path.name == "pruning.json":
        return json.loads(path.read_text())["blocks"]
    with path.open(newline="") as handle:
        return list(csv.reader(handle))


def speed(folder: Path, scratch: Path, limit: float, cases: tuple[Case, ...], rounds: int) -> str:
    """Return the table of times."""
    reads = [read_once(folder) for _ in range(rounds)]
    reading = statistics.median(reads)
    lines = [
        f"Reading the checkpoint once takes {reading:.1f} s (median of {rounds}).", "",
        "| command | passes | streamed, s | in memory, s | larger of reading and computing, s | "
        "times that |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for case in cases:
        pairs = [
            [ran(case, folder, scratch / str(way), way).seconds for way in (limit, None)]
            for _ in range(rounds)
        ]
        there, here = (statistics.median(column) for column in zip(*pairs, strict=True))
        bound = max(case.passes * reading, here)
        lines.append(
            f"| {case.name} | {case.passes} | {there:.1f} | {here:.1f} | {bound:.1f} | "
            f"{there / bound:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=1.1, help="GiB")
    parser.add_argument("--times", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint, and reuses it")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    cases = tuple(case for case in CASES if arguments.only in case.name)
    with tempfile.TemporaryDirectory(prefix="depthcut-memory-") as temporary:
        scratch = Path(temporary)
        os.environ["DEPTHCUT_WORKSPACE"] = str(scratch / "ws")
        folder = (arguments.folder or scratch / "model").absolute()
        size = write(folder, arguments.times * arguments.limit * GIB)
        if arguments.speed:
            found = speed(folder, scratch, arguments.limit, cases, arguments.rounds)
            _put("speed", found, arguments.save)
            return
        lines = [
            f"A LLaMA-shaped checkpoint of random bfloat16 weights, {size / GIB:.2f} GiB, "
            f"{size / GIB / arguments.limit:.1f} times the limit of {arguments.limit} GiB.", "",
            "| command | way | peak resident memory, GiB | of the limit | without a limit, GiB | "
            "files |",
            "| --- | --- | ---: | ---: | ---: | --- |",
        ]  # fmt: skip
        for case in cases:
            there = ran(case, folder, scratch / "there", arguments.limit)
            here = ran(case, folder, scratch / "here", None)
            same = all(
                content(scratch / "there" / name) == content(scratch / "here" / name)
                for name in case.files
            )
            lines.append(
                f"| {case.name} | {there.way} | {there.peak_bytes / GIB:.2f} | "
                f"{there.peak_bytes / GIB / arguments.limit:.0%} | {here.peak_bytes / GIB:.2f} | "
                f"{'the same' if same else 'DIFFERENT'} |"
            )
            print(lines[-1], flush=True)
        _put("memory", "\n".join(lines), arguments.save)


PARTS = {"memory": "## Memory", "speed": "## Time"}
HEAD = """# Models larger than memory

Measured by `python -m bench.memory` on CPU. Peak resident memory is what the kernel counted for the
process, interpreter and libraries (about 0.42 GiB) included.
"""


def _put(part: str, text: str, save: bool) -> None:
    """Print a part of the report; with ``save`` replace it in the file."""
    print(text)
    if not save:
        return
    now = dict.fromkeys(PARTS, "Not measured yet.")
    if REPORT.is_file():
        old = REPORT.read_text()
        for name, title in PARTS.items():
            if title in old:
                now[name] = old.split(f"{title}\n\n", 1)[1].split("\n## ", 1)[0].strip()
    now[part] = text
    body = "\n\n".join(f"{title}\n\n{now[name]}" for name, title in PARTS.items())
    REPORT.write_text(f"{HEAD}\n{body}\n")


if __name__ == "__main__":
    main()
