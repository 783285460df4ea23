"""``python -m core plan SCORES --criterion NAME --count K``: the blocks to drop, as JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from core.checkpoint import headers, locate
from core.criteria import SUBLAYERS
from core.errors import CheckpointError
from core.prune import plan
from core.prune import scores as block_scores
from core.runs.progress import StderrProgress
from core.runs.spec import option


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """Choose the blocks to drop."""

    scores: str = option(
        positional=True, help="Folder of an importance or search run, or a CSV of per-block scores."
    )
    criterion: str = option(
        help="Criterion that ranks the blocks: " + ", ".join(block_scores.CRITERIA) + "."
    )
    count: int | None = option(None, help="Number of blocks to drop; of parts, by sublayers.")
    ratio: float | None = option(
        None, help="Share of all parameters to remove; the closest number of blocks is used."
    )
    params: int | None = option(
        None, help="Target parameter count; the closest number of blocks is used."
    )
    checkpoint: str | None = option(
        None, help="The checkpoint that was scored; a folder with only config.json is enough."
    )
    protect_first: int | None = option(
        None, help="First blocks to keep. Default: 4 of 12 or more blocks, 1 of fewer, 0 of 2."
    )
    protect_last: int | None = option(
        None, help="Last blocks to keep. Default: 2 of 12 or more blocks, 1 of fewer, 0 of 2."
    )
    seed: int = option(1234, help="Seed of the random criterion.")


def run(spec: PlanSpec) -> dict[str, Any]:
    """Return the plan as printed: `Plan.to_dict` with the schema version."""
    scores = block_scores.load(spec.scores)
    choice = plan.choose(
        scores,
        spec.criterion,
        count=spec.count,
        ratio=spec.ratio,
        params=spec.params,
        info=_info(spec, scores),
        protect_first=spec.protect_first,
        protect_last=spec.protect_last,
        seed=spec.seed,
    )
    print(_sentence(choice), file=sys.stderr)
    return {"schema": 1, **choice.to_dict()}


def _info(spec: PlanSpec, scores: block_scores.BlockScores) -> headers.CheckpointInfo | None:
    """Inspect the given checkpoint, or the one the run scored if it still exists."""
    if spec.checkpoint:
        return locate.open(
            spec.checkpoint, StderrProgress(), need="headers", need_tokenizer=False
        ).info
    folder_or_none = locate.local_folder(scores.checkpoint) if scores.checkpoint else None
    if folder_or_none is None:
        return None
    try:
        info = locate.at(folder_or_none).info
    except CheckpointError:
        return None
    return info if info.blocks == scores.blocks else None


def _sentence(choice: plan.Plan) -> str:
    parts = len(choice.attention) + len(choice.mlp)
    text = f"Drop {len(choice.drop)} of {choice.blocks} blocks"
    if choice.criterion == SUBLAYERS:
        text = f"Remove {2 * len(choice.drop) + parts} of {2 * choice.blocks} parts of blocks"
        text += f" ({choice.removal.text})"
    text += (
        f" by {choice.criterion}; "
        f"first {choice.protect_first} and last {choice.protect_last} protected"
    )
    if choice.params is not None and choice.ratio is not None:
        text += f"; {choice.params:,} parameters left, ratio {choice.ratio:.4f}"
    return text + "."
