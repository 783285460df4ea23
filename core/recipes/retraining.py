"""What the retraining recipes share: a pruned variant, its training options, one long table.

A recipe takes a pruned checkpoint, or a dense one that it prunes first (a quarter of its
parameters by perplexity, or ``--ratio``). Each writes ``table.csv``: what was retrained and how,
what it was evaluated on, and by which measure. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core import words
from core.checkpoint import locate
from core.errors import RunError
from core.prune.results import Pruning
from core.recipes import parts, texts
from core.recipes.chain import Chain, Step
from core.recipes.spec import RecipeSpec
from core.retrain.recovery import BEYOND, Held, Recovery
from core.retrain.results import Measure, Summary, read_measures
from core.retrain.spec import rate_of

QUARTER = 0.25
STEPS = 40


def pruned_steps(spec: RecipeSpec) -> list[Step]:
    """Return the steps that prune the checkpoint; none if it is already pruned."""
    if _is_pruned(spec.checkpoint):
        return []
    ratio = spec.ratio or QUARTER
    return [
        parts.scored(spec, metrics=("ppl",), calibration="auto"),
        *parts.cut(spec, "pruned", "ppl", plan="plan", ratio=ratio),
    ]


def _is_pruned(name: str) -> bool:
    folder = locate.local_folder(name)
    return bool(folder and (folder / Pruning.FILE).is_file())


def variant(chain: Chain) -> str:
    """Return the pruned checkpoint that is retrained."""
    if _is_pruned(chain.spec.checkpoint):
        return str(chain.spec.checkpoint)
    return str(chain.dir("pruned"))


def options(chain: Chain, method: str, **more: Any) -> dict[str, Any]:
    """Return the options for retraining the variant; ``more`` overrides them."""
    name = str(more.pop("checkpoint", "") or variant(chain))
    info = locate.open(name).info
    steps = chain.spec.steps or STEPS
    return {
        "checkpoint": name,
        "method": method,
        "data": texts.data_of(chain.spec),
        "steps": steps,
        "lr": rate_of(method, info.parameters),
        "cutoff": min(256, info.context),
        "eval_every": max(1, steps // 4),
        **more,
    }


def restoring(chain: Chain, name: str, **more: Any) -> dict[str, Any]:
    """Return the options for LoRA on the step ``name``, compared with dense and then merged."""
    found = options(chain, "lora", checkpoint=str(chain.dir(name)), **more)
    return {**found, "dense": chain.spec.checkpoint, "merge": True}


def none_left(chain: Chain) -> RunError:
    """Return the error of a recipe all of whose trainings failed."""
    why = next(iter(chain.failed.values()))
    return RunError(f"All {len(chain.failed)} trainings failed. {why}", "Fix that, then restart.")


def recovered(dense: float | None, before: float | None, after: float | None) -> float | None:
    """Return the share of the gap that was closed; None if it is not reported."""
    if before is None or after is None:
        return None
    return Recovery(dense, Held(before), Held(after)).recovered


def evaluation_rows(chain: Chain, step: str) -> tuple[Measure, ...]:
    """Return a retraining step's table of further evaluation; raises `RunError` if missing."""
    return read_measures(chain.dir(step)) or chain.table(step, Measure)


def percent(share: float | None) -> str:
    """Return a recovered share as text."""
    if share is None:
        return "recovery not reported (gap below 0.05 nats)"
    return words.percent(share) + (" (better than dense)" if share > BEYOND else "")


def measured(chain: Chain, step: str) -> str:
    """Return the sentence on what the figures were measured on."""
    found = chain.read(step, Summary)
    held = found.heldout
    return (
        f"Measured on {found.device} in {found.compute_dtype}: {held.rows} held-out rows "
        f"of {Path(held.source).name} ({held.tokens} predicted tokens), {found.steps} "
        f"steps of {found.settings.batch} sequences on {Path(found.data.source).name}."
    )
