"""Measures sets of blocks on a loaded model: the ledger's eyes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from core.heal.healing import Kept, Repair, applied, heal
from core.importance.branches import Batch, States, losses_without, states_without
from core.importance.streams import Files, OnDisk
from core.model.blocks import BlockView
from core.model.precision import arithmetic_of
from core.runs.progress import Progress
from core.search.ledger import NONE, Cost, Drop, Group, Healed
from core.search.units import BLOCK, SUBLAYER, Units


class Share(Progress):
    """Reports one pass as a part of the whole search."""

    def __init__(self, whole: Progress, done: Callable[[], int], expected: int) -> None:
        """Report to ``whole``: ``done()`` block passes before this pass, ``expected`` in total."""
        self.whole, self.done, self.expected, self.label = whole, done, expected, ""

    def step(
        self, done: int, total: int, message: str = "", *, left_s: float | None = None
    ) -> None:
        """Report progress in block passes; the whole is an estimate and grows if exceeded."""
        place = self.done() + done
        self.whole.step(place, max(self.expected, place + 1), f"{self.label}: {message}")

    def check_cancel(self) -> None:
        """Stop if asked to."""
        self.whole.check_cancel()


class Healer:
    """Heals sets on one batch and measures them on the quarter of it that is held out."""

    def __init__(
        self,
        view: BlockView,
        batch: Batch,
        method: str,
        stored: Mapping[str, torch.dtype],
        progress: Progress,
        units: Units | None = None,
        keep: bool = True,
        folder: Path | None = None,
    ) -> None:
        """Heal ``view`` by ``method`` on ``batch``; tensors are rounded to the formats stored.

        With ``keep`` the dense streams are computed once and kept, see `Kept`; with ``folder``
        those of a cut are on its disk.
        """
        self.keep, self.folder = keep, folder
        self.view, self.batch, self.method = view, batch, method
        self.stored, self.progress = stored, progress
        self.units = units or Units(BLOCK, len(view))
        self.kept: Kept | None = None
        self.dense_nll: float | None = None
        """Of the dense model on the rows that repairs are measured on; None before the first."""

    def repair(self, drop: Drop) -> Repair:
        """Return the repair of the model without ``drop``."""
        if self.keep and self.kept is None:
            self.kept = Kept(self.view, self.batch, self.progress)
        found = heal(
            self.view,
            self.units.removal(drop),
            self.batch,
            self.method,
            self.progress,
            stored=self.stored,
            kept=self.kept,
            folder=self.folder,
        )
        self.dense_nll = found.nll_dense
        return found

    def __call__(self, drop: Drop) -> Healed:
        """Return what ``drop`` costs after healing."""
        began = time.perf_counter()
        found = self.repair(drop)
        return Healed(
            Cost(found.nll_after, found.kl_after),
            Cost(found.nll_before, found.kl_before),
            self.units.healing(self.method, drop, kept=self.keep),
            time.perf_counter() - began,
        )

    def measured(self, sets: Sequence[Drop], meter: Meter) -> dict[Drop, Cost]:
        """Return the costs of ``sets``, each healed, on the rows of ``meter``, and the dense one's.

        Every set is healed again: repairs of all sets would take too much memory.
        """
        costs = dict(zip([NONE], meter([NONE]).costs, strict=True))
        for drop in sets:
            with applied(self.view, self.repair(drop)):
                costs[drop] = meter([drop]).costs[0]
        return costs


class Meter:
    """Measures groups of sets on one batch; keeps the dense model's last states to compare with."""

    def __init__(
        self,
        view: BlockView,
        batch: Batch,
        progress: Progress,
        units: Units | None = None,
        files: Files | None = None,
    ) -> None:
        """Measure ``view`` on ``batch``; sets are of ``units``, by default whole blocks.

        If the batch has groups of rows, the dense states are in ``files``.
        """
        self.view, self.batch, self.progress = view, batch, progress
        self.units = units or Units(BLOCK, len(view))
        self.dense: States | None = None
        self.files = files if len(batch.groups) > 1 else None
        self.stream: OnDisk | None = None
        """The dense states, if they are in a file."""
        self.rows: dict[Drop, list[tuple[int, float, float]]] = {}
        """Predictions, mean NLL and mean KL of every row, for the sets measured so far."""

    def __call__(self, sets: Sequence[Drop]) -> Group:
        """Return the costs of distinct ``sets`` in one pass.

        The dense states come from the first pass, which has the empty set. A resumed search that
        has that pass on tape computes them again, without counting it: its counts are those of
        an uninterrupted one.
        """
        if self.dense is None and NONE not in sets:  # not of groups: they begin with the empty set
            self.dense = states_without(self.view, self.batch, [NONE], self.progress)[0]
        began = time.perf_counter()
        if self.files and self.stream is None:
            dtype = arithmetic_of(self.view.dtype, self.view.device)
            shape = (*self.batch.ids.shape, self.view.hidden_size)
            self.stream = OnDisk(self.files, shape, dtype)
        losses = losses_without(
            self.view,
            self.batch,
            self.units.sets(sets),
            self.progress,
            sublayers=self.units.kind == SUBLAYER,
            want_kl=True,
            dense=self.dense,
            keep=None if self.stream is None else self.stream.append,
        )
        assert losses is not None
        self.dense = losses.dense if self.stream is None else self.stream
        counts = losses.counts.tolist()
        assert losses.kl_sum is not None
        for drop, nll, kl in zip(sets, losses.nll_sum, losses.kl_sum, strict=True):
            means = ((nll / losses.counts).tolist(), (kl / losses.counts).tolist())
            self.rows[drop] = list(zip(counts, *means, strict=True))
        costs = tuple(Cost(*pair) for pair in zip(losses.nll, losses.kl, strict=True))
        # a time limit ends all processes at the same set
        seconds = self.batch.ranks.first(time.perf_counter() - began)
        return Group(tuple(sets), costs, losses.passes, seconds)
