"""The README.md written beside a width-pruned checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core import words
from core.checkpoint.imported import Imported
from core.prune.model_card import (
    ancestry,
    fact,
    front_matter,
    healing,
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
        f"{'unchanged' if not record.healed else 'unchanged but for refitted output projections'}."
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
        *_extent(record),
        *origin(imported),
        *healing(record.healing),
        f"| what each block keeps | {'; '.join(kept)} |",
        "",
        *loading(custom_code),
        *runs_in(config),
    ]
    return "\n".join(lines)


def _extent(record: WidthPruning) -> list[str]:
    """Return the table's rows on the blocks that could be cut, and on rounding."""
    attention, mlp = record.attention_layers, record.mlp_layers
    if attention == mlp:
        rows = [("blocks that could be cut", _blocks(attention))]
    else:
        rows = [
            ("blocks whose attention could be cut", _blocks(attention)),
            ("blocks whose MLP could be cut", _blocks(mlp)),
        ]
    if record.round_to:
        rows.append(("widths rounded to multiples of", str(record.round_to)))
    return [fact(*row) for row in rows]


def _blocks(numbers: tuple[int, ...] | None) -> str:
    return words.block_ranges(numbers or ()) or "none"
