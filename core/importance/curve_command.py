"""``python -m core curve CHECKPOINT --scores SCORES --out DIR``: quality against depth.

Perplexity after removing the first k blocks, for several criteria. All block sets share one pass
over the weights, in which common prefixes are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.checkpoint import headers, locate
from core.data import sources
from core.data.calibration import calibration_rows
from core.errors import OptionError, PlanError
from core.prune import plan, scores
from core.runs import workspace
from core.runs.spec import DeviceOptions, option

if TYPE_CHECKING:
    from core.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class CurveSpec(DeviceOptions):
    """Measure perplexity after removing the first k blocks, for several criteria."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, or demo.")
    scores: str = option(help="Importance run, or a CSV of block scores.")
    out: str = option(help="Run directory to write.")
    criteria: tuple[str, ...] = option(("ppl", "taylor"), help="Criteria to compare.")
    counts: tuple[int, ...] = option(
        (), help="Numbers of blocks to remove, e.g. 1-8. Default: every possible count.", low=0
    )
    protect_first: int | None = option(
        None, help="First blocks to keep. Default: as for plan.", low=0
    )
    protect_last: int | None = option(
        None, help="Last blocks to keep. Default: as for plan.", low=0
    )
    calibration: str = option(
        "", help="Text to evaluate on. Default: same as the importance run, otherwise demo."
    )
    samples: int | None = option(
        None, help="Rows. Default: same as the importance run, otherwise 10.", low=1
    )
    length: int | None = option(
        None, help="Tokens per row. Default: same as the importance run, otherwise 128.", low=2
    )
    seed: int | None = option(
        None,
        help="Seed for rows and crops. Default: same as the importance run, otherwise 1234.",
        low=0,
    )


def _plans(
    spec: CurveSpec, info: headers.CheckpointInfo, found: scores.BlockScores
) -> list[plan.Plan]:
    """Return one plan for every criterion and count."""
    if found.blocks != info.blocks:
        raise PlanError(
            f"There are scores for {found.blocks} blocks, but the checkpoint has {info.blocks}.",
            "Give the scores of this checkpoint.",
        )
    first, last = plan.default_protection(info.blocks)
    first = first if spec.protect_first is None else spec.protect_first
    last = last if spec.protect_last is None else spec.protect_last
    most = min(info.blocks - first - last, info.blocks - 1)
    counts = sorted({c for c in spec.counts if c > 0}) or list(range(1, most + 1))
    if not spec.criteria:
        raise OptionError("--criteria is empty.", "Use e.g. ppl,taylor.")
    return [
        plan.choose(
            found, criterion, count=count, info=info, protect_first=first, protect_last=last
        )
        for criterion in spec.criteria
        for count in counts
    ]


def run(spec: CurveSpec, run: Run) -> None:
    """Measure all sets in one pass and write curve.csv and summary.json."""
    from core.importance.branches import losses_without, make_batch
    from core.model import loading, memory, precision
    from core.model.blocks import BlockView

    checkpoint = locate.open(spec.checkpoint, run.progress)
    folder, info = checkpoint.folder, checkpoint.info
    plans = _plans(spec, info, scores.load(spec.scores))
    text = _text(spec)
    rows = calibration_rows(
        text["calibration"],
        loading.load_tokenizer(folder),
        text["samples"],
        text["length"],
        text["seed"],
    )
    device = precision.resolve_device(spec.device)
    dtype = precision.decide(spec.dtype, device, info.dtype, "blocks").weights
    memory.reset_peak_memory(device)
    view = BlockView(loading.load_model(folder, device, dtype))
    batch = make_batch(rows, view)
    sets = [frozenset[int](), *(frozenset(p.drop) for p in plans)]
    with memory.out_of_memory_explained("measuring the curve"):
        losses = losses_without(view, batch, sets, run.progress)
    assert losses is not None
    values = losses.perplexity
    table: list[tuple[Any, ...]] = [
        (criterion, 0, 0.0, info.parameters, values[0]) for criterion in spec.criteria
    ]
    table += [
        (p.criterion, len(p.drop), p.ratio, p.params, value)
        for p, value in zip(plans, values[1:], strict=True)
    ]
    order = {scores.canonical(name): at for at, name in enumerate(spec.criteria)}
    table.sort(key=lambda row: (order[scores.canonical(row[0])], row[1]))
    run.write_csv("curve.csv", ("criterion", "count", "ratio", "params", "ppl"), table)
    run.write_json(
        "summary.json",
        {
            "checkpoint": spec.checkpoint,
            "checkpoint_key": info.key,
            "scores": spec.scores,
            "dense_ppl": values[0],
            "protected": list(plans[0].protected) if plans else [],
            "drops": {f"{p.criterion} {len(p.drop)}": list(p.drop) for p in plans},
            **text,
            "calibration_content": sources.describe(text["calibration"])["content"],
            "tokens": batch.predictions,
            "device": str(device),
            "dtype": precision.dtype_name(dtype),
            "peak_memory_mib": round(memory.peak_memory_mib(device), 1),
        },
    )


def _text(spec: CurveSpec) -> dict[str, Any]:
    """Return calibration, samples, length and seed; the importance run's unless given."""
    from pathlib import Path

    folder = Path(spec.scores)
    if not folder.is_dir():
        folder = workspace.default_root() / spec.scores
    there = workspace.read_json(folder / "summary.json") or {}
    defaults = {"calibration": "demo", "samples": 10, "length": 128, "seed": 1234}
    given = {name: getattr(spec, name) for name in defaults}
    return {
        name: given[name] if given[name] not in (None, "") else there.get(name, default)
        for name, default in defaults.items()
    }
