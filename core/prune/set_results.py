"""Result files of a search run: the sets of blocks that each method found, one for every count.

`core.search` writes them. Plans read them, and search is above plans in the import order, so the
types are here; `core.search.results` has the other files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from core.data.facts import TextFacts
from core.runs.results import CsvRow, JsonResult

BEST = "best"
"""Names the cheapest set of any method."""


@dataclass(frozen=True)
class SetRow(CsvRow):
    """One row of sets.csv: the set that one method chose for one count."""

    FILE: ClassVar[str] = "sets.csv"

    method: str
    objective: str
    """What the method minimised: kl or nll."""
    heal: str
    """How the seams were repaired before measuring: none, refit, linear or scale."""
    count: int
    drop: str
    """Blocks, separated by spaces, in removal order if the method has one; see `blocks`."""
    params: int | None = None
    """Parameters left."""
    ratio: float | None = None
    """Share of the parameters removed."""
    nll: float | None = None
    """Mean negative log-likelihood on the calibration rows, in nats; if the set was healed, on the
    quarter of them that was held out from the fit."""
    kl: float | None = None
    """KL(dense || without the set) on the same rows, in nats."""
    heldout_nll: float | None = None
    """The same on rows that chose nothing; None if there were none."""
    heldout_kl: float | None = None
    passes: int = 0
    """Block passes that the method had computed by then, without those of methods before it."""
    seconds: float = 0.0
    """The time they took."""
    unhealed_nll: float | None = None
    """``nll`` on the same rows without healing; None if sets are not healed."""
    unhealed_kl: float | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of the set; empty if the cell is damaged."""
        parts = self.drop.split()
        return tuple(int(p) for p in parts) if all(p.isdecimal() for p in parts) else ()

    @property
    def cost(self) -> float:
        """The objective on the calibration rows; infinite if it is missing."""
        value = self.kl if self.objective == "kl" else self.nll
        return math.inf if value is None or math.isnan(value) else value


@dataclass(frozen=True, kw_only=True)
class Search(JsonResult):
    """summary.json of a search run."""

    checkpoint: str = ""
    checkpoint_key: str = ""
    """Identifies the weights that were searched."""
    family: str = ""
    blocks: int = 0
    objective: str = "kl"
    methods: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    """Numbers of blocks that were asked for; sets.csv has those that were reached."""
    heal: str = "none"
    """How sets were healed before they were compared."""
    heal_best: int | None = None
    """How many of the sets compared were healed each time; None without healing."""
    sets_healed: int = 0
    fitted_tokens: int = 0
    """Calibration tokens that repairs were fitted on; 0 without healing."""
    protect_first: int = 0
    protect_last: int = 0
    dense_nll: float | None = None
    """Of the whole model on the calibration rows, in nats."""
    dense_heldout_nll: float | None = None
    calibration: str | None = None
    """The SOURCE of the rows."""
    calibration_content: str = ""
    text: TextFacts = TextFacts()
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    tokens: int = 0
    """Predictions that nll and kl are the mean over."""
    heldout: str = ""
    """What the held-out rows are, in words; empty if there were none."""
    heldout_tokens: int = 0
    passes: int = 0
    """Block passes of the whole search, shared prefixes once."""
    plain_passes: int = 0
    """Block passes of the plain loop, which runs every measured set by itself."""
    sets_measured: int = 0
    seconds: float = 0.0
    """Time spent measuring sets, all attempts together."""
    stopped: str = ""
    """Why a method ended early, in words; empty if all came to their end."""
    flops: float | None = None
    flops_per_s: float | None = None
    parameters: int | None = None
    device: str | None = None
    dtype: str | None = None
    compute_dtype: str = ""
    peak_memory_mib: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


def by_count(rows: Iterable[SetRow], method: str = BEST) -> dict[int, SetRow]:
    """Return the cheapest row of every count, of one method or of all; rising counts.

    Only the calibration rows decide: held-out rows chose nothing. Ties go to the earlier row.
    """
    found: dict[int, SetRow] = {}
    for row in rows:
        whole = len(set(row.blocks)) == len(row.blocks) == row.count > 0
        if whole and method in (BEST, row.method):
            before = found.get(row.count)
            if before is None or row.cost < before.cost:
                found[row.count] = row
    return dict(sorted(found.items()))
