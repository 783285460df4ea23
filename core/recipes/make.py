"""Recipe ``make``: make one variant and measure it: prune, heal or retrain, merge, evaluate, time.

What "Make it and measure it" runs on the Prune and Compare pages. ``--drop`` (or ``--attention``,
``--mlp``) names what goes; with ``--ratio`` instead, the blocks are scored and the cheapest by
perplexity go. With ``--width`` a width variant of the same size is made too. The dense model, the
variant before and after retraining, and the width variant are evaluated in the same way, and timed
in one benchmark.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from core import commands
from core.checkpoint import locate
from core.checkpoint.drop import Removal, check_removal
from core.compare import answers
from core.compare.scene import scene
from core.compare.verdict import Contender, Verdict, verdict_of
from core.errors import OptionError, RunError
from core.evaluate import suites, task_code
from core.evaluate.estimate import PART, capped
from core.evaluate.spec import EvaluateSpec
from core.prune import toggle
from core.recipes import decision, depth_vs_width, drop_one, duration, parts, retraining, texts
from core.recipes.chain import Chain, Expected, Recipe, Step
from core.recipes.chain import Verdict as Told
from core.recipes.spec import RecipeSpec
from core.retrain.spec import LABELS
from core.width import methods
from core.words import rounded

PRUNED, RETRAINED, NARROWED = "pruned", "retrained", "narrower"


def removal_of(spec: RecipeSpec) -> Removal:
    """Return what the options name; empty if ``--ratio`` chooses."""
    width = toggle.width_from_text(",".join(spec.mlp_width))
    return Removal(spec.drop, spec.attention, spec.mlp, width, spec.neurons or "")


def check(spec: RecipeSpec) -> None:
    """Raise an error for a removal, healing, text or task that cannot be carried out."""
    check_plan(spec)
    suites.find(suites.expand(spec.tasks), spec.task_dir)


def check_plan(spec: RecipeSpec) -> None:
    """Raise an error as `check` does, but look for tasks in the user's own folder alone.

    The index of lm-eval's tasks takes seconds to read, which a page cannot wait for.
    """
    info = locate.open(spec.checkpoint, need="config", need_tokenizer=False).info
    removal = removal_of(spec)
    if removal and spec.ratio is not None:
        raise OptionError(
            "Both --ratio and blocks are given.", "Give either --ratio or the blocks to remove."
        )
    if removal:
        check_removal(removal, info.block_shapes)
        entry = commands.get("prune")
        entry.load().check(entry.spec_class(out="checked", **_cut(spec)))
    elif spec.ratio is None:
        raise OptionError(
            "Nothing to remove was named.", "Add --drop 3,5, --attention, --mlp or --ratio 0.2."
        )
    texts.given_apart(spec)
    if spec.tasks:
        task_code.check_own(spec.tasks, spec.task_dir, allowed=spec.allow_task_code)


def final(spec: RecipeSpec) -> str:
    """Return the step that makes the variant."""
    return RETRAINED if spec.retrain != "none" else PRUNED


def steps(spec: RecipeSpec) -> list[Step]:
    """Prune and heal, retrain and merge if asked to, then evaluate and time beside dense."""
    found = _choosing(spec)
    named = ["dense", PRUNED]
    compared = [final(spec)]
    if spec.retrain != "none":
        found.append(Step(RETRAINED, "retrain", _training, leaves="merged/config.json"))
        named.append(RETRAINED)
    if spec.width != "none":
        found.append(Step(NARROWED, "width", _narrowed, optional=True))
        named.append(NARROWED)
        compared.append(NARROWED)
    found += [_evaluated(name) for name in named]
    if spec.tasks:
        found += [_asked(name) for name in ("dense", *compared)]

    def timing(chain: Chain) -> dict[str, Any]:
        there = [name for name in compared if name not in chain.failed]
        return drop_one.timing(chain, *there)

    return [*found, Step("speed", "benchmark", timing)]


def expected(spec: RecipeSpec) -> Expected | None:
    """Return the estimated seconds of every step; None if they cannot be estimated."""
    names: dict[str, str] = {}
    for step in steps(spec):
        kind, _, variant = step.name.partition("-")
        work = {"importance": "scores", "benchmark": "speed"}.get(step.command, step.command)
        names[step.name] = f"{kind}:{variant}" if step.command == "evaluate" else work
    return duration.of_make(spec, removal_of(spec), names)


def _cut(spec: RecipeSpec) -> dict[str, Any]:
    values = {
        "checkpoint": spec.checkpoint,
        **toggle.options_of(removal_of(spec)),
        "heal": spec.heal,
    }
    more = {"criterion": spec.criterion} if spec.criterion else {}
    return values | more | ({"calibration": spec.calibration} if spec.heal != "none" else {})


def _choosing(spec: RecipeSpec) -> list[Step]:
    """Return the steps that prune: what is named, or by perplexity as much as ``--ratio`` says."""
    if removal_of(spec):
        return [Step(PRUNED, "prune", _cut(spec))]
    scored = parts.scored(spec, metrics=("ppl",), calibration=spec.calibration)
    plan, prune = parts.cut(spec, PRUNED, "ppl", ratio=spec.ratio)

    def healed(chain: Chain) -> dict[str, Any]:
        assert callable(prune.values)
        return {**_cut(spec), "criterion": None, **prune.values(chain), "heal": spec.heal}

    return [scored, plan, replace(prune, values=healed)]


def _training(chain: Chain) -> dict[str, Any]:
    spec = chain.spec
    values = retraining.options(
        chain, spec.retrain, checkpoint=str(chain.dir(PRUNED)), data=texts.apart(chain)[0]
    )
    return {**values, "dense": spec.checkpoint, "merge": spec.retrain == "lora"}


def _narrowed(chain: Chain) -> dict[str, Any]:
    """Return the options of the width variant that has the size of the pruned one."""
    spec, method = chain.spec, methods.get(chain.spec.width)
    more: dict[str, Any] = {"calibration": spec.calibration} if method.samples else {}
    if method.samples > depth_vs_width.SAMPLES:
        more["samples"] = depth_vs_width.SAMPLES
    match = chain.dir(PRUNED)
    return {"checkpoint": spec.checkpoint, "method": spec.width, "match": match, **more}


def _needs(name: str) -> dict[str, Any]:
    """Return how a step depends on the variant ``name``: the width one may fail on its own."""
    return {"optional": True, "needs": NARROWED} if name == NARROWED else {}


def _evaluated(name: str) -> Step:
    def options(chain: Chain) -> dict[str, Any]:
        values: dict[str, Any] = {
            "checkpoint": parts.folder_of(chain, name),
            "perplexity": (texts.apart(chain)[1],),
            "window": (min(128, parts.context(chain.spec)),),
        }
        folder = locate.open(chain.spec.checkpoint, need="config").folder
        asked = capped(EvaluateSpec(out="", max_tokens=PART, **values), folder)
        return values | {"max_tokens": asked.max_tokens}

    return Step(f"evaluate-{name}", "evaluate", options, **_needs(name))


def _asked(name: str) -> Step:
    def options(chain: Chain) -> dict[str, Any]:
        spec = chain.spec
        if "tasks-dense" in chain.failed:
            raise RunError("Skipped: there is no dense result to compare with.", "See tasks-dense.")
        code = {"allow_task_code": True} if spec.allow_task_code else {}
        asked = {"tasks": spec.tasks, "task_dir": spec.task_dir, "limit": spec.limit}
        return {"checkpoint": parts.folder_of(chain, name), **asked, **code}

    return Step(f"tasks-{name}", "evaluate", options, **{"optional": True, **_needs(name)})


def verdict(chain: Chain) -> Told:
    """Name the variant, its quality and cost beside dense, and what retraining brought back."""
    spec = chain.spec
    found = decision.of_study(spec.checkpoint, chain.folder)
    one = found and _own(chain, found, final(spec))
    if not found or not one:
        raise RunError("The variant is not among the study's checkpoints.", "Run the recipe again.")
    seen, made = one
    more = []
    if spec.retrain != "none" and (before := _own(chain, found, PRUNED)):
        more.append(_recovered(before[1], made, LABELS[spec.retrain]))
        more += [made.recovery] if made.recovery else []
    beside = _own(chain, found, NARROWED) if spec.width != "none" else None
    if beside:
        more.append(_beside(*beside))
    more += [f"{a.sentence[:1].upper()}{a.sentence[1:]}." for a in (*made.answers, *made.written)]
    more += [f"{step} failed: {why}" for step, why in chain.failed.items()]
    figures = {
        **_figures(made),
        "ppl_dense": made.ppl.dense if made.ppl else None,
        "memory_over_dense": made.memory.times if made.memory else None,
        "right_answers_dense": (answers.mean(made.answers) or (None, None))[1],
        "width": _figures(beside[1]) if beside else None,
    }
    return Told(f"{made.label}: {seen.facts(made)}.", (*more, seen.measured_on), figures)


def measured_steps(chain: Chain, names: list[str]) -> dict[str, tuple[Verdict, Contender]]:
    """Return the verdict and the variant of every step in ``names`` that was measured."""
    found = decision.of_study(chain.spec.checkpoint, chain.folder)
    both = {name: _own(chain, found, name) for name in names} if found else {}
    return {name: one for name, one in both.items() if one}


def _own(chain: Chain, found: Verdict, step: str) -> tuple[Verdict, Contender] | None:
    """Return the verdict on what this recipe measured, and the variant of one of its steps."""
    known = found.study
    variant = known.at(chain.dir(step))
    if variant is None:
        return None
    evaluated, timed = (chain.dir(name).resolve() for name in (f"evaluate-{step}", "speed"))
    runs = {record.id: record.path.resolve() for record in known.runs}
    protocols = [q.protocol for q in known.quality if runs.get(q.run) == evaluated]
    benches = [b for b in known.benchmarks if b.record.path.resolve() == timed]
    seen = scene(known, protocols[0] if protocols else None, benches)
    own = verdict_of(known, found.settings, seen=seen)
    made = own.of(variant.id)
    return (own, made) if made else None


def _beside(seen: Verdict, one: Contender) -> str:
    """Return the sentence on the width variant."""
    tuned = "" if one.candidate.retrained else ", not retrained"
    return f"{one.label}, of the same size{tuned}: {seen.facts(one, sized=False)}."


def _figures(one: Contender) -> dict[str, Any]:
    return {
        "variant": one.id,
        "label": one.label,
        "ratio": one.ratio,
        "ppl": one.ppl.value if one.ppl else None,
        "speedup": one.speed.value if one.speed else None,
        "noise": one.speed.noise if one.speed else None,
        "memory_mib": one.memory.value if one.memory else None,
        "right_answers": one.accuracy,
    }


def _recovered(before: Contender, after: Contender, method: str) -> str:
    if not (before.ppl and after.ppl):
        return f"Retrained with {method}."
    return (
        f"Before retraining with {method}, perplexity was {rounded(before.ppl.value)} "
        f"({before.ppl.times or 0:.2f} times dense); now it is {rounded(after.ppl.value)}."
    )


RECIPE = Recipe(
    "make",
    "Make it and measure it",
    "Makes one variant: prunes, heals or retrains, and merges. Then evaluates and times it beside "
    "the dense model.",
    steps,
    verdict,
    check,
    expected,
)
