"""The README.md beside a merged checkpoint: what it is, how it was trained, what runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.checkpoint.imported import Imported
from core.prune.model_card import ancestry, fact, front_matter, loading, origin, runs_in, shown
from core.prune.results import Pruning
from core.retrain.spec import LABELS, RetrainSpec


def merged_card(
    spec: RetrainSpec,
    config: Mapping[str, Any],
    *,
    steps: int,
    pruning: Pruning | None = None,
    custom_code: bool = False,
    imported: Imported | None = None,
) -> str:
    """Return the model card of a retrained checkpoint whose adapters, if any, are merged.

    ``steps`` are the optimiser steps taken, ``pruning`` is the record of how the checkpoint was
    pruned; the other arguments are as for `core.prune.model_card.depth_card`.
    """
    base = (pruning.base_model if pruning else "") or spec.checkpoint
    label = LABELS[spec.method]
    pruned = []
    if pruning and pruning.method:
        how = f"{pruning.counted} removed"
        if pruning.method != "depth":
            how = f"heads and neurons removed by {pruning.method}"
        pruned = [fact("pruned before", how)]
    lines = [
        *front_matter(base, f"{spec.method}-retrained"),
        f"# {shown(spec.checkpoint)}, retrained",
        "",
        f"{label}"
        + (", whose adapter is merged into the weights." if spec.method == "lora" else "."),
        "",
        "| | |",
        "| --- | --- |",
        *ancestry(base, spec.checkpoint),
        *pruned,
        fact("trained on", _last(spec.data)),
        f"| optimiser steps | {steps:,} |",
        f"| seed | {spec.seed} |",
        *origin(imported),
        "",
        *loading(custom_code),
        *runs_in(config),
    ]
    return "\n".join(lines)


def _last(data: str) -> str:
    """Return the name of the data without the folders it lies in."""
    return data if data.startswith("hub:") else Path(data).name
