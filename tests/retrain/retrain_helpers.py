"""Shared by the retraining tests: instruction rows, and the command in this process."""

import json
import random

import tiny

from core import commands
from core.retrain.spec import RetrainSpec
from core.runs import run


def instructions(count, seed=3):
    """Return instruction rows over the tiny tokenizer's world."""
    rng = random.Random(seed)
    lines = tiny.text(count * 2, seed).splitlines()
    return [
        {
            "instruction": f"Say {lines[2 * i]}",
            "input": rng.choice(["", "softly", "in the garden by the river"]),
            "output": " ".join(lines[2 * i + 1].split()[: rng.randint(2, 9)]),
        }
        for i in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def execute(**options):
    """Run the command in this process and return its exit status."""
    return run.execute(commands.get("retrain"), RetrainSpec(**{"device": "cpu", **options}))


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def dies_after(patch, step):
    """Have a training killed when ``step`` has ended."""
    from core.retrain import trainer

    usual = trainer.StepWatcher.on_step_end

    def dying(self, args, state, control, **kwargs):
        usual(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise SystemExit(9)

    patch.setattr(trainer.StepWatcher, "on_step_end", dying)
