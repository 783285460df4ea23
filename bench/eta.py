"""How well the time left is predicted: ``python -m bench.eta [CHECKPOINT] [--save]``.

Runs a scoring, an evaluation and a retraining with its evaluations one after another, each as a
page launches it, and notes every second what its card shows. Compared with the time that it really
took: the estimate before the launch, the prediction after the first tenth of the time, and the
worst prediction from then on. Aim: within 30 % after the first tenth. ``--workspace`` keeps the
runs; a kept one has measured rates, without which the first estimates are at assumed ones.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from bench.dashboard import ROOT, workspace
from core import commands
from core.recipes import make
from core.recipes.spec import RecipeSpec
from core.runs import jobs
from core.runs.spec import build
from core.runs.workspace import Workspace, read_run

RESULT = ROOT / "docs" / "results" / "eta.md"
REAL = ROOT.parent / "shared" / "real"
DROP = "4,5,12,13,14,16,17,18"
"""Blocks of SmolLM2 whose removal costs least perplexity."""
AIM = 0.3


def watched(command: str, values: dict[str, Any], where: Workspace) -> tuple[float, list[Any]]:
    """Run a command; return its seconds, and what its card predicted as (elapsed, total)."""
    record = jobs.launch(command, values, where)
    told = []
    while record.is_live:
        time.sleep(1.0)
        record = read_run(record.path) or record
        if record.eta_s is not None and record.is_live:
            told.append((record.seconds, record.seconds + record.eta_s))
    if record.state != "done":
        raise SystemExit(f"{command} {record.state}: {record.error} {record.hint}")
    return record.seconds, told


def before(command: str, values: dict[str, Any]) -> float | None:
    """Return the estimate before the launch."""
    spec = build(commands.get(command).spec_class, {**values, "out": "DIR"})
    if isinstance(spec, RecipeSpec):
        found = make.expected(spec)
        return found.total if found else None
    seconds = commands.get(command).load().dry_run(spec)["seconds"]
    return None if seconds is None else float(seconds)


def row(command: str, values: dict[str, Any], where: Workspace) -> str:
    """Run a command and return its row of the table."""
    guess = before(command, values)
    real, told = watched(command, values, where)
    later = [total / real - 1 for at, total in told if at >= 0.1 * real]
    first = f"{later[0]:+.0%}" if later else "none shown"
    worst = f"{max(later, key=abs):+.0%}" if later else ""
    shown = "unknown" if guess is None else f"{guess:.0f} ({guess / real - 1:+.0%})"
    line = f"| {command} | {shown} | {real:.0f} | {first} | {worst} |"
    print(line, flush=True)
    return line


def runs_of(
    name: str, real: Path, steps: int, batch: int | None
) -> list[tuple[str, dict[str, Any]]]:
    """Return the commands to time, with their options."""
    text = str(real / "text" / "alpaca_999.jsonl") if name != "demo" else "demo"
    drop = DROP if name != "demo" else "4,6"
    tasks: dict[str, Any] = {"tasks": ("demo",), "limit": 20}
    if name != "demo":
        tasks = {"tasks": ("arc_easy",), "limit": 20, "task_dir": str(real / "tasks"),
                 "allow_task_code": True}  # fmt: skip
    source = "demo" if name == "demo" else "english"
    evaluate = {"checkpoint": name, "perplexity": (source,), "max_tokens": 32768, **tasks}
    lora = {"checkpoint": "cut", "method": "lora", "data": text, "dense": name, "merge": True}
    blocks = tuple(int(block) for block in drop.split(","))
    recipe = {"name": "make", "checkpoint": name, "drop": blocks, "retrain": "lora",
              "width": "flap", "steps": steps, "data": f"{text},{source}"}  # fmt: skip
    return [
        ("importance", {"checkpoint": name}),
        ("evaluate", evaluate),
        ("prune", {"checkpoint": name, "drop": blocks}),
        ("retrain", {**lora, "steps": steps, "batch": batch}),
        ("recipe", recipe),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--workspace", default="")
    parser.add_argument("--real", type=Path, default=REAL, help="folder of text/ and tasks/")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--batch", type=int, help="rows of a step; the default of the size if not")
    parser.add_argument("--only", nargs="*", default=[], help="commands to run")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    asked = parser.parse_args()
    rows = ["| run | estimated before, s | took, s | predicted after a tenth | worst after that |"]
    rows += ["| --- | ---: | ---: | ---: | ---: |"]
    with workspace(asked.workspace) as folder:
        where = Workspace(folder)
        cut = None
        given = asked.checkpoint, asked.real.absolute(), asked.steps, asked.batch
        for command, values in runs_of(*given):
            if command == "prune":
                record = jobs.launch(command, values, where)
                while (record := read_run(record.path) or record).is_live:
                    time.sleep(0.2)
                cut = str(record.path)
                continue
            if command == "retrain":
                values["checkpoint"] = cut
            if not asked.only or command in asked.only:
                rows.append(row(command, values, where))
    text = "\n".join(
        [
            "# The time left: predicted and real",
            "",
            f"`python -m bench.eta {asked.checkpoint} --steps {asked.steps}`, {os.cpu_count()} "
            f"cores, load {os.getloadavg()[0]:.1f} at the end. A prediction is the whole time that "
            f"the run's card implied, relative to what it took; the aim is {AIM:.0%}.",
            "",
            *rows,
            "",
        ]
    )
    if asked.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
