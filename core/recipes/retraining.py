"""What the retraining recipes share: a pruned variant, its training options, one long table.

A recipe takes a pruned checkpoint, or a dense one that it prunes first (a quarter of its
parameters by perplexity, or ``--ratio``). Each writes ``table.csv``: what was retrained how, what
it was judged on, by which measure. No torch here.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from core import checkpoint, data, workspace
from core.recipes import parts
from core.recipes.chain import Chain, Step
from core.retrain.recovery import Recovery
from core.retrain.spec import RATES, SMALL

QUARTER = 0.25
STEPS = 40
COLUMNS = ("variant", "judged_on", "measure", "value", "spread", "items")
"""Of table.csv; ``measure``: loss and kl (nat per token), recovered and accuracy (shares)."""
HELD = 200
SPLIT_SEED = 402


def pruned_steps(spec: Any) -> list[Step]:
    """Return the steps that prune the checkpoint; none where it is a pruned one."""
    if _is_pruned(spec.checkpoint):
        return []
    ratio = spec.ratio or QUARTER
    return [
        parts.scored(spec, metrics=("ppl",), calibration="demo"),
        *parts.cut(spec, "pruned", "ppl", plan="plan", ratio=ratio),
    ]


def _is_pruned(name: str) -> bool:
    folder = checkpoint.local_folder(name)
    return bool(folder and (folder / "pruning.json").is_file())


def variant(chain: Chain) -> str:
    """Return the pruned checkpoint that is retrained."""
    if _is_pruned(chain.spec.checkpoint):
        return str(chain.spec.checkpoint)
    return str(chain.dir("pruned"))


def options(chain: Chain, method: str, **more: Any) -> dict[str, Any]:
    """Return the options of a retraining of the variant; ``more`` goes on top."""
    name = str(more.pop("checkpoint", "") or variant(chain))
    info = checkpoint.inspect(checkpoint.resolve(name))
    steps = chain.spec.steps or STEPS
    return {
        "checkpoint": name,
        "method": method,
        "data": chain.spec.data or "demo",
        "steps": steps,
        "lr": RATES["small" if info.parameters < SMALL else "large"][method],
        "cutoff": min(256, info.context),
        "eval_every": max(1, steps // 4),
        **more,
    }


def split(chain: Chain, source: str, name: str) -> tuple[str, str]:
    """Write the rows of a SOURCE to train on and to judge by; return the paths of both files.

    ``demo`` and ``demo-stories`` are the demo world's instructions and its stories.
    """
    train, held = (chain.folder / "data" / f"{name}-{use}.jsonl" for use in ("train", "heldout"))
    if not (train.is_file() and held.is_file()):
        rows, judges = _rows(source)
        for path, found in ((train, rows), (held, judges)):
            lines = (json.dumps(row, default=str) + "\n" for row in found)
            workspace.write_text(path, "".join(lines))
    return str(train), str(held)


def _rows(source: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if source == "demo":
        found, judges = (list(data.instruction_rows(source, u)) for u in ("train", "heldout"))
        return found, judges[:HELD]
    if source == "demo-stories":
        stories = (data.text_rows("demo", use) for use in ("train", "heldout"))
        found, judges = ([{"text": text} for text in texts] for texts in stories)
        return found, judges[:HELD]
    rows = data.rows_of(source, "train")
    random.Random(SPLIT_SEED).shuffle(rows)
    count = min(HELD, max(1, len(rows) // 10))
    return rows[count:], rows[:count]


def recovered(dense: Any, before: Any, after: Any) -> float | None:
    """Return the share of the gap that was closed; None where it is not stated."""
    values = [None if v in (None, "") else float(v) for v in (dense, before, after)]
    if values[1] is None or values[2] is None:
        return None
    return Recovery(values[0], values[1], values[2]).recovered


def write_table(chain: Chain, rows: list[dict[str, Any]]) -> None:
    """Write table.csv; a row has some of `COLUMNS`."""
    lines = [[row.get(column) for column in COLUMNS] for row in rows]
    workspace.write_csv(chain.folder / "table.csv", COLUMNS, lines)


def percent(share: float | None) -> str:
    """Return a recovered share in words."""
    return "no share stated (gap under 0.05 nat)" if share is None else f"{share:.0%}"


def measured(chain: Chain, step: str) -> str:
    """Return the sentence that says what the figures were measured on."""
    found = chain.json(step)
    held, made = found["heldout"], found["settings"]
    return (
        f"Measured on {found['device']} in {found['compute_dtype']}: {held['rows']} held-out rows "
        f"of {Path(held['source']).name} ({held['tokens']} predicted tokens), {found['steps']} "
        f"steps of {made['batch']} sequences on {Path(found['data']['source']).name}."
    )
