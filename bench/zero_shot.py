"""Zero-shot tasks: how long evaluate takes next to lm-eval itself, and whether they agree.

    python -m bench.zero_shot CHECKPOINT [--limit 100] [--dtype bfloat16] [--rounds 1] [--save]

Both answer the same questions of the six tasks in ../shared/real, each in a separate process, in
alternating order. lm-eval runs through its own Python interface without its own list of tasks,
whose indexing takes its command line many seconds more. Counted are the processor seconds of the
whole processes, imports and loading included, which other load hardly affects, and the wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.smollm2 import REAL, ROOT, TASKS, table_head, table_row

PAGE = ROOT / "docs" / "results" / "zero_shot.md"
STOCK = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
checkpoint, dtype, folder, tasks, limit, batch, out = sys.argv[1:]
manager = TaskManager(include_path=folder, include_defaults=False)
found = lm_eval.simple_evaluate(
    "hf", f"pretrained={checkpoint},dtype={dtype}", tasks=tasks.split(","), task_manager=manager,
    device="cpu", batch_size=int(batch), limit=int(limit),
)
rows = [
    {"task": task, "index": sample["doc_id"],
     "loglikelihoods": [answer[0] for answer in sample["filtered_resps"]]}
    for task, samples in found["samples"].items() for sample in samples
]
open(out, "w").write(json.dumps(rows))
"""


def timed(argv: list[str]) -> tuple[float, float]:
    """Return the processor seconds and the seconds that a process took."""

    def used() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    before, began = used(), time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{argv[1:4]} failed: {done.stderr[-600:]}")
    return used() - before, time.perf_counter() - began


def answers(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """Return the log-likelihoods of the choices by task and question."""
    return {(row["task"], row["index"]): row["loglikelihoods"] for row in rows}


def main() -> None:
    """Time both, compare what they say, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--limit", type=int, default=100, help="Questions of each task.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="Of lm-eval.")
    parser.add_argument("--save", action="store_true", help="Add the table to the page.")
    asked = parser.parse_args()
    if not REAL.is_dir():
        raise SystemExit(f"Skipped: {REAL}, with the questions, is not there.")
    folder, tasks = str(REAL / "tasks"), ",".join(TASKS)
    spent: dict[str, list[tuple[float, float]]] = {"lm-eval": [], "evaluate": []}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(asked.rounds):
            stock, own = f"{temporary}/stock.json", f"{temporary}/own-{number}"
            spent["lm-eval"].append(timed([
                sys.executable, "-c", STOCK, asked.checkpoint, asked.dtype, folder, tasks,
                str(asked.limit), str(asked.batch), stock,
            ]))  # fmt: skip
            spent["evaluate"].append(timed([
                sys.executable, "-m", "core", "evaluate", asked.checkpoint, "--tasks", tasks,
                "--task-dir", folder, "--allow-task-code", "--limit", str(asked.limit),
                "--dtype", asked.dtype, "--device", "cpu", "--out", own,
            ]))  # fmt: skip
        theirs = answers(json.loads(Path(stock).read_text()))
        lines = (Path(own) / "samples.jsonl").read_text().splitlines()
        ours = answers([json.loads(line) for line in lines])
    same = [key for key in theirs if key in ours]
    gaps = [abs(a - b) for key in same for a, b in zip(theirs[key], ours[key], strict=True)]
    equal = sum(
        theirs[key].index(max(theirs[key])) == ours[key].index(max(ours[key])) for key in same
    )
    cpu, wall = (
        {name: statistics.median(pair[at] for pair in pairs) for name, pairs in spent.items()}
        for at in (0, 1)
    )
    row = [
        Path(asked.checkpoint).name, asked.dtype, str(asked.limit),
        f"{cpu['lm-eval']:.0f}", f"{cpu['evaluate']:.0f}",
        f"{cpu['lm-eval'] / cpu['evaluate']:.2f}x", f"{wall['lm-eval'] / wall['evaluate']:.2f}x",
        f"{max(gaps):.2g}", f"{statistics.fmean(gaps):.2g}", f"{equal} of {len(same)}",
        "reached" if cpu["lm-eval"] >= 2 * cpu["evaluate"] else "missed",
    ]  # fmt: skip
    head = [
        "checkpoint", "dtype", "questions of each task", "lm-eval, processor s",
        "evaluate, processor s", "ratio", "ratio of wall times", "largest gap, nats",
        "mean gap, nats", "same answer", "2x",
    ]  # fmt: skip
    print("\n".join([*table_head(head), table_row(row)]))
    if asked.save:
        text = PAGE.read_text() if PAGE.is_file() else "\n".join([*ABOUT, *table_head(head), ""])
        PAGE.write_text(text.rstrip() + "\n" + table_row(row) + "\n")


ABOUT = [
    "# Zero-shot tasks: time and agreement with lm-eval",
    "",
    "Measured by `python -m bench.zero_shot CHECKPOINT --save` on CPU: six tasks (PIQA, "
    "WinoGrande, ARC-e, ARC-c, OpenBookQA, BoolQ), each side in a separate process, imports and "
    "loading included. Choices of a question share its text, which evaluate computes once; in "
    "bfloat16 a log-likelihood is the sum of rounded numbers, so the two differ more than in "
    "float32.",
    "",
    "Aims: half of lm-eval's time, and in float32 the same log-likelihoods within 1e-5. What "
    "limits the first: lm-eval, too, computes a text once if all choices are of one token (BoolQ, "
    "whose passages are most of the tokens), and PIQA's choices are longer than its questions, so "
    "there is little to share.",
    "",
]

if __name__ == "__main__":
    main()
