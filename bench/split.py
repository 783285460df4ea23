"""Memory of split trainings: ``python -m bench.split --save`` writes docs/results/split.md.

Trains all of a checkpoint of random weights (that of `bench.memory`) by one process, by two
replicas and by two processes that split them, on the CPU. Shown for each process: the most resident
memory that the kernel counted for it (VmHWM), read from /proc until it ends. ``--code FOLDER
--label TEXT`` measures the split training of another version of Depthcut, in its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.memory import SHAPES, write
from core.runs.devices import GIB, MIB

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "results" / "split.md"
OPTIONS = (
    "--method", "full", "--dtype", "float32", "--device", "cpu", "--steps", "2",
    "--batch", "2", "--micro-batch", "1", "--cutoff", "64", "--eval-every", "1", "--holdout", "8",
)  # fmt: skip
WAYS = {
    "one process": (),
    "two replicas": ("--processes", "2", "--sharding", "ddp"),
    "two processes, split": ("--processes", "2", "--sharding", "fsdp"),
}
SPLIT = "two processes, split"
HEAD = "| training | first process, GiB | other process, GiB | held-out loss after |\n"
HEAD += "| --- | ---: | ---: | ---: |"


@dataclass(frozen=True)
class Ran:
    """One training."""

    peaks: list[int]
    """Bytes of each process, the first one first."""
    loss: float

    def row(self, name: str) -> str:
        """Return the table's row."""
        first, *others = (f"{peak / GIB:.2f}" for peak in self.peaks)
        return f"| {name} | {first} | {', '.join(others) or '-'} | {self.loss:.4f} |"


def peak_of(pid: int) -> int:
    """Return the most bytes that were resident so far; 0 if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def ran(folder: Path, out: Path, options: tuple[str, ...], code: Path) -> Ran:
    """Train in a separate process and watch all that take part."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "core", "retrain", str(folder), *OPTIONS, *options]
    data = out.with_name("rows.txt")
    shutil.copy(ROOT / "README.md", data)
    command += ["--dense", str(folder), "--data", str(data), "--out", str(out)]
    child = subprocess.Popen(command, cwd=code, stderr=subprocess.DEVNULL)
    log, peaks = out / ".run" / "log.txt", {child.pid: 0}
    while child.poll() is None:
        text = log.read_text() if log.is_file() else ""
        for told in re.findall(r"share the work on .* \(also: ([\d, ]+)\)", text):
            peaks |= {int(pid): 0 for pid in told.split(", ") if int(pid) not in peaks}
        peaks = {pid: max(known, peak_of(pid)) for pid, known in peaks.items()}
        time.sleep(0.02)
    if child.returncode:
        raise SystemExit(f"{command}: status {child.returncode}\n{log.read_text()[-2000:]}")
    summary = json.loads((out / "summary.json").read_text())
    shutil.rmtree(out)
    return Ran(list(peaks.values()), summary["heldout_loss_after"])


def main() -> None:
    """Measure and, if asked, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=0.5, help="of the checkpoint, in bfloat16")
    parser.add_argument("--code", type=Path, default=ROOT)
    parser.add_argument("--label", default="")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    ways = {f"{SPLIT}, {arguments.label}": WAYS[SPLIT]} if arguments.label else WAYS
    with tempfile.TemporaryDirectory(prefix="depthcut-split-") as temporary:
        scratch = Path(temporary)
        os.environ["DEPTHCUT_WORKSPACE"] = str(scratch / "ws")
        size = write(SHAPES[""], scratch / "model", arguments.gib * GIB)
        about = f"{size / MIB:,.0f} MiB in bfloat16, {2 * size / MIB:,.0f} MiB in float32"
        for name, options in ways.items():
            row = ran(scratch / "model", scratch / "out", options, arguments.code).row(name)
            print(row, flush=True)
            if arguments.save:
                put(about, name, row)


def put(about: str, name: str, row: str) -> None:
    """Add a row to the report, or replace it."""
    lines = REPORT.read_text().splitlines() if REPORT.is_file() else []
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    rows = {k: v for k, v in rows.items() if k not in ("training", "---")} | {name: row}
    text = f"""# Memory of split trainings

Measured by `python -m bench.split` on the CPU (gloo): the most resident memory of each process,
interpreter and libraries included. A checkpoint of random weights,
{about}:
weights, gradients and Adam's moments take four times the latter. The dense model, measured before
the training, is the same checkpoint. The text is the README; options:
`{" ".join(OPTIONS)}`.
An earlier version is measured in its folder, with `--code FOLDER --label TEXT`.
"""
    REPORT.write_text("\n".join([text, HEAD, *rows.values()]) + "\n")


if __name__ == "__main__":
    main()
