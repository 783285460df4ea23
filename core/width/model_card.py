"""The README.md written beside a width-pruned checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.checkpoint.imported import Imported
from core.prune.model_card import (
    ancestry,
    fact,
    front_matter,
    loading,
    origin,
    parameters,
    runs_in,
    shown,
)
from core.width.results import WidthPruning


def width_card(
    record: WidthPruning,
    config: Mapping[str, Any],
    *,
    custom_code: bool = False,
    imported: Imported | None = None,
) -> str:
    """Return the model card of a width-pruned checkpoint; arguments as for `depth_card`."""
    text = record.calibration
    calibrated_on = text.label if text else "nothing: the scores use the weights alone"
    kept = [f"{b.block}: {b.heads} heads, {b.neurons} neurons" for b in record.blocks]
    bias = record.bias_compensation
    lines = [
        *front_matter(record.base_model, "width-pruning"),
        f"# {shown(record.base_model)}, narrower by {record.label}",
        "",
        "Width pruning: attention heads and MLP neurons are removed; all other weights are "
        "unchanged."
        + (" Biases of the output projections compensate for them." if bias else "")
        + " The model was not retrained after this cut.",
        "",
        "| | |",
        "| --- | --- |",
        *ancestry(record.base_model, record.source),
        fact("criterion", record.criterion),
        f"| the method's own ratio | {record.method_ratio:.6g} |",
        fact("calibrated on", calibrated_on),
        parameters(record),
        *origin(imported),
        f"| what each block keeps | {'; '.join(kept)} |",
        "",
        *loading(custom_code),
        *runs_in(config),
    ]
    return "\n".join(lines)
