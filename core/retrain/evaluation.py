"""Further evaluation of the dense, the pruned and the retrained model: what knowledge is kept.

Loss and KL(dense || model) of next-token distributions on held-out rows and on other sources, and
the accuracy per skill on the demo world's questions, in one table with a row per measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from core.model.tokens import check_ids, embedded
from core.retrain import sharded
from core.retrain.encoders import ModelTokenizer
from core.retrain.loss import autocast, eval_mode, heldout_loss, mean_kl
from core.retrain.results import Measure
from core.retrain.rows import RowSet
from core.retrain.spec import RetrainSpec
from core.runs.progress import SILENT, Progress
from core.runs.ranks import ALONE, Ranks


class EvaluationTable:
    """Measures of all three models, filled in one model at a time; false if none was requested."""

    def __init__(
        self, spec: RetrainSpec, rows: RowSet, encoder: ModelTokenizer, device: torch.device
    ) -> None:
        """Prepare the evaluation on ``rows`` that ``spec`` asks for; nothing is measured yet."""
        self._spec, self._encoder, self._device = spec, encoder, device
        self._sources = {"held out": rows.heldout, **rows.also}
        self._table: dict[tuple[str, str], Measure] = {}
        self._done: set[str] = set()

    def __bool__(self) -> bool:
        """Whether more than the held-out loss was requested."""
        return bool(self._spec.retention or self._spec.also or self._spec.questions)

    def has(self, column: str) -> bool:
        """Whether ``column`` (dense, before, after) has been measured."""
        return column in self._done

    def measure(
        self,
        column: str,
        model: Any,
        compute: torch.dtype | None,
        dense: Any = None,
        progress: Progress = SILENT,
        ranks: Ranks = ALONE,
    ) -> None:
        """Measure one model; with ``dense`` also the KL divergence from the dense model.

        ``ranks`` share the rows; each asks all questions.
        """
        how = (self._device, compute, progress, ranks)
        for source, rows in self._sources.items():
            items = sum(row.items for row in rows)
            self._put(source, "loss", column, heldout_loss(model, rows, *how), items)
            if dense is not None:
                self._put(source, "kl", column, mean_kl(model, dense, rows, *how), items)
        if self._spec.questions:
            with eval_mode([model]), autocast(self._device, compute, model):
                self._ask(column, model, progress)
        for one in (model, dense):
            sharded.release(one)
        self._done.add(column)

    def _ask(self, column: str, model: Any, progress: Progress) -> None:
        """Ask the demo world's questions; the choice with the highest likelihood is the answer."""
        from core.demo.evaluate import accuracy
        from core.demo.questions import SKILLS

        count = self._spec.questions
        for skill in SKILLS:
            share = accuracy(
                _on(model, self._device),  # type: ignore[arg-type]
                self._encoder.tokenizer,
                skill,
                count,
            )
            self._put(skill, "accuracy", column, share, count)
            progress.check_cancel()

    def _put(self, source: str, measure: str, column: str, value: float, items: int) -> None:
        row = self._table.get((source, measure))
        row = row or Measure(source=source, measure=measure, items=items)
        self._table[source, measure] = replace(row, **{column: value})  # type: ignore[arg-type]

    def rows(self) -> list[Measure]:
        """Return the rows of evaluation.csv."""
        return list(self._table.values())


def _on(model: Any, device: torch.device) -> Callable[..., Any]:
    """Return ``model`` as a function that takes ids and returns logits on the CPU."""

    def call(input_ids: torch.Tensor, use_cache: bool) -> Any:
        check_ids(input_ids.tolist(), embedded(model))
        found = model(input_ids=input_ids.to(device), use_cache=use_cache)
        return SimpleNamespace(logits=found.logits.cpu())

    return call
