"""Result files of a search run: the sets of blocks that each method found, one for every count.

`core.search` writes them. Plans read them, and search is above plans in the import order, so the
types are here; `core.search.results` has the other files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from core.checkpoint.drop import PARTS, Removal
from core.data.facts import TextFacts
from core.runs.results import CsvRow, JsonResult

BEST = "best"
"""Names the cheapest set of any method."""


def written(units: Iterable[Any]) -> str:
    """Return blocks, or (block, attention or mlp), as in ``3 5`` and ``3.attention 5.mlp``."""
    return " ".join(".".join(map(str, u)) if isinstance(u, tuple) else str(u) for u in units)


def units_in(cell: str) -> tuple[Any, ...]:
    """Return what `written` wrote; empty if the cell is damaged or names something twice."""
    found: list[Any] = []
    for word in cell.split():
        block, dot, part = word.partition(".")
        if not block.isdecimal() or len(block) > 6 or (dot and part not in PARTS):
            return ()
        found.append((int(block), part) if dot else int(block))
    return tuple(found) if len(set(found)) == len(found) else ()


def removal_of(units: Iterable[Any]) -> Removal:
    """Return the removal of blocks and of (block, part) units, in this order.

    Both parts of a block are the block.
    """
    units = list(units)
    blocks = [unit for unit in units if not isinstance(unit, tuple)]
    parts = [unit for unit in units if isinstance(unit, tuple)]
    times = Counter(block for block, _ in parts)
    whole = [block for block, number in times.items() if number > 1]
    return Removal(
        (*blocks, *whole),
        tuple(block for block, part in parts if part == "attention" and block not in whole),
        tuple(block for block, part in parts if part == "mlp" and block not in whole),
    )


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
    """Blocks, or parts of blocks as in ``3.attention 5.mlp``, separated by spaces, in removal order
    if the method has one; see `removal`."""
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
    def units(self) -> tuple[Any, ...]:
        """Blocks, or (block, attention or mlp); empty if the cell is damaged."""
        return units_in(self.drop)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of a set of whole blocks; empty for a set of parts."""
        return tuple(unit for unit in self.units if isinstance(unit, int))

    @property
    def removal(self) -> Removal:
        """What goes."""
        return removal_of(self.units)

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
    """Numbers of blocks, or of parts, that were asked for; sets.csv has those that were reached."""
    units: str = "block"
    """What goes one at a time: block, or sublayer (the attention or the MLP of a block)."""
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
    processes: int = 1
    """Those that shared the rows; ``peak_memory_mib`` is the first one's."""
    versions: dict[str, str] = field(default_factory=dict)


def by_count(rows: Iterable[SetRow], method: str = BEST) -> dict[int, SetRow]:
    """Return the cheapest row of every count, of one method or of all; rising counts.

    Only the calibration rows decide: held-out rows chose nothing. Ties go to the earlier row.
    """
    found: dict[int, SetRow] = {}
    for row in rows:
        if len(row.units) == row.count > 0 and method in (BEST, row.method):
            before = found.get(row.count)
            if before is None or row.cost < before.cost:
                found[row.count] = row
    return dict(sorted(found.items()))
