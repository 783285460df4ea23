"""How much text recipe ``best`` uses, so that it keeps its time limit at the rate measured here.

The first step measures every version of every block on rows sized by an earlier rate, or by an
assumed one. Its own rate then sizes what follows: search, healing and evaluation. All of it follows
from recorded results, so that a resumed recipe asks for the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.budget import command as budget
from core.budget.command import BudgetSpec
from core.checkpoint import locate
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.evaluate import estimate as evaluating
from core.heal import command as healing
from core.heal import seams
from core.heal.command import PruneSpec
from core.prune.version_results import VERSIONS, Budget
from core.recipes import drop_one
from core.recipes.chain import Chain
from core.runs import devices, pace
from core.runs.workspace import read_run
from core.search import command as search
from core.search.command import SearchSpec

LIMIT_S = 1200.0
"""The time limit if none is given: twenty minutes."""
ROWS, LEAST_ROWS = 10, 4
"""Rows to measure versions and sets on, and the fewest of them."""
TOKENS, LEAST_TOKENS = 32, seams.TOKENS_PER_DIMENSION
"""Tokens to heal on per hidden dimension, and the fewest. On SmolLM2, whose hidden size is 576,
refits of 12 k and of 24 k tokens both held on other texts."""
EVALUATED, LEAST_EVALUATED = evaluating.PART, 4096
"""Tokens to evaluate on, and the fewest."""
FEW = ("drop", "no-attention", "no-mlp")
"""What a block may become if the time does not allow more: narrower MLPs take as long again."""
FIRST = 0.4
"""Share of the time limit that the first step may take."""
PLANNED = 0.75
"""Share of the time left that the others are sized for: rates differ from step to step."""
STARTS = 14
"""Processes that load a model: seven steps, and the benchmark's workers, each of which is brief."""


@dataclass(frozen=True)
class Sizes:
    """How much text the steps after the first one use."""

    rows: int
    """To compare sets on."""
    tokens: int
    """To heal on, per hidden dimension."""
    evaluated: int
    """To evaluate on."""


def first(chain: Chain, step: str) -> dict[str, Any]:
    """Return the versions and the rows of the first step ``step``, a budget.

    Narrower MLPs are among the versions if that fits. A step that was started before keeps both.
    """
    if record := read_run(chain.dir(step)):
        return {name: record.spec[name] for name in ("versions", "samples") if name in record.spec}
    kinds = ("budget", "search", "importance", "evaluate")
    rate, _ = pace.expected(kinds, chain.spec.device, _info(chain).parameters)
    if rate is None:
        return {"versions": tuple(VERSIONS), "samples": ROWS}

    def fitting(versions: tuple[str, ...]) -> float:
        spec = BudgetSpec(checkpoint=chain.spec.checkpoint, versions=versions, samples=ROWS, out="")
        return FIRST * limit(chain) * rate * ROWS / float(budget.dry_run(spec)["flops"])

    if fitting(tuple(VERSIONS)) >= ROWS:
        return {"versions": tuple(VERSIONS), "samples": ROWS}
    return {"versions": FEW, "samples": max(LEAST_ROWS, min(ROWS, int(fitting(FEW))))}


def limit(chain: Chain) -> float:
    """Return the seconds that the recipe may take."""
    found = chain.spec.time_limit_s
    return LIMIT_S if found is None else found


def sizes(chain: Chain, step: str, count: int, solved: Removal) -> Sizes:
    """Return what fits the time that is left after the first step ``step``.

    ``count`` whole blocks are searched for and healed, and so is ``solved``.
    """
    measured = chain.read(step, Budget)
    full = Sizes(ROWS, TOKENS, EVALUATED)
    if not measured.flops_per_s:
        return full
    on_cpu = devices.resolve(chain.spec.device) == "cpu"
    fixed = STARTS * pace.START_S + (drop_one.CPU_SECONDS if on_cpu else 0.0)
    left = PLANNED * (limit(chain) - chain.seconds(step) - fixed)
    share = max(0.0, left) * measured.flops_per_s / _flops(chain, count, solved)
    if share >= 1:
        return full
    return Sizes(
        max(LEAST_ROWS, int(share * ROWS)),
        max(LEAST_TOKENS, int(share * TOKENS)),
        max(LEAST_EVALUATED, int(share * EVALUATED) // 1024 * 1024),
    )


def _flops(chain: Chain, count: int, solved: Removal) -> float:
    """Return the operations of search, both healings and three evaluations at full size."""
    info, name = _info(chain), chain.spec.checkpoint
    found = 0.0
    if count:
        one = SearchSpec(
            checkpoint=name, methods=("greedy",), counts=(count,), samples=ROWS, out=""
        )
        found += float(search.dry_run(one)["flops"])
    rows = rows_for(info, TOKENS)
    usual = PruneSpec(
        checkpoint=name, heal="refit", samples=rows.get("samples"), length=rows["length"], out=""
    )
    middle = max(1, (info.blocks - count) // 2)
    for removal in (solved, Removal(tuple(range(middle, middle + count)))):
        found_seams = seams.seams_of(removal)
        if found_seams and found_seams[0].low:  # else it cannot be healed
            found += healing.healing_flops(usual, info, removal)
    window = min(128, info.context or 128)
    return found + 3 * evaluating.forward_flops(info, EVALUATED // window, window)


def rows_for(info: CheckpointInfo, tokens: int, least: int = 0) -> dict[str, int]:
    """Return length and, if more than usual are needed, rows of the healing text.

    They come to ``tokens`` per hidden dimension, and at least to ``least``. The usual number of
    rows may be fewer if the text is short; a larger one, which wide models need, may not.
    """
    wanted = max(least, tokens * info.hidden)
    longest = min(healing.LENGTH, info.context or healing.LENGTH)
    if wanted > healing.SAMPLES * longest:
        return {"samples": -(-wanted // longest), "length": longest}
    return {"length": -(-wanted // healing.SAMPLES)}


def cap(chain: Chain, source: str, tokens: int) -> dict[str, int]:
    """Return the option that evaluates on at most ``tokens`` of a text; none if it has fewer."""
    folder = locate.open(chain.spec.checkpoint, need="config", need_tokenizer=False).folder
    known = evaluating.text_tokens(source, folder)
    return {} if known is not None and known <= tokens else {"max_tokens": tokens}


def _info(chain: Chain) -> CheckpointInfo:
    return locate.open(chain.spec.checkpoint, need="config", need_tokenizer=False).info
