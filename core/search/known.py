"""What pages show of finished searches: lists, labels and the table of sets. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.checkpoint.headers import CheckpointInfo
from core.prune.results import perplexity
from core.runs.workspace import RunRecord, Workspace
from core.search.results import Search, SetRow
from core.search.units import BLOCK


def searches(where: Workspace, info: CheckpointInfo) -> list[RunRecord]:
    """Return the finished searches of exactly these weights, newest first."""
    done = [r for r in where.runs("search") if r.state == "done"]
    return [r for r in done if info.key and _summary(r).checkpoint_key == info.key]


def of_blocks(where: Workspace, info: CheckpointInfo) -> list[RunRecord]:
    """Return the finished searches for whole blocks, newest first."""
    return [r for r in searches(where, info) if _summary(r).units == BLOCK]


def _summary(record: RunRecord) -> Search:
    return Search.read(record.path) or Search()


def label_of(record: RunRecord, name: str) -> str:
    """Label of a search called ``name`` in a list, with its methods and its calibration text."""
    found = _summary(record)
    healed = f", healed by {found.heal}" if found.heal != "none" else ""
    parts = "" if found.units == BLOCK else "parts of blocks, "
    return f"{name}: {parts}{', '.join(found.methods)}{healed}; {_calibration(found)}"


def _calibration(found: Search) -> str:
    text = Path(found.calibration or "").name
    return f"{text}, {found.samples} x {found.length} tokens, seed {found.seed}"


def measured_on(found: Search, *, heldout: bool = True) -> str:
    """Return the line under a search's figures: texts, size, seed, device, precision."""
    parts = [f"calibration text {_calibration(found)} ({found.tokens:,} predictions)"]
    if found.heal != "none":
        parts = [
            f"calibration text {_calibration(found)}, healed by {found.heal} on "
            f"{found.fitted_tokens:,} tokens and measured on the other quarter of the rows "
            f"({found.tokens:,} predictions)"
        ]
    if heldout and found.heldout:
        parts.append(f"held-out text: {found.heldout} ({found.heldout_tokens:,} predictions)")
    elif heldout:
        parts.append("no held-out text")
    return (
        f"Measured: {'; '.join(parts)}; {found.device}, {found.compute_dtype or found.dtype}."
        + "".join(f" {note}" for note in found.text.notes)
    )


def in_order(rows: Sequence[SetRow]) -> tuple[SetRow, ...]:
    """Return rows by count, the cheapest on the calibration rows first."""
    return tuple(sorted(rows, key=lambda row: (row.count, row.cost)))


def cells(rows: Sequence[SetRow], found: Search) -> list[dict[str, Any]]:
    """Return the table of sets, one row each in the order of ``rows``."""
    healed = any(row.heal != "none" for row in rows)
    return [
        {
            "removed": row.count,
            "method": row.method,
            **({"healed": row.heal} if healed else {}),
            **_dropped(row),
            **({"KL, not healed": row.unhealed_kl} if healed else {}),
            "KL, calibration": row.kl,
            "KL, held-out": row.heldout_kl,
            "perplexity, calibration": perplexity(row.nll),
            "perplexity, held-out": perplexity(row.heldout_nll),
            "parameters removed": row.ratio,
            "block passes": row.passes,
            "seconds": row.seconds,
        }
        for row in rows
    ]


def _dropped(row: SetRow) -> dict[str, str]:
    """Return the cell that names what goes."""
    if row.removal.partial or not row.blocks:
        return {"dropped": row.removal.text}
    return {"blocks dropped": ", ".join(map(str, sorted(row.blocks)))}
