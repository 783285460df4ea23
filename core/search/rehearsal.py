"""A search without a model: how many block passes its methods will take; no torch.

The methods themselves run, on made-up costs. One-shot and pairs take exactly these passes; greedy
and beam depend a little on which blocks go, and evolution on how long it improves.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from core.checkpoint.headers import CheckpointInfo
from core.heal import seams
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
) -> tuple[Ledger, dict[str, int]]:
    """Return the ledger after all ``methods``, and the passes of each."""
    task = dataclasses.replace(task, predicted=CANDIDATES)  # more would change the passes little
    draw = random.Random(task.seed)
    worth = [draw.random() for _ in range(units.total)]

    def measure(sets: Sequence[Drop]) -> Group:
        costs = tuple(_made_up(worth, drop) for drop in sets)
        return Group(tuple(sets), costs, counting.shared(range(units.total), sets)[0], 0.0)

    def healed(drop: Drop) -> Healed:
        cost = _made_up(worth, drop)
        return Healed(cost, cost, units.healing(heal, drop), 0.0)

    ledger = Ledger(measure, "kl", units.total, most, heal_best=heal_best)
    if heal != "none":
        ledger.heal = healed
    passes: dict[str, int] = {}
    for name in methods:
        before = ledger.passes
        METHODS[name](task, ledger, lambda _: None)
        passes[name] = ledger.passes - before
    return ledger, passes


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
