"""A search without a model: how many block passes its methods will take; no torch.

The methods themselves run, on made-up costs. One-shot and pairs take exactly these passes; greedy
and beam depend a little on which blocks go, and evolution on how long it improves.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.checkpoint.headers import CheckpointInfo
from core.heal import seams
from core.heal.demand import regression_flops
from core.importance import passes as counting
from core.importance.estimate import block_flops, head_flops
from core.runs.dtypes import BYTES, computable
from core.search.ledger import Cost, Drop, Group, Healed, Ledger
from core.search.methods import CANDIDATES, METHODS, Task
from core.search.units import Units

STATES_BYTES = 4 * 2**30
"""Most memory for hidden states. Chosen, not measured: more states share little more."""
SHARE_OF_FREE = 4
"""Hidden states take at most this part of the free memory: a quarter."""


def states_at_once(
    info: CheckpointInfo, samples: int, length: int, dtype: str, free_bytes: int | None
) -> int:
    """Return how many sets one pass may hold: one hidden state each, at least 2."""
    state = samples * length * info.hidden * BYTES[computable(dtype)]
    room = STATES_BYTES if free_bytes is None else min(STATES_BYTES, free_bytes // SHARE_OF_FREE)
    return max(2, room // state)


def rehearse(
    task: Task,
    methods: Sequence[str],
    units: Units,
    most: int,
    heal: str = "none",
    heal_best: int = 1,
    *,
    kept: bool = True,
) -> tuple[Ledger, dict[str, int], list[Drop]]:
    """Return the ledger after all ``methods``, the passes of each, and the sets that they find.

    ``kept``: whether the dense streams are kept while sets are healed.
    """
    task = dataclasses.replace(task, predicted=CANDIDATES)  # more would change the passes little
    draw = random.Random(task.seed)
    worth = [draw.random() for _ in range(units.total)]

    def measure(sets: Sequence[Drop]) -> Group:
        costs = tuple(_made_up(worth, drop) for drop in sets)
        return Group(tuple(sets), costs, counting.shared(range(units.total), sets)[0], 0.0)

    def healed(drop: Drop) -> Healed:
        cost = _made_up(worth, drop)
        return Healed(cost, cost, units.healing(heal, drop, kept=kept), 0.0)

    ledger = Ledger(measure, "kl", units.total, most, heal_best=heal_best)
    if heal != "none":
        ledger.heal = healed
    passes: dict[str, int] = {}
    found: dict[tuple[str, int], Drop] = {}
    for name in methods:
        before = ledger.passes

        def report(drop: Sequence[int], by: str = name) -> None:
            found[by, len(drop)] = frozenset(drop)

        METHODS[name](task, ledger, report)
        passes[name] = ledger.passes - before
    return ledger, passes, list(dict.fromkeys(found.values()))


def _made_up(worth: Sequence[float], drop: Drop) -> Cost:
    noise = 7919.0 * sum(worth[block] * (block + 1) for block in drop) % 1.0
    value = sum(worth[block] for block in drop) * (1 + 0.2 * noise)
    return Cost(value, value)


def flops(
    info: CheckpointInfo, ledger: Ledger, rows: int, tokens: int, heal_rows: int | None = None
) -> float:
    """Return the operations of a search: its passes, and the head once for every set.

    Sets are measured on ``rows`` and healed on ``heal_rows``. A pass through a part of a block
    counts as half a block, whichever part it is.
    """
    each = sum(block_flops(info, b, rows, tokens) for b in range(info.blocks)) / ledger.blocks
    healing = sum(one.passes for one in ledger.healed.values())
    work = (ledger.passes - healing) * each + healing * each * (heal_rows or rows) / rows
    heads = len(ledger.costs) + 4 * len(ledger.healed) * (heal_rows or rows) / seams.HELD_OUT / rows
    return work + heads * head_flops(info, rows, tokens)


@dataclass(frozen=True)
class Amount:
    """What a part of a search takes."""

    flops: float
    float64_flops: float
    """Those of the operations that are in float64."""
    reads: float
    """Passes over the weights."""


def refits(
    info: CheckpointInfo, sets: Iterable[Drop], units: Units, heal: str, rows: int, tokens: int
) -> Amount:
    """Return what the refits at every seam of ``sets`` take, beside the block passes of healing.

    At each seam the part that is refitted, an MLP, computes all rows twice, and the head the
    held-out ones of both models.
    """
    cuts = [seams.seams_of(units.removal(drop)) for drop in sets]
    count = sum(map(len, cuts))
    inner = max((shape["intermediate"] for shape in info.block_shapes), default=0)
    fitted = count * regression_flops(inner, info.hidden, heal, rows, tokens)
    beside = 2 * head_flops(info, -(-rows // seams.HELD_OUT), tokens)
    if heal != "scale":
        beside += max((block_flops(info, b, rows, tokens) for b in range(info.blocks)), default=0)
    often = sum(seams.reads(found, info.blocks) for found in cuts)
    return Amount(count * beside + fitted, fitted, often)


def heldout(
    info: CheckpointInfo,
    ledger: Ledger,
    found: Sequence[Drop],
    units: Units,
    heal: str,
    rows: int,
    tokens: int,
    groups: int = 1,
) -> Amount:
    """Return what measuring the sets that were ``found`` takes on as many held-out rows.

    Sets that were healed are healed again, one after another. ``groups``: of the held-out rows,
    each of which passes over the weights.
    """
    each = sum(block_flops(info, b, rows, tokens) for b in range(info.blocks)) / ledger.blocks
    heads = (len(found) + 1) * head_flops(info, rows, tokens)
    if heal == "none":
        sets = [frozenset[int](), *found]
        passes = counting.shared(range(units.total), sets)[0]
        return Amount(passes * each + heads, 0.0, math.ceil(len(sets) / ledger.most))
    again = refits(info, found, units, heal, rows, tokens)
    passes = sum(ledger.healed[drop].passes for drop in found if drop in ledger.healed)
    passes += units.total + sum(units.total - len(drop) for drop in found)
    heads += 4 * len(found) * head_flops(info, rows, tokens) / seams.HELD_OUT
    flops = passes * each + heads + again.flops
    return Amount(flops, again.float64_flops, again.reads + (len(found) + 1) * groups)
