"""Recipe ``best``: from a checkpoint and one budget to the best variant within it.

Two ways are tried. One searches for whole blocks, as few as the budget asks for, and heals the
seams; the other solves for what every block becomes (without its attention, without its MLP, or
dropped), and is healed too if the first could be. Both variants are evaluated and timed beside the
dense model, in the same way; of those that keep the budget, the one with the lower perplexity is
taken. Texts are sized so that all of it keeps a time limit (`sizing`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from core.checkpoint import locate
from core.checkpoint.drop import Removal
from core.compare.verdict import Contender
from core.errors import DepthcutError, OptionError, RunError
from core.prune import budgets, cautions
from core.prune.budgets import Limits
from core.prune.plan import protection
from core.prune.results import Pruning
from core.prune.version_results import WHOLE
from core.recipes import drop_one, make, parts, sizing, texts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.spec import RecipeSpec

LATENCY = 0.8
"""The budget if none is given: a share of the dense latency."""
INPUT = 12
"""Tokens of the prompt, as in the benchmark."""
LEAST = 8192
"""Tokens to heal on at least."""
VERSIONS, SOLVED, HEALED = "versions", "solved", "healed"
WAYS = {SOLVED: "solved for the budget", HEALED: "whole blocks, seams healed"}
NOISE = 0.05
"""A measured latency up to this share above the budget still keeps it. A convention."""


def limits_of(spec: RecipeSpec) -> Limits:
    """Return the budget: as given, else a latency of `LATENCY`."""
    found = Limits(spec.latency, None, spec.memory_gib, spec.params)
    return found if found.given else Limits(latency=LATENCY)


def check(spec: RecipeSpec) -> None:
    """Raise an error for a budget that means nothing, or text that cannot be split."""
    if spec.ratio is not None:
        raise OptionError(
            "--ratio is not a budget of this recipe.", "Give --latency, --memory-gib or --params."
        )
    budgets.check(limits_of(spec), drop_one.OUTPUT)
    info = locate.open(spec.checkpoint, need="config", need_tokenizer=False).info
    protection(info.blocks, None, None)
    texts.given_apart(spec)


def steps(spec: RecipeSpec) -> list[Step]:
    """Measure versions, solve and cut; search, cut and heal; evaluate and time all."""
    limits = limits_of(spec)

    def on_text(**more: Any) -> Any:
        def values(chain: Chain) -> dict[str, Any]:
            usual = {"checkpoint": spec.checkpoint, "calibration": texts.apart(chain)[0]}
            return usual | {k: v(chain) if callable(v) else v for k, v in more.items()}

        return values

    def solving(chain: Chain) -> dict[str, Any]:
        return {
            "scores": chain.dir(VERSIONS),
            "checkpoint": spec.checkpoint,
            "output_tokens": output_tokens(chain),
            **limits.given,
        }

    def planned(step: str, **more: Any) -> Any:
        return lambda chain: {
            "checkpoint": spec.checkpoint,
            "plan": chain.file(step, f"{step}.json"),
            **({"calibration": texts.apart(chain)[0]} if more else {}),
            **more,
        }

    def solved(chain: Chain) -> dict[str, Any]:
        """Heal as the other way, if that could be healed on this text."""
        heals = (chain.dir(HEALED) / "config.json").is_file() and HEALED not in chain.failed
        more = {"heal": "refit", **healing_rows(chain)} if heals else {}
        found: dict[str, Any] = planned(f"plan-{SOLVED}", **more)(chain)
        return found

    def measuring(chain: Chain) -> dict[str, Any]:
        more = {"context": INPUT, "check_plans": 0, "runs": 3, **sizing.first(chain, VERSIONS)}
        found: dict[str, Any] = on_text(**more)(chain)
        return found

    return [
        Step(
            VERSIONS,
            "budget",
            measuring,
        ),
        Step(f"plan-{SOLVED}", "plan", solving),
        Step(
            "sets",
            "search",
            on_text(
                methods=("greedy",),
                counts=lambda chain: (whole_blocks(chain),),
                samples=lambda chain: sizes(chain).rows,
            ),
            optional=True,
        ),
        Step(
            f"plan-{HEALED}",
            "plan",
            lambda chain: {
                "scores": chain.dir("sets"),
                "criterion": "best",
                "checkpoint": spec.checkpoint,
                "count": whole_blocks(chain),
            },
            optional=True,
            needs="sets",
        ),
        Step(
            HEALED,
            "prune",
            lambda chain: planned(f"plan-{HEALED}", heal="refit", **healing_rows(chain))(chain),
            optional=True,
            needs=f"plan-{HEALED}",
        ),
        Step(SOLVED, "prune", solved),
        evaluated(spec, "dense"),
        evaluated(spec, SOLVED),
        evaluated(spec, HEALED, optional=True),
        Step("speed", "benchmark", lambda chain: drop_one.timing(chain, *made(chain))),
    ]


def evaluated(spec: RecipeSpec, name: str, *, optional: bool = False) -> Step:
    """Return the step that evaluates ``name``, on as many tokens as fit the time limit."""
    whole = parts.evaluated(spec, name, optional=optional)

    def values(chain: Chain) -> dict[str, Any]:
        assert callable(whole.values)
        cap = sizing.cap(chain, texts.apart(chain)[1], sizes(chain).evaluated)
        return {**whole.values(chain), **cap}

    return dataclasses.replace(whole, values=values)


def sizes(chain: Chain) -> sizing.Sizes:
    """Return how much text the steps after the first one use."""
    planned = chain.plan(f"plan-{SOLVED}")
    width = tuple((int(block), n) for block, n in (planned.mlp_width or {}).items())
    lists = (planned.drop or (), planned.attention or (), planned.mlp or ())
    try:
        count = whole_blocks(chain)
    except RunError:  # there is no healed way
        count = 0
    return sizing.sizes(chain, VERSIONS, count, Removal(*lists, width))


def healing_rows(chain: Chain) -> dict[str, int]:
    """Return length and rows of the healing text."""
    info = locate.open(chain.spec.checkpoint, need="config", need_tokenizer=False).info
    return sizing.rows_for(info, sizes(chain).tokens, LEAST)


def output_tokens(chain: Chain) -> int:
    """Return the tokens that the benchmark generates, for which the budget is meant."""
    found: int = drop_one.timing(chain)["output_tokens"][0]
    return found


def made(chain: Chain) -> list[str]:
    """Return the ways whose variants were written."""
    return [name for name in WAYS if (chain.dir(name) / "config.json").is_file()]


def whole_blocks(chain: Chain) -> int:
    """Return how many whole blocks have to go to keep the budget; raises `RunError` if none do."""
    library = budgets.load(chain.dir(VERSIONS))
    rows = {one: row for one, row in library.rows.items() if one[1] in (WHOLE, "drop")}
    only = dataclasses.replace(library, rows=rows)
    try:
        found = budgets.solve(
            only,
            limits_of(chain.spec),
            output_tokens=output_tokens(chain),
            protect=protection(library.blocks, None, None),
        )
    except DepthcutError as error:
        raise RunError(f"Whole blocks alone cannot keep the budget: {error}") from error
    count = found.choice.count("drop")
    if not count:
        raise RunError("No block has to go to keep the budget.", "Give a tighter budget.")
    return count


def verdict(chain: Chain) -> Verdict:
    """Name the variant to take, and both ways' quality and cost beside dense."""
    found = make.measured_steps(chain, made(chain))
    if not found:
        raise RunError("No variant is among the study's checkpoints.", "Run the recipe again.")
    limits = limits_of(chain.spec)
    kept = {name: one for name, (_, one) in found.items() if keeps(one, limits)}
    name = min(kept or found, key=lambda n: _rank(found[n][1], bool(kept)))
    seen, taken = found[name]
    budget = ", ".join(f"{n.replace('_', ' ')} {value:g}" for n, value in limits.given.items())
    text = f"Within {budget}, take the variant that was {WAYS[name]}: {seen.facts(taken)}."
    if not kept:
        text = (
            f"No variant kept {budget} when it was timed; the nearest was {WAYS[name]}: "
            f"{seen.facts(taken)}."
        )
    more = [
        f"{WAYS[n][:1].upper()}{WAYS[n][1:]}: {_removed(chain, n)}; {view.facts(one)}."
        for n, (view, one) in found.items()
    ]
    record = chain.read(name, Pruning)
    caution = cautions.attention(record.removal, record.blocks_before or 0)
    more += [f"{caution} {cautions.TRY}"] if caution else []
    more += [f"{step} failed: {why}" for step, why in chain.failed.items()]
    figures: dict[str, Any] = {"taken": name, "variant": taken.id, "budget": limits.given}
    for n, (_, one) in found.items():
        figures[f"{n}_ppl"] = one.ppl.value if one.ppl else None
        figures[f"{n}_ppl_over_dense"] = one.ppl.times if one.ppl else None
        figures[f"{n}_latency"] = share(one)
        figures[f"{n}_keeps_budget"] = n in kept
    return Verdict(text, (*more, seen.measured_on), figures)


def _removed(chain: Chain, name: str) -> str:
    record = chain.read(name, Pruning)
    return f"without {record.removal.text}" + (", healed" if record.healed else "")


def share(one: Contender) -> float | None:
    """Return a variant's measured latency as a share of the dense model's."""
    return 1 / one.speed.value if one.speed and one.speed.value else None


def keeps(one: Contender, limits: Limits) -> bool:
    """Whether a variant kept the latency budget when it was timed; sizes were solved exactly."""
    measured = share(one)
    if limits.latency is None or measured is None:
        return True
    return measured <= limits.latency * (1 + NOISE)


def _rank(one: Contender, kept: bool) -> float:
    """Return what the variant to take has least of: perplexity, or latency if none kept it."""
    value = (one.ppl.value if one.ppl else None) if kept else share(one)
    return float("inf") if value is None else value


RECIPE = Recipe(
    "best",
    "Best within a budget",
    "From one budget to a variant: solves for what every block becomes, and searches for whole "
    "blocks whose seams it heals. Measures both beside the dense model, and says which to take.",
    steps,
    verdict,
    check,
)
