"""Recipe ``paper-table``: the main table of Shortened LLaMA for one checkpoint.

Kim et al., arXiv 2402.02834: blocks dropped by PPL and Taylor+ at the paper's three ratios (6, 9
and 11 of 32 blocks), retrained with LoRA, evaluated on perplexity and zero-shot tasks, and timed.
The authors' own figures are listed too, marked as published. No model is evaluated on text that it
was trained on: ``--data`` is one SOURCE, part of which is held out, or ``TRAIN,EVAL``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.checkpoint import locate
from core.compare import published
from core.errors import RunError
from core.evaluate import suites, task_code
from core.evaluate.results import Score, Summary
from core.prune.results import Pruning
from core.prune.score_results import Importance
from core.recipes import parts, retraining, texts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.drop_one import speeds, timing
from core.recipes.results import PaperRow
from core.recipes.spec import RecipeSpec
from core.words import rounded

CRITERIA = ("ppl", "taylor")
SHARES = (6 / 32, 9 / 32, 11 / 32)
"""Shares of the blocks; the paper labels them 20, 27 and 35 %."""
AUTHORS = "authors' repository"
LIMIT = 40
"""Questions per demo task; real tasks are run in full."""


def counts(spec: RecipeSpec) -> list[int]:
    """Return the distinct block counts that the paper's ratios drop here; each at least 1."""
    blocks = locate.open(spec.checkpoint, need="config").info.blocks
    return sorted({max(1, round(blocks * share)) for share in SHARES})


def variants(spec: RecipeSpec) -> list[tuple[str, str, int]]:
    """Return (step, criterion, count) of every pruned model."""
    return [(f"{c}-{count}", c, count) for count in counts(spec) for c in CRITERIA]


def steps(spec: RecipeSpec) -> list[Step]:
    """Score, prune at three ratios by two criteria, retrain each, evaluate and time everything.

    Tasks are separate steps that may fail: the paper's tasks need a network.
    """
    texts.given_apart(spec)
    places = suites.find(suites.expand(spec.tasks), spec.task_dir)  # before computing
    task_code.check(places, allowed=spec.allow_task_code)
    found = [parts.scored(spec), parts.evaluated(spec, "dense"), _asked(spec, "dense")]
    names = [name for name, *_ in variants(spec)]
    for name, criterion, count in variants(spec):
        found += parts.cut(spec, name, criterion, count=count)
    found += map(_retrained, names)
    rest = [parts.evaluated(spec, name) for name in names]
    for name in names:
        rest += [parts.evaluated(spec, f"lora-{name}"), _asked(spec, f"lora-{name}")]
    found += [replace(step, group="evaluations") for step in rest]
    found.append(Step("speed", "benchmark", lambda chain: timing(chain, *_fastest(spec))))
    return found


def tasks_of(spec: RecipeSpec) -> dict[str, Any]:
    """Return the task options: those given, or the demo's questions, or the paper's seven tasks."""
    demo = spec.checkpoint == "demo" and not spec.tasks
    return {
        "tasks": spec.tasks or (("demo",) if demo else ("paper",)),
        "task_dir": spec.task_dir,
        **({"allow_task_code": True} if spec.allow_task_code else {}),
        "limit": spec.limit or (LIMIT if demo else None),
    }


def _asked(spec: RecipeSpec, name: str) -> Step:
    def options(chain: Chain) -> dict[str, Any]:
        if "tasks-dense" in chain.failed:
            raise RunError("Skipped: there is no dense result to compare with.", "See tasks-dense.")
        return {"checkpoint": parts.folder_of(chain, name), **tasks_of(spec)}

    return Step(f"tasks-{name}", "evaluate", options, optional=True)


def _fastest(spec: RecipeSpec) -> list[str]:
    """Return one variant per count: those of other criteria have the same shape and speed."""
    return [name for name, criterion, _ in variants(spec) if criterion == CRITERIA[0]]


def _retrained(name: str) -> Step:
    def options(chain: Chain) -> dict[str, Any]:
        return retraining.restoring(chain, name, data=texts.apart(chain)[0])

    return Step(f"lora-{name}", "retrain", options, group="trainings")


@dataclass(frozen=True)
class Mean:
    """The plain mean over the tasks that one checkpoint was asked."""

    tasks_mean: float | None = None
    tasks_stderr: float | None = None


def asked(chain: Chain, name: str) -> Mean:
    """Return the plain mean over the tasks' own metrics, and its standard error.

    Tasks whose answers are written are left out, unless all are. The standard error assumes
    independent tasks. Empty if the tasks were not run.
    """
    step = f"tasks-{name}"
    if step in chain.failed:
        return Mean()
    rows = chain.table(step, Score)
    every = []
    for task in suites.expand(tasks_of(chain.spec)["tasks"]):
        own = {row.metric: row for row in rows if row.task == task}
        every.append(own[suites.metric_of(task, list(own))])
    found = [row for row in every if not suites.is_written(row.task, row.metric)] or every
    errors = [row.stderr**2 for row in found if row.stderr]
    whole = len(errors) == len(found)
    return Mean(
        math.fsum(row.value for row in found) / len(found),
        math.sqrt(math.fsum(errors)) / len(found) if whole else None,
    )


def table(chain: Chain) -> list[PaperRow]:
    """Return the rows of table.csv: dense, every variant before and after LoRA, published."""
    spec = chain.spec
    text = Path(texts.apart(chain)[1]).name
    fast = {
        int(name.rsplit("-", 1)[1]): speed.factor
        for name, speed in zip(_fastest(spec), speeds(chain, "speed"), strict=True)
    }
    dense = chain.read("evaluate-dense", Summary)
    measured = PaperRow(kind="measured", model=spec.checkpoint, text=text, source="this run")
    rows = [
        replace(
            measured,
            blocks_dropped=0,
            params=dense.parameters,
            ratio=0.0,
            ppl=parts.perplexity(chain, "dense"),
            speedup=1.0,
            **vars(asked(chain, "dense")),
        )
    ]
    for name, criterion, count in variants(spec):
        record = chain.read(name, Pruning)
        for step, retrained in ((name, ""), (f"lora-{name}", "lora")):
            rows.append(
                replace(
                    measured,
                    criterion=criterion,
                    blocks_dropped=count,
                    params=record.parameters_after,
                    ratio=record.ratio,
                    retrained=retrained,
                    ppl=parts.perplexity(chain, step),
                    speedup=fast[count],
                    **vars(asked(chain, step) if retrained else Mean()),
                )
            )
    return rows + published_rows()


def published_rows() -> list[PaperRow]:
    """Return the authors' own figures (WikiText-2 at 128 tokens), marked as published."""
    return [
        PaperRow(
            kind="published",
            model=row["model"],
            criterion="" if row["method"] == "dense" else row["method"],
            params=row["parameters"],
            ratio=row["ratio"],
            retrained=row["retrained"],
            text="WikiText-2",
            ppl=row["wikitext2_ppl"],
            tasks_mean=row["average_7"] / 100 if row["average_7"] else None,
            source=row["source"],
        )
        for row in published.figures()
        if row["source"] == AUTHORS
    ]


def verdict(chain: Chain) -> Verdict:
    """Write the table; report what the largest cut costs before and after retraining."""
    rows = table(chain)
    PaperRow.write(chain, rows)
    own = [row for row in rows if row.kind == "measured"]
    dense, most = own[0].ppl or math.nan, max(row.blocks_dropped or 0 for row in own)
    last = [row for row in own if row.blocks_dropped == most]
    best = {
        kind: min(row.ppl or math.nan for row in last if row.retrained == kind) / dense
        for kind in ("", "lora")
    }
    blocks = chain.read("evaluate-dense", Summary).blocks
    return Verdict(
        f"Without {most} of {blocks} blocks "
        f"({last[0].ratio:.0%} of the parameters), perplexity is {best['']:.3f} x dense, and "
        f"{best['lora']:.3f} x after LoRA; the model runs at {speeds(chain, 'speed')[-1]}.",
        (
            *map(_sentence, own),
            _evaluated_on(chain),
            f"table.csv also has {sum(row.kind == 'published' for row in rows)} rows marked as "
            "published; the authors measured them on the models and text named there.",
            parts.measured_on(chain.read(parts.SCORES, Importance)),
        ),
        {"rows": [{k: v for k, v in asdict(row).items() if v is not None} for row in own]},
    )


def _sentence(row: PaperRow) -> str:
    """Return one measured row as a sentence."""
    name = "Dense"
    if row.blocks_dropped:
        retrained = row.retrained or "not retrained"
        name = f"{row.criterion}, {row.blocks_dropped} blocks, {retrained}"
    tasks = f", tasks {row.tasks_mean:.3f}" if row.tasks_mean is not None else ""
    if row.tasks_stderr is not None:
        tasks += f" ± {row.tasks_stderr:.3f}"
    return f"{name}: perplexity {rounded(row.ppl)}{tasks}."


def _evaluated_on(chain: Chain) -> str:
    """Return the sentence on what perplexity and tasks were measured on."""
    found = parts.measured_text(chain, "dense")
    text = f"Perplexity of {Path(found.source).name} in windows of {found.window} tokens"
    if "tasks-dense" in chain.failed:
        return (
            f"{text}. No tasks were run. {chain.failed['tasks-dense']} Once this is fixed, re-run "
            "the recipe with --overwrite; finished steps are kept."
        )
    options = tasks_of(chain.spec)
    limit = f"{options['limit']} questions each" if options["limit"] else "all questions"
    return f"{text}; tasks: mean of {', '.join(options['tasks'])}, {limit}."


RECIPE = Recipe(
    "paper-table",
    "The paper's table",
    "Three ratios, two criteria, before and after LoRA: perplexity, tasks and speed, next to the "
    "published figures.",
    steps,
    verdict,
)
