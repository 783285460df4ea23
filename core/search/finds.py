"""What each method of a search has found so far, as rows of sets.csv."""

from __future__ import annotations

from collections.abc import Sequence

from core import words
from core.checkpoint.headers import CheckpointInfo
from core.prune.plan import parameters_after
from core.runs.progress import Progress
from core.search.ledger import Drop, Ledger
from core.search.results import SetRow
from core.search.units import BLOCK, Units


class Finds:
    """The best set of every method and count, and what it took."""

    def __init__(
        self,
        ledger: Ledger,
        info: CheckpointInfo,
        progress: Progress,
        heal: str = "none",
        units: Units | None = None,
    ) -> None:
        """Read costs from ``ledger``; metrics and lines of the log go to ``progress``."""
        self.ledger, self.info, self.progress, self.heal = ledger, info, progress, heal
        self.units = units or Units(BLOCK, info.blocks)
        self.method, self.passes, self.seconds = "", 0, 0.0
        self._found: dict[tuple[str, int], SetRow] = {}
        self.sets: dict[tuple[str, int], Drop] = {}
        """The sets themselves, in units, by method and count."""

    @property
    def rows(self) -> list[SetRow]:
        """All sets so far, by method and rising count."""
        return list(self._found.values())

    def set_of(self, row: SetRow) -> Drop:
        """Return the units of a row's set."""
        return self.sets[row.method, row.count]

    def begin(self, method: str) -> None:
        """Count passes and time for ``method`` from here."""
        self.method, self.passes, self.seconds = method, self.ledger.passes, self.ledger.seconds

    def report(self, drop: Sequence[int]) -> None:
        """Record a set that the current method found; it replaces one of the same size."""
        ledger, count, removal = self.ledger, len(drop), self.units.removal(drop)
        cost, left = ledger.cost_of(frozenset(drop)), parameters_after(self.info, removal)
        healed = ledger.healed.get(frozenset(drop))
        self._found[self.method, count] = SetRow(
            method=self.method,
            objective=ledger.objective,
            heal=self.heal,
            count=count,
            drop=self.units.written(drop),
            params=left,
            ratio=1 - left / self.info.parameters,
            nll=cost.nll,
            kl=cost.kl,
            unhealed_nll=healed.before.nll if healed else None,
            unhealed_kl=healed.before.kl if healed else None,
            passes=ledger.passes - self.passes,
            seconds=round(ledger.seconds - self.seconds, 4),
        )
        self.sets[self.method, count] = frozenset(drop)
        best = cost.by(ledger.objective)
        self.progress.metric(method=self.method, count=count, passes=ledger.passes, best=best)
        self.progress.log(
            f"{self.method}, {count} out: {ledger.objective} {best:.5g} without "
            f"{removal.text if removal.partial else words.block_ranges(drop)}."
        )
