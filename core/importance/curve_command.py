"""``python -m core curve CHECKPOINT --scores SCORES --out DIR``: quality against depth.

Perplexity after removing the first k blocks, for several criteria. All block sets share one pass
over the weights, in which common prefixes are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint import chat, headers, locate
from core.checkpoint.vocabulary import AUTO, text_of
from core.criteria import SUBLAYERS
from core.data import sources
from core.data.calibration import JOINS
from core.errors import OptionError, PlanError
from core.importance import estimate as work
from core.importance import passes
from core.importance.capacity import Capacity, Demand, decide, limit_of, view_of
from core.importance.drawing import drawn_rows
from core.prune import plan, scores
from core.prune.score_results import Curve, CurveRow, Importance, plan_key
from core.runs import dtypes, pace, ranks, workspace
from core.runs.footprint import Footprint
from core.runs.spec import MemoryOptions, ProcessOptions, option

if TYPE_CHECKING:
    from core.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class CurveSpec(MemoryOptions, ProcessOptions):
    """Measure perplexity after removing the first k blocks, for several criteria."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
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
        "",
        help="Text to evaluate on. Default: same as the importance run, otherwise auto (english, "
        "or the demo's stories).",
    )
    join: str | None = option(
        None, help="As for importance. Default: same as the importance run.", choices=JOINS
    )
    chat_template: str | None = option(
        None,
        help="As for importance. Default: same as the importance run.",
        choices=chat.CHOICES,
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
    dry_run: bool = option(False, help="Estimate time and memory without running anything.")


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
    if SUBLAYERS in spec.criteria:
        raise OptionError(
            f"--criteria: {SUBLAYERS} ranks parts of blocks, but a curve removes whole blocks.",
            "Leave it out; the Prune page measures the parts that you choose.",
        )
    return [
        plan.choose(
            found, criterion, count=count, info=info, protect_first=first, protect_last=last
        )
        for criterion in spec.criteria
        for count in counts
    ]


def dry_run(spec: CurveSpec) -> dict[str, Any]:
    """Return the estimated operations, memory and time; only headers and scores are needed.

    Raises `CheckpointError`, `PlanError` or `OptionError` as the run would.
    """
    checkpoint = locate.open(spec.checkpoint, need="config", need_tokenizer=False)
    info, asked = checkpoint.info, _text(spec, checkpoint.folder)
    plans = _plans(spec, info, scores.load(spec.scores))
    sets = [frozenset[int](), *(frozenset(plan.drop) for plan in plans)]
    size = asked.samples, min(asked.length, info.context or asked.length)
    formats = dtypes.expected(spec.dtype, info.dtype, spec.device, "blocks")
    room = capacity(spec, info, formats, sets, *size)
    taken = footprint(spec, info, room, sets, *size)
    seconds = work.seconds(taken.flops, spec.device, info.parameters)
    seconds = ranks.shared_seconds(seconds, spec.device, spec.processes)
    return {
        "blocks": info.blocks,
        "criteria": list(spec.criteria),
        "counts": sorted({len(plan.drop) for plan in plans}),
        "calibration": asked.source,
        "samples": size[0],
        "length": size[1],
        "dtype": formats.weights,
        "sets": len(set(sets)),
        "flops": taken.flops,
        **room.facts(),
        **taken.facts(),
        **ranks.facts(spec.processes, asked.samples),
        "seconds": None if seconds is None else pace.START_S + seconds,
        "kind": "estimated",
        "seconds_from": work.origin(spec.device, info.parameters),
    }


def footprint(
    spec: CurveSpec,
    info: headers.CheckpointInfo,
    room: Capacity,
    sets: Sequence[frozenset[int]],
    rows: int,
    tokens: int,
) -> Footprint:
    """Return what measuring ``sets`` takes, the empty one among them; they share their prefixes."""
    count, distinct = passes.shared(range(info.blocks), sets)
    once = sum(work.block_flops(info, block, rows, tokens) for block in range(info.blocks))
    flops = count * once / max(1, info.blocks) + distinct * work.head_flops(info, rows, tokens)
    return room.footprint(info, flops, processes=spec.processes)


def capacity(
    spec: CurveSpec,
    info: headers.CheckpointInfo,
    formats: dtypes.Formats,
    sets: Sequence[frozenset[int]],
    rows: int,
    tokens: int,
) -> Capacity:
    """Return how measuring ``sets`` runs within the memory."""
    limit = limit_of(spec.device, spec.memory_limit, spec.processes)
    own = ranks.most(rows, spec.processes)
    held = Demand("curve", len(set(sets)))
    return decide(info, formats, spec.device, limit, own, tokens, [held])


def run(spec: CurveSpec, run: Run) -> None:
    """Measure all sets in one pass and write curve.csv and summary.json."""
    from core.importance.branches import losses_without, make_batch
    from core.model import loading, memory, precision

    checkpoint = locate.open(spec.checkpoint, run.progress)
    folder, info = checkpoint.folder, checkpoint.info
    plans = _plans(spec, info, scores.load(spec.scores))
    asked = _text(spec, folder)
    tokenizer = loading.load_tokenizer(folder)
    drawn = drawn_rows(asked, asked.source, tokenizer, asked.samples, asked.length, run.progress)
    prepared = loading.prepare(spec, checkpoint, "blocks")
    sets = [frozenset[int](), *(frozenset(p.drop) for p in plans)]
    longest = max(map(len, drawn.rows))
    room = capacity(spec, info, prepared.formats, sets, len(drawn.rows), longest)
    view = view_of(prepared, room, run.progress.log)
    batch = make_batch(drawn.rows, view, room.group, run.ranks)
    with memory.out_of_memory_explained("measuring the curve"):
        losses = losses_without(view, batch, sets, run.progress)
    view.close()
    assert losses is not None
    values = losses.perplexity
    table = [CurveRow(name, 0, 0.0, info.parameters, values[0]) for name in spec.criteria]
    table += [
        CurveRow(p.criterion, len(p.drop), p.ratio, p.params, value)
        for p, value in zip(plans, values[1:], strict=True)
    ]
    order = {scores.canonical(name): at for at, name in enumerate(spec.criteria)}
    table.sort(key=lambda row: (order[scores.canonical(row.criterion)], row.count))
    CurveRow.write(run, table)
    Curve(
        checkpoint=spec.checkpoint,
        checkpoint_key=info.key,
        scores=spec.scores,
        dense_ppl=values[0],
        protected=plans[0].protected if plans else (),
        drops={plan_key(p.criterion, len(p.drop)): p.drop for p in plans},
        calibration=asked.source,
        samples=asked.samples,
        length=asked.length,
        seed=asked.seed,
        calibration_content=sources.describe(asked.source)["content"],
        text=drawn.facts,
        tokens=batch.predictions,
        compute_dtype=precision.dtype_name(prepared.precision.arithmetic),
        processes=spec.processes,
        **prepared.facts(),
    ).write(run)


@dataclass(frozen=True)
class _Text:
    """The rows that plans are measured on."""

    source: str = AUTO
    samples: int = 10
    length: int = 128
    seed: int = 1234
    join: str = "auto"
    chat_template: str = "auto"


def _text(spec: CurveSpec, checkpoint: Path) -> _Text:
    """Return calibration, samples, length, seed and how rows become text.

    The importance run's, unless given.
    """
    folder = Path(spec.scores)
    if not folder.is_dir():
        folder = workspace.default_root() / spec.scores
    run = Importance.read(folder) or Importance()
    usual = _Text()

    other = bool(spec.calibration) or not run.calibration
    as_scored = "on" if run.text.chat_template else "off"

    def first(*values: int | None) -> int:
        return next(v for v in values if v is not None)

    return _Text(
        text_of(spec.calibration or run.calibration or usual.source, checkpoint),
        first(spec.samples, run.samples, usual.samples),
        first(spec.length, run.length, usual.length),
        first(spec.seed, run.seed, usual.seed),
        spec.join or ("on" if run.text.joined else usual.join),
        spec.chat_template or (usual.chat_template if other else as_scored),
    )
