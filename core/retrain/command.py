"""``python -m core retrain CHECKPOINT --method lora --data SOURCE --out DIR``.

The options are in `core.retrain.spec.RetrainSpec`. This module does not import torch at its top.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint import locate
from core.checkpoint.vocabulary import text_of
from core.errors import OptionError
from core.retrain.spec import NF4, RetrainSpec

if TYPE_CHECKING:
    from core.runs.run import Run

__all__ = ("RetrainSpec", "dry_run", "run")


def run(spec: RetrainSpec, run: Run) -> None:
    """Retrain inside a run directory."""
    from core.retrain.phases import retrain

    _check(spec)
    if spec.lr_range_test:
        from core.retrain.rates import range_test

        range_test(_with_text(spec), run)
        return
    retrain(_with_text(spec), run)


def dry_run(spec: RetrainSpec) -> dict[str, Any]:
    """Return trainable parameters, memory needed and free, tokens and steps, without torch."""
    from core.retrain.estimate import estimate

    _check(spec)
    return estimate(_with_text(spec))


def _check(spec: RetrainSpec) -> None:
    """Raise `OptionError` if a package that the options need is not installed."""
    from core.retrain import tracking

    tracking.check(spec.report_to)
    if spec.quantized_base == NF4 and not tracking.is_installed("bitsandbytes"):
        raise OptionError(
            f"--quantized-base {NF4}: the package bitsandbytes is not installed.",
            "Install it with: pip install bitsandbytes. Or use int8 or int4, which need no more.",
        )


def _with_text(spec: RetrainSpec) -> RetrainSpec:
    folder = locate.local_folder(spec.checkpoint) or Path(spec.checkpoint)
    return replace(spec, data=text_of(spec.data, folder))
