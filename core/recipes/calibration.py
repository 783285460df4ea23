"""Recipe ``calibration``: does a block ranking computed on one dataset transfer to another?

A 2 x 2 design: blocks are scored on A and on B, each plan is carried out, and both variants are
evaluated on A and on B. ``--data A,B`` names the two datasets; the default is the demo world's
stories and its instructions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.data.sources import Use, instruction_rows
from core.evaluate.results import TextRow
from core.importance.agreement import spearman
from core.prune.results import Pruning
from core.prune.score_results import Importance
from core.recipes import parts, texts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.results import CalibrationRow
from core.recipes.spec import RecipeSpec
from core.runs import workspace

RATIO = 0.2
SIDES = ("a", "b")
INSTRUCTIONS = "demo instructions"
HOLDS = 1.05
"""A plan transfers to a text if it costs at most this many times what that text's own plan does."""


def sources(spec: RecipeSpec) -> tuple[str, str] | None:
    """Return the two texts, or None for the default; raises `OptionError` unless there are two."""
    return texts.two_sources(spec, "text", "A.txt,B.txt")


def names(spec: RecipeSpec) -> tuple[str, str]:
    """Return the labels of the two texts."""
    found = sources(spec)
    if found is None:
        return "demo", INSTRUCTIONS
    first, second = (Path(source).name for source in found)
    return (first, second) if first != second else found


def _text(chain: Chain, side: int, use: Use) -> str:
    """Return a side's text for calibration or evaluation; the demo's two have no row in common."""
    given = sources(chain.spec)
    if given is not None or side == 0:
        return given[side] if given else "demo"
    path = chain.folder / f"instructions-{use}.jsonl"
    if not path.is_file():
        rows = instruction_rows("demo", "heldout" if use == "heldout" else "train")
        texts = ("\n".join(filter(None, row.values())) for row in rows)
        workspace.write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def steps(spec: RecipeSpec) -> list[Step]:
    """Score on each text, carry out both plans, and evaluate all three models on both texts."""
    names(spec)
    ratio = RATIO if spec.ratio is None else spec.ratio
    made = [_scored(spec, side) for side in range(2)]
    for name in SIDES:
        made += parts.cut(spec, name, "ppl", scores=f"scores-{name}", ratio=ratio)
    return [*made, *(_evaluated(spec, name) for name in ("dense", *SIDES))]


def _scored(spec: RecipeSpec, side: int) -> Step:
    def scored(chain: Chain) -> Mapping[str, Any]:
        return {
            "checkpoint": spec.checkpoint,
            "metrics": ("ppl",),
            "calibration": _text(chain, side, "calibration"),
            "length": min(128, parts.context(spec)),
        }

    return Step(f"scores-{SIDES[side]}", "importance", scored, group="scores")


def _evaluated(spec: RecipeSpec, name: str) -> Step:
    def options(chain: Chain) -> Mapping[str, Any]:
        return {
            "checkpoint": parts.folder_of(chain, name),
            "perplexity": tuple(_text(chain, side, "heldout") for side in range(2)),
            "window": (min(128, parts.context(spec)),),
        }

    return Step(f"evaluate-{name}", "evaluate", options)


def table(chain: Chain) -> list[CalibrationRow]:
    """Return one row per calibration text and evaluation text."""
    labels = names(chain.spec)
    dense = [row.ppl for row in chain.table("evaluate-dense", TextRow)]
    rows = []
    for side, name in enumerate(SIDES):
        dropped = " ".join(map(str, chain.read(name, Pruning).dropped))
        for place, row in enumerate(chain.table(f"evaluate-{name}", TextRow)):
            ppl = row.ppl
            rows.append(
                CalibrationRow(labels[side], labels[place], ppl, ppl / dense[place], dropped)
            )
    return rows


def verdict(chain: Chain) -> Verdict:
    """Report what each plan costs on the other text, and how far the two rankings agree."""
    rows = table(chain)
    CalibrationRow.write(chain, rows)
    first, second = names(chain.spec)
    ratio = {(row.calibration, row.evaluated): row.ratio for row in rows}
    agreement = spearman(*(parts.scores_of(chain, "ppl", f"scores-{name}") for name in SIDES))
    drops = [set(row.dropped.split()) for row in (rows[0], rows[2])]
    extra = [
        ratio[first, second] / ratio[second, second],
        ratio[second, first] / ratio[first, first],
    ]
    holds = "transfers" if extra[0] <= HOLDS else "does not transfer"
    return Verdict(
        f"The block ranking computed on {first} {holds} to {second}: on {second}, its plan costs "
        f"{ratio[first, second]:.3f} x the dense perplexity, and the plan from {second} itself "
        f"{ratio[second, second]:.3f} x.",
        (
            f"Conversely, on {first} the plan from {second} costs {ratio[second, first]:.3f} x, "
            f"and the plan from {first} itself {ratio[first, first]:.3f} x.",
            f"Rank correlation of the blocks' perplexities: {agreement:.2f}; "
            f"{len(drops[0] & drops[1])} of {len(drops[0])} dropped blocks are the same.",
            parts.measured_on(chain.read("scores-a", Importance)),
        ),
        {
            "table": [asdict(row) for row in rows],
            "rank_agreement": agreement,
            "same_blocks": len(drops[0] & drops[1]),
            "extra": extra,
        },
    )


RECIPE = Recipe(
    "calibration",
    "Does the block ranking transfer to another dataset?",
    "Scores blocks on two datasets, carries out both plans, and evaluates each on both datasets.",
    steps,
    verdict,
)
