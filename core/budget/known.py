"""What pages show of finished budget runs: lists, labels, and the pairs that go with them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from core.checkpoint.headers import CheckpointInfo
from core.prune.set_results import Search
from core.prune.version_results import (
    NOISY,
    ROUGH,
    VERSIONS,
    WHOLE,
    Budget,
    PlanCheck,
    latency_errors,
)
from core.runs.workspace import RunRecord, Workspace
from core.search.results import PairRow


def budget_runs(where: Workspace, info: CheckpointInfo) -> list[RunRecord]:
    """Return finished budget runs of exactly these weights: newest first, steps of recipes last."""
    done = [r for r in where.runs("budget") if r.state == "done"]
    own = [r for r in done if info.key and summary_of(r).checkpoint_key == info.key]
    return sorted(own, key=lambda record: bool(record.parent))


def summary_of(record: RunRecord) -> Budget:
    """Return what a budget run measured; all defaults if it has left no summary."""
    return Budget.read(record.path) or Budget()


def with_pairs(where: Workspace, budget: Budget) -> RunRecord | None:
    """Return the newest search whose pairs a budget run can count; None without one.

    It is of the same weights and on the same text.
    """
    measured = budget.checkpoint_key, budget.calibration_content
    for record in where.runs("search"):
        found = Search.read(record.path) if record.state == "done" else None
        if not found or (found.checkpoint_key, found.calibration_content) != measured:
            continue
        if (
            found.objective == "kl"
            and found.heal == "none"
            and found.units == "block"
            and PairRow.read(record.path)
        ):
            return record
    return None


def label_of(record: RunRecord, name: str) -> str:
    """Label of a budget run called ``name`` in a list."""
    found = summary_of(record)
    return f"{name}: batch {found.batch}, context {found.context}, {found.device}"


def measured_on(found: Budget) -> str:
    """Return the line under a budget's figures: what KL and times were measured on."""
    text = Path(found.calibration or "").name
    varying = f", steps vary by {found.noise:.0%}" if found.noise is not None else ""
    return (
        f"Measured one block at a time: KL on {text}, {found.samples} x {found.length} tokens, "
        f"seed {found.seed} ({found.tokens:,} predictions), {found.compute_dtype}; times on "
        f"{found.device}, {found.timed_dtype}, batch {found.batch}, {found.context:,} tokens of "
        f"prompt, median of {found.runs}{varying}."
        + "".join(f" {note}" for note in found.text.notes)
    )


def noise_in_words(found: Budget) -> str:
    """Return a warning if the times of a run vary too much to be relied on; else empty."""
    if found.noise is None or found.noise <= NOISY:
        return ""
    return (
        f"Times of the same step varied by {found.noise:.0%}, so this machine was busy: measure "
        "the versions again when nothing else is running."
    )


def checked_in_words(rows: Sequence[PlanCheck], output_tokens: int) -> str:
    """Return how far predictions of plans measured whole are off, in words; empty if none."""
    errors = latency_errors(rows, output_tokens)
    if not errors:
        return ""
    middle = statistics.median(errors)
    text = (
        f"Measured on {len(rows)} plans: predicted latency is off by {middle:.1%} (median) and "
        f"{max(errors):.1%} (largest)"
    )
    text += ", so it is rough" if middle > ROUGH else ""
    shares = [row.kl / row.predicted_kl for row in rows if row.kl and row.predicted_kl > 0]
    if shares:
        text += (
            f"; measured KL is {min(shares):.2f} to {max(shares):.2f} times the predicted sum of "
            "single changes"
        )
    return f"{text}."


def becomes(choice: Sequence[str]) -> str:
    """Count the versions of a choice in words: 2 dropped, 3 without attention, 25 whole."""
    parts = [f"{choice.count(name)} {word}" for name, word in VERSIONS.items() if name in choice]
    return ", ".join([*parts, f"{choice.count(WHOLE)} whole"])
