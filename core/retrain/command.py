"""``python -m core retrain CHECKPOINT --method lora --data SOURCE --out DIR``.

The options are in `core.retrain.spec.RetrainSpec`. This module does not import torch at its top.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint import locate
from core.checkpoint.vocabulary import text_of
from core.retrain.spec import RetrainSpec

if TYPE_CHECKING:
    from core.runs.run import Run

__all__ = ("RetrainSpec", "dry_run", "run")


def run(spec: RetrainSpec, run: Run) -> None:
    """Retrain inside a run directory."""
    from core.retrain import tracking
    from core.retrain.phases import retrain

    tracking.check(spec.report_to)
    if spec.lr_range_test:
        from core.retrain.rates import range_test

        range_test(_with_text(spec), run)
        return
    retrain(_with_text(spec), run)


def dry_run(spec: RetrainSpec) -> dict[str, Any]:
    """Return trainable parameters, memory needed and free, tokens and steps, without torch."""
    from core.retrain import tracking
    from core.retrain.estimate import estimate

    tracking.check(spec.report_to)
    return estimate(_with_text(spec))


def _with_text(spec: RetrainSpec) -> RetrainSpec:
    folder = locate.local_folder(spec.checkpoint) or Path(spec.checkpoint)
    return replace(spec, data=text_of(spec.data, folder))
