"""``python -m core plan SCORES --criterion NAME --count K``: the blocks to drop, as JSON.

Of a budget run, ``plan DIR --latency 0.8``: what every block becomes.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint import headers, locate
from core.criteria import BUDGET, SUBLAYERS
from core.errors import CheckpointError, OptionError
from core.prune import budgets, cautions, plan
from core.prune import scores as block_scores
from core.prune.budgets import Limits
from core.prune.version_results import OUTPUT_TOKENS
from core.runs import workspace
from core.runs.progress import StderrProgress
from core.runs.spec import option
from core.words import rounded


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """Choose the blocks to drop."""

    scores: str = option(
        positional=True,
        help="Folder of an importance, search or budget run, or a CSV of per-block scores.",
    )
    criterion: str = option(
        "",
        help="Criterion that ranks the blocks: "
        + ", ".join(block_scores.CRITERIA)
        + ". A budget run needs none.",
    )
    count: int | None = option(
        None, help="Number of blocks to drop; of parts, by sublayers or a search for them."
    )
    ratio: float | None = option(
        None, help="Share of all parameters to remove; the closest number of blocks is used."
    )
    params: int | None = option(
        None,
        help="Target parameter count; the closest number of blocks is used. Of a budget run: the "
        "most parameters.",
    )
    latency: float | None = option(
        None,
        help="Of a budget run: most time of a generation, as a share of the dense model's, e.g. "
        "0.8. Several budgets can be given; all are kept.",
    )
    tokens_per_s: float | None = option(
        None, help="Of a budget run: least throughput of all sequences together."
    )
    memory_gib: float | None = option(
        None,
        help="Of a budget run: most memory of weights and of the key/value cache at its batch and "
        "context.",
        unit="GiB",
    )
    output_tokens: int = option(
        OUTPUT_TOKENS,
        help="Of a budget run: tokens generated after the prompt, for latency and throughput.",
        low=1,
        unit="tokens",
    )
    pairs: str | None = option(
        None,
        help="Of a budget run: a search run whose pairs of blocks count too (--methods pairs, "
        "--objective kl).",
    )
    checkpoint: str | None = option(
        None, help="The checkpoint that was scored; a folder with only config.json is enough."
    )
    protect_first: int | None = option(
        None, help="First blocks to keep. Default: 4 of 12 or more blocks, 1 of fewer, 0 of 2."
    )
    protect_last: int | None = option(
        None, help="Last blocks to keep. Default: 2 of 12 or more blocks, 1 of fewer, 0 of 2."
    )
    seed: int = option(1234, help="Seed of the random criterion.")


def run(spec: PlanSpec) -> dict[str, Any]:
    """Return the plan as printed: `Plan.to_dict` with the schema version."""
    folder = workspace.located(spec.scores)
    if folder is not None and budgets.is_run(folder):
        return _solve(spec, folder)
    if folder is not None:
        _check_ranked(spec)
    scores = block_scores.load(spec.scores)
    choice = plan.choose(
        scores,
        spec.criterion,
        count=spec.count,
        ratio=spec.ratio,
        params=spec.params,
        info=_info(spec, scores.checkpoint, scores.blocks),
        protect_first=spec.protect_first,
        protect_last=spec.protect_last,
        seed=spec.seed,
    )
    print(_sentence(choice), file=sys.stderr)
    return {"schema": 1, **choice.to_dict(), **_caution(choice)}


def _caution(choice: plan.Plan) -> dict[str, str]:
    """Print what was measured of cuts like this one, and return it for the plan's file."""
    found = cautions.attention(choice.removal, choice.blocks)
    if not found:
        return {}
    print(f"{found} {cautions.TRY}", file=sys.stderr)
    return {"caution": found}


def _check_ranked(spec: PlanSpec) -> None:
    """Raise `OptionError` for options that only a budget run can serve, or without a criterion."""
    names = [*(f.name for f in dataclasses.fields(Limits) if f.name != "params"), "pairs"]
    given = [f"--{n.replace('_', '-')}" for n in names if getattr(spec, n) is not None]
    if given or spec.criterion == BUDGET:
        raise OptionError(
            f"{' and '.join(given) or f'--criterion {BUDGET}'} needs a budget run, and "
            f"{spec.scores} is not one.",
            "Run budget first, then give its folder to plan.",
        )
    if not spec.criterion:
        raise OptionError("Missing required option: --criterion.", "Add it.")


def _solve(spec: PlanSpec, folder: Path) -> dict[str, Any]:
    """Return the plan that a budget run and the budgets give, with what is predicted of it."""
    if spec.criterion not in ("", BUDGET):
        raise OptionError(
            f"--criterion {spec.criterion}: {spec.scores} is a budget run, which has no criteria.",
            "Leave --criterion out, or give an importance or search run.",
        )
    for name in ("count", "ratio"):
        if getattr(spec, name) is not None:
            raise OptionError(
                f"--{name} does not apply to a budget run.",
                "Give --latency, --tokens-per-s, --memory-gib or --params.",
            )
    pairs = workspace.located(spec.pairs) if spec.pairs else None
    if spec.pairs and pairs is None:
        raise OptionError(f"--pairs: {spec.pairs} does not exist.", "Give a search run's folder.")
    library = budgets.load(folder, spec.scores, pairs)
    limits = Limits(spec.latency, spec.tokens_per_s, spec.memory_gib, spec.params)
    protect = plan.protection(library.blocks, spec.protect_first, spec.protect_last)
    found = budgets.solve(library, limits, output_tokens=spec.output_tokens, protect=protect)
    info = _info(spec, library.summary.checkpoint, library.blocks)
    chosen = plan.solved(found, library, limits, protect, info)
    print(_solved_sentence(chosen, found, library, spec.output_tokens), file=sys.stderr)
    return {
        "schema": 1,
        **chosen.to_dict(),
        "predicted": {
            **dataclasses.asdict(found.figures),
            "corrected_kl": budgets.corrected_kl(library, found.figures.kl),
            "output_tokens": spec.output_tokens,
            "latency": budgets.value_of(library, "latency", found.choice, spec.output_tokens),
            "batch": library.summary.batch,
            "context": library.summary.context,
            "device": library.summary.device,
            "dtype": library.summary.timed_dtype,
            "pairs": len(library.pairs),
            "optimal": found.optimal,
        },
        **_caution(chosen),
    }


def _solved_sentence(
    choice: plan.Plan, found: budgets.Solution, library: budgets.Library, output_tokens: int
) -> str:
    share = budgets.value_of(library, "latency", found.choice, output_tokens)
    figures = found.figures
    expected = budgets.corrected_kl(library, figures.kl)
    corrected = f" ({expected:.4f} by the plans measured whole)" if expected is not None else ""
    text = (
        f"Remove {choice.removal.text} of {choice.blocks} blocks: predicted KL "
        f"{figures.kl:.4f} nats per token{corrected}, {share:.3f} times the dense latency, "
        f"{rounded(figures.tokens_per_s)} tokens/s, {figures.memory_bytes / budgets.GIB:.4g} GiB "
        f"of weights and cache, {figures.params:,} parameters; first {choice.protect_first} and "
        f"last {choice.protect_last} protected."
    )
    if not found.optimal:
        text += f" A better plan may exist: the search ended after {budgets.SOLVE_S:g} s."
    return text


def _info(spec: PlanSpec, checkpoint: str | None, blocks: int) -> headers.CheckpointInfo | None:
    """Inspect the given checkpoint, or the one the run measured if it still exists."""
    if spec.checkpoint:
        return locate.open(
            spec.checkpoint, StderrProgress(), need="headers", need_tokenizer=False
        ).info
    folder_or_none = locate.local_folder(checkpoint) if checkpoint else None
    if folder_or_none is None:
        return None
    try:
        info = locate.at(folder_or_none).info
    except CheckpointError:
        return None
    return info if info.blocks == blocks else None


def _sentence(choice: plan.Plan) -> str:
    parts = len(choice.attention) + len(choice.mlp)
    text = f"Drop {len(choice.drop)} of {choice.blocks} blocks"
    if parts or choice.criterion == SUBLAYERS:
        text = f"Remove {2 * len(choice.drop) + parts} of {2 * choice.blocks} parts of blocks"
        text += f" ({choice.removal.text})"
    text += (
        f" by {choice.criterion}; "
        f"first {choice.protect_first} and last {choice.protect_last} protected"
    )
    if choice.params is not None and choice.ratio is not None:
        text += f"; {choice.params:,} parameters left, ratio {choice.ratio:.4f}"
    return text + "."
