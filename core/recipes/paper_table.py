"""Recipe ``paper-table``: the main table of Shortened LLaMA for one checkpoint.

Kim et al., arXiv 2402.02834: blocks dropped by PPL and Taylor+ at the paper's three ratios (6, 9
and 11 of 32 blocks), retrained with LoRA, judged by perplexity and zero-shot tasks, and timed. The
authors' own figures stand beside it, marked as published.
"""

from __future__ import annotations

from typing import Any

from core import checkpoint, workspace
from core.compare import published
from core.recipes import parts, retraining
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.drop_one import speeds, timing

CRITERIA = ("ppl", "taylor")
SHARES = (6 / 32, 9 / 32, 11 / 32)
"""Of the blocks; the paper calls them 20, 27 and 35 %."""
COLUMNS = (
    "kind",
    "model",
    "criterion",
    "blocks_dropped",
    "params",
    "ratio",
    "retrained",
    "text",
    "ppl",
    "tasks_mean",
    "speedup",
    "source",
)
"""Of table.csv; ``kind`` is measured or published."""
AUTHORS = "authors' repository"
LIMIT = 40
"""Questions of each demo task; real tasks are asked in full."""


def counts(spec: Any) -> list[int]:
    """Return how many blocks the paper's ratios drop here, each once; at least one."""
    folder = checkpoint.resolve(spec.checkpoint, allow_config_only=True)
    blocks = checkpoint.inspect(folder).blocks
    return sorted({max(1, round(blocks * share)) for share in SHARES})


def variants(spec: Any) -> list[tuple[str, str, int]]:
    """Return (step, criterion, count) of every pruned model."""
    return [(f"{c}-{count}", c, count) for count in counts(spec) for c in CRITERIA]


def steps(spec: Any) -> list[Step]:
    """Score, cut at three ratios by two criteria, retrain each, judge and time everything."""
    found = [parts.scored(spec)]
    tasks = tasks_of(spec)
    found += [parts.judged(spec, "dense", **tasks)]
    for name, criterion, count in variants(spec):
        found += parts.cut(spec, name, criterion, count=count)
        found += [_retrained(name), parts.judged(spec, name)]
        found += [parts.judged(spec, f"lora-{name}", **tasks)]
    found.append(Step("speed", "benchmark", lambda chain: timing(chain, *_fastest(spec))))
    return found


def tasks_of(spec: Any) -> dict[str, Any]:
    """Return the task options: the demo's own questions for the demo, else the paper's seven."""
    if spec.checkpoint == "demo":
        return {"tasks": ("demo",), "limit": LIMIT}
    return {"tasks": ("paper",)}


def _fastest(spec: Any) -> list[str]:
    """Return one variant a count: those of other criteria have the same shape and speed."""
    return [name for name, criterion, _ in variants(spec) if criterion == CRITERIA[0]]


def _retrained(name: str) -> Step:
    def options(chain: Chain) -> dict[str, Any]:
        found = retraining.options(chain, "lora", checkpoint=str(chain.dir(name)))
        if found["data"] == "demo":
            found["format"] = "text"
        return {**found, "dense": chain.spec.checkpoint, "merge": True}

    return Step(f"lora-{name}", "retrain", options)


def mean(chain: Chain, step: str) -> float | None:
    """Return the mean over tasks that the run reports, None where it has none."""
    for row in chain.rows(step, "tasks.csv"):
        if row["task"].startswith("AVE"):
            return float(row["value"])
    return None


def table(chain: Chain) -> list[dict[str, Any]]:
    """Return the rows of table.csv: dense, every variant before and after LoRA, published ones."""
    spec = chain.spec
    text = parts.text_of(spec)
    fast = {
        int(name.rsplit("-", 1)[1]): speed.factor
        for name, speed in zip(_fastest(spec), speeds(chain, "speed"), strict=True)
    }
    dense = chain.json("judge-dense")
    measured = {"kind": "measured", "model": spec.checkpoint, "text": text, "source": "this run"}
    rows = [
        {
            **measured,
            "blocks_dropped": 0,
            "params": dense["parameters"],
            "ratio": 0.0,
            "ppl": parts.perplexity(chain, "dense"),
            "tasks_mean": mean(chain, "judge-dense"),
            "speedup": 1.0,
        }
    ]
    for name, criterion, count in variants(spec):
        record = chain.json(name, "pruning.json")
        for judged, retrained in ((name, ""), (f"lora-{name}", "lora")):
            rows.append(
                {
                    **measured,
                    "criterion": criterion,
                    "blocks_dropped": count,
                    "params": record["parameters_after"],
                    "ratio": record["ratio"],
                    "retrained": retrained,
                    "ppl": parts.perplexity(chain, judged),
                    "tasks_mean": mean(chain, f"judge-{judged}") if retrained else None,
                    "speedup": fast[count],
                }
            )
    return rows + published_rows()


def published_rows() -> list[dict[str, Any]]:
    """Return the authors' own figures (WikiText-2 at 128 tokens), marked as published."""
    return [
        {
            "kind": "published",
            "model": row["model"],
            "criterion": "" if row["method"] == "dense" else row["method"],
            "params": row["parameters"],
            "ratio": row["ratio"],
            "retrained": row["retrained"],
            "text": "WikiText-2",
            "ppl": row["wikitext2_ppl"],
            "tasks_mean": row["average_7"] / 100 if row["average_7"] else None,
            "source": row["source"],
        }
        for row in published.figures()
        if row["source"] == AUTHORS
    ]


def verdict(chain: Chain) -> Verdict:
    """Write the table; say what the largest cut costs before and after retraining."""
    rows = table(chain)
    workspace.write_csv(
        chain.folder / "table.csv", COLUMNS, [[row.get(c) for c in COLUMNS] for row in rows]
    )
    own = [row for row in rows if row["kind"] == "measured"]
    dense, most = own[0]["ppl"], max(row["blocks_dropped"] for row in own)
    last = [row for row in own if row["blocks_dropped"] == most]
    best = {kind: min((r for r in last if r["retrained"] == kind), key=lambda r: r["ppl"])
            for kind in ("", "lora")}  # fmt: skip
    return Verdict(
        f"Without {most} blocks ({last[0]['ratio']:.0%} of the parameters) perplexity is "
        f"{best['']['ppl'] / dense:.3f} x dense, after LoRA {best['lora']['ppl'] / dense:.3f} x; "
        f"speed is {best['']['speedup']:.2f} x dense.",
        (
            *(
                f"{row['criterion']}, {row['blocks_dropped']} blocks, "
                f"{row['retrained'] or 'not retrained'}: perplexity {row['ppl']:.4g}"
                + (f", tasks {row['tasks_mean']:.3f}." if row["tasks_mean"] is not None else ".")
                for row in own[1:]
            ),
            f"{sum(row['kind'] == 'published' for row in rows)} published rows are in table.csv, "
            "marked; they were measured on other models and texts.",
            parts.measured_on(chain.json(parts.SCORES)),
        ),
        {"rows": own},
    )


RECIPE = Recipe(
    "paper-table",
    "The paper's table",
    "Three ratios, two criteria, before and after LoRA: perplexity, tasks and speed, with the "
    "published figures beside.",
    steps,
    verdict,
)
