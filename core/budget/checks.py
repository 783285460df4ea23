"""Solve plans for a row of latency budgets, then measure and time them whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.budget import measure, timing, versions
from core.importance.branches import Batch
from core.model.blocks import BlockView
from core.prune import budgets
from core.prune.budgets import Library
from core.prune.plan import default_protection
from core.prune.version_results import OUTPUT_TOKENS, PlanCheck
from core.runs.progress import SILENT, Progress


def check(
    library: Library,
    count: int,
    view: BlockView,
    batch: Batch,
    most: int,
    order: measure.Order | None = None,
    tokenizer: Any = None,
    progress: Progress = SILENT,
    *,
    timed: BlockView | None = None,
) -> list[PlanCheck]:
    """Return up to ``count`` plans of ``library``, as predicted and as measured on ``view``.

    ``timed`` is the model in memory that latencies are measured on; without it there are none.
    Protection is the usual one of plans. ``most`` hidden states are held at once. Empty if
    protection leaves nothing to change.
    """
    found, protect = library.summary, default_protection(library.blocks)
    if sum(protect) >= library.blocks:
        return []
    plans = budgets.frontier(library, count, protect=protect)
    if not plans:
        return []
    parts = [versions.together(solved.choice) for _, solved in plans]
    costs = measure.together(view, batch, parts, most, progress, order)
    dense: timing.Seconds | None = None
    times: Sequence[timing.Seconds | None] = [None] * len(plans)
    if timed:
        dense, times = timing.whole(
            timed,
            [solved.removal for _, solved in plans],
            batch=found.batch,
            context=found.context,
            runs=found.runs,
            steps=found.steps,
            tokenizer=tokenizer,
            progress=progress,
        )
    predicted_dense = library.dense(OUTPUT_TOKENS).latency_s
    return [
        PlanCheck(
            latency=limit,
            predicted_share=solved.figures.latency_s / predicted_dense,
            choice=" ".join(solved.choice),
            predicted_kl=solved.figures.kl,
            kl=costs.of[part][0],
            nll=costs.of[part][1],
            predicted_prefill_s=solved.figures.prefill_s,
            prefill_s=took.prefill if took else None,
            predicted_decode_s=solved.figures.decode_s,
            decode_s=took.decode if took else None,
            dense_prefill_s=dense.prefill if dense else None,
            dense_decode_s=dense.decode if dense else None,
        )
        for (limit, solved), part, took in zip(plans, parts, times, strict=True)
    ]
