"""``python -m core width CHECKPOINT --method flap --ratio 0.2 --out DIR``: fewer heads, neurons."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint import chat, locate
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.checkpoint.vocabulary import text_of
from core.data import sources
from core.data.calibration import JOIN_HELP, JOINS, SOURCE_HELP
from core.heal import seams
from core.heal.demand import of_narrower, regression_flops
from core.importance import estimate as work
from core.importance.capacity import Capacity, Demand, decide, limit_of, view_of
from core.importance.drawing import drawn_rows
from core.prune import depth, staging
from core.prune.results import Calibration, Healing, Pruning
from core.runs import dtypes, pace, ranks
from core.runs.dtypes import DTYPE_BYTES, Formats
from core.runs.footprint import Footprint
from core.runs.progress import SILENT, Progress, StderrProgress
from core.runs.spec import MemoryOptions, ProcessOptions, option
from core.width import extent, methods, ways
from core.width import plan as planning
from core.width.plan import WidthPlan
from core.width.results import BlockCut, Target, WidthPruning
from core.width.units import Counts

if TYPE_CHECKING:
    from core.model.blocks import BlockView
    from core.model.loading import Prepared
    from core.runs.run import Run
    from core.width.selection import Selection
    from core.width.write import Replaced

HEALS = ("none", "refit")
HEAL_SAMPLES, HEAL_LENGTH, HEAL_TOKENS = 32, 512, 24
"""Rows to heal on, at least, their length, and tokens per hidden dimension, at least."""
UNKNOWN_BEFORE = (
    "bias_compensation", "rescued", "healing", "calibration", "device", "dtype", "peak_memory_mib",
)  # fmt: skip
"""What pruning.json says of a run and a dry run cannot know."""


@dataclass(frozen=True, kw_only=True)
class WidthSpec(MemoryOptions, ProcessOptions):
    """Write a narrower checkpoint: heads and neurons removed by a width-pruning method."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    method: str = option(choices=methods.NAMES, help="Method that scores the heads and neurons.")
    ratio: float | None = option(
        None,
        help="The method's own ratio, as in its paper: share of heads and neurons removed from "
        "each pruned block; for flap, share of their parameters over all pruned blocks.",
    )
    params: int | None = option(
        None, help="Target parameter count; the closest achievable count is used."
    )
    match: str | None = option(
        None, help="Match this checkpoint's parameter count as closely as possible."
    )
    layers: str | None = option(
        None,
        help="Blocks to prune: first:end, e.g. 4:30 for blocks 4-29, or a list such as 3,5,8-12. "
        "Default: all but the protected first and last (llm-pruner, magnitude, random) or all "
        "(flap, wanda-sp).",
    )
    parts: str = option(
        "both",
        choices=extent.PARTS,
        help="What to cut: heads and neurons (both), heads only (attention), or neurons only "
        "(mlp).",
    )
    attention_layers: str | None = option(
        None, help="Blocks whose attention is pruned, if other than --layers; written the same way."
    )
    mlp_layers: str | None = option(
        None, help="Blocks whose MLP is pruned, if other than --layers; written the same way."
    )
    round_to: int | None = option(
        None,
        low=2,
        high=1024,
        help="Round the widths that are cut to a multiple of this, e.g. 128 for tensor cores and "
        "quantizers: neurons, and the channels of all heads together.",
    )
    order: str = option(
        "first",
        choices=ways.ORDERS,
        help="llm-pruner: order of its Taylor expansion (first is the cheapest), or vector: the "
        "absolute value of each channel's sum.",
    )
    ranking: str = option(
        "block",
        choices=ways.RANKINGS,
        help="llm-pruner, magnitude, random: rank the units of each block, or those of all blocks "
        "together (global; --ratio is then the share of all units).",
    )
    metric: str = option(
        "wifv",
        choices=ways.METRICS,
        help="flap: weighted fluctuation of the inputs (wifv), their weighted norm (wifn), or the "
        "fluctuation alone (ifv).",
    )
    structure: str = option(
        "al-am",
        choices=ways.STRUCTURES,
        help="flap: a share per block by scores (al) or the same for all (ul); heads and neurons "
        "ranked together (am), with one ratio (um), or with --remove-heads (mm).",
    )
    remove_heads: int | None = option(
        None,
        low=0,
        high=1_000_000,
        help="flap with al-mm or ul-mm: heads to remove over all blocks, with grouped-query "
        "attention key/value heads; neurons make up the rest of the ratio.",
    )
    calibration: str = option("auto", help=f"Text to calibrate on: {SOURCE_HELP}")
    samples: int | None = option(
        None,
        low=1,
        high=100000,
        help="Calibration rows. Default: the paper's (llm-pruner 10, wanda-sp 128, flap 1024), or "
        "as many as the text has.",
    )
    length: int | None = option(
        None,
        low=2,
        unit="tokens",
        help="Tokens per row. Default: the paper's (llm-pruner 64, others 128).",
    )
    seed: int = option(1234, low=0, help="Seed for rows, crops and the random control.")
    heal: str = option(
        "none",
        choices=HEALS,
        help="refit: refit the down projection of every narrower block in closed form, from the "
        "bottom up, towards the dense model's stream behind the block. Only what lowers the "
        "held-out KL to the dense model is kept.",
    )
    heal_samples: int | None = option(
        None,
        low=seams.HELD_OUT,
        high=100000,
        help=f"Rows of --calibration to heal on, a quarter of them held out. Default: "
        f"{HEAL_SAMPLES}, for wide models more, or as many as the text has.",
    )
    heal_length: int | None = option(
        None,
        low=2,
        unit="tokens",
        help=f"Tokens per row to heal on. Default: {HEAL_LENGTH}, or the model's context if that "
        "is shorter.",
    )
    join: str = option("auto", help=JOIN_HELP, choices=JOINS)
    chat_template: str = option("auto", help=chat.HELP, choices=chat.CHOICES)
    out: str = option(help="Folder for the narrower checkpoint.")
    dry_run: bool = option(False, help="Show what would be written without writing it.")


def make_plan(
    spec: WidthSpec, info: CheckpointInfo, progress: Progress = SILENT
) -> tuple[WidthPlan, Target | None]:
    """Return the plan and its target (None for a ratio).

    Raises `OptionError`, `PlanError`, or `CheckpointError` for a --match that cannot be read.
    """
    match, aim = None, None
    if spec.match is not None:
        other = locate.open(
            spec.match, progress, need="config", need_tokenizer=False, quantized=True
        )
        match = (spec.match, other.info.parameters)
        aim = Target(spec.match, match[1])
    elif spec.params is not None:
        aim = Target(None, spec.params)
    plan = planning.make(
        info,
        methods.get(spec.method),
        ratio=spec.ratio,
        params=spec.params,
        match=match,
        layers=spec.layers,
        attention_layers=spec.attention_layers,
        mlp_layers=spec.mlp_layers,
        parts=spec.parts,
        ways=ways.Ways(
            order=spec.order,
            ranking=spec.ranking,
            metric=spec.metric,
            structure=spec.structure,
            heads=spec.remove_heads,
            round_to=spec.round_to,
        ),
    )
    return plan, aim


def length_of(spec: WidthSpec, plan: WidthPlan) -> int:
    """Return the tokens per calibration row: as given, or the paper's, limited to the context."""
    from core.errors import OptionError

    if spec.length is not None and spec.length > plan.info.context:
        raise OptionError(
            f"--length: {spec.length} tokens exceed the model's context of {plan.info.context}.",
            f"Use {plan.info.context} or fewer.",
        )
    return spec.length or min(plan.method.length, plan.info.context)


def check(spec: WidthSpec) -> None:
    """Raise an error if the amount, blocks, row length, memory or checkpoints are invalid."""
    _, plan, _ = _planned(spec)
    length_of(spec, plan)
    planned_healing(spec, plan)
    if spec.memory_limit is not None:
        planned_capacity(spec, plan).check()


def _planned(spec: WidthSpec) -> tuple[locate.Checkpoint, WidthPlan, Target | None]:
    """Return the checkpoint, of which config.json is enough, the plan and its target."""
    progress = StderrProgress()
    checkpoint = locate.open(spec.checkpoint, progress, need="config", need_tokenizer=False)
    return checkpoint, *make_plan(spec, checkpoint.info, progress)


def dry_run(spec: WidthSpec) -> dict[str, Any]:
    """Return what shapes determine of pruning.json; config.json alone is enough.

    FLAP's adaptive shares depend on the weights and the text, so its parameter count is estimated
    from the ratio; everything else is exact.
    """
    checkpoint, plan, aim = _planned(spec)
    base = _start(spec, checkpoint)
    record = _sized(base, plan, aim, plan.parameters, plan.ratio).to_dict()
    for later in UNKNOWN_BEFORE:
        del record[later]
    return record | {
        "dry_run": True,
        "out": spec.out,
        "kind": plan.kind,
        "blocks": None if plan.counts is None else shapes(plan, plan.counts),
        "memory_bytes": {name: plan.parameters * width for name, width in DTYPE_BYTES.items()},
        **estimate(spec, plan),
        **memory_facts(spec, plan),
        **planned_healing(spec, plan),
    }


def planned_healing(spec: WidthSpec, plan: WidthPlan) -> dict[str, Any]:
    """Return what healing would do, empty without it.

    Raises `DataError` for too few tokens, and `OptionError` if rows are longer than the context.
    """
    from core.errors import OptionError

    if spec.heal == "none":
        return {}
    info, (rows, length) = plan.info, heal_rows(spec, plan.info)
    if info.context and length > info.context:
        raise OptionError(
            f"--heal-length: {length} tokens exceed the model's context of {info.context}.",
            f"Use {info.context} or fewer.",
        )
    seams.check_tokens(info.hidden, rows, rows * length, "heal-")
    flops = healing_flops(spec, plan)
    seconds = work.seconds(flops, spec.device, info.parameters)
    return {
        "heal": spec.heal,
        "heal_samples": rows,
        "heal_length": length,
        "heal_flops": flops,
        "heal_seconds": seconds,
    }


def heal_rows(spec: WidthSpec, info: CheckpointInfo) -> tuple[int, int]:
    """Return the rows to heal on and their length, as given or by default."""
    length = spec.heal_length or min(HEAL_LENGTH, info.context or HEAL_LENGTH)
    needed = -(-HEAL_TOKENS * info.hidden // length)
    return spec.heal_samples or max(HEAL_SAMPLES, needed), length


def healing_flops(spec: WidthSpec, plan: WidthPlan) -> float:
    """Return the operations of healing every block that can be cut, as if it kept its width."""
    return sum(_healing_flops(spec, plan))


def _healing_flops(spec: WidthSpec, plan: WidthPlan) -> tuple[float, float]:
    """Return the operations of running both models, and of the regressions, which are in float64.

    Both streams run once, that before each refit once more; after each refit the blocks above run
    on the held-out rows.
    """
    info, (rows, length) = plan.info, heal_rows(spec, plan.info)
    held = -(-rows // seams.HELD_OUT)
    cut = sorted({*plan.extent.attention, *plan.extent.mlp})
    compared = 2 * work.head_flops(info, held, length)
    total, fitted = 2 * compared, 0.0
    for block in range(info.blocks):
        total += work.block_flops(info, block, 2 * rows + 2 * held, length)
    for block in cut:
        inner = info.block_shapes[block]["intermediate"]
        total += work.block_flops(info, block, rows, length)
        fitted += regression_flops(inner, info.hidden, "refit", rows, length)
        total += sum(
            work.block_flops(info, above, held, length) for above in range(block + 1, info.blocks)
        )
        total += compared
    return total, fitted


def footprint(spec: WidthSpec, plan: WidthPlan, formats: Formats) -> Footprint:
    """Return what scoring the units, healing and writing take; ``formats`` are those for blocks."""
    info, method, moved = plan.info, plan.method, 0.0
    room = _capacity(spec, plan, formats, *_scored_on(spec, plan))
    flops, fitted = float(estimate(spec, plan)["flops"]), 0.0
    # forward and backward; statistics, and what the units that go leave as biases
    often = {"llm-pruner": 2.0, "flap": 2.0}.get(method.name, 1.0)
    if spec.heal != "none":
        more, fitted = _healing_flops(spec, plan)
        flops += more + fitted
        cut = {*plan.extent.attention, *plan.extent.mlp}
        narrower = {2 * block + 1 for block in cut}
        rows, length = heal_rows(spec, info)
        state = rows * length * info.hidden * dtypes.BYTES[dtypes.computable(formats.arithmetic)]
        above = sum(info.blocks - 1 - block for block in cut)
        # both streams, that before each refit once more, and the held-out rows
        through = 2 * info.blocks + len(cut) + (2 * info.blocks + above) / seams.HELD_OUT
        moved = 2 * through * state
        often += seams.reads(seams.seams_between((), narrower), info.blocks)
    written = round(info.stored_bytes * plan.parameters / info.parameters)
    return room.footprint(
        info, flops, often, float64=fitted, written=written, moved=moved, processes=spec.processes
    )


def estimate(spec: WidthSpec, plan: WidthPlan) -> dict[str, Any]:
    """Return the estimated operations and seconds of scoring the units."""
    method, info = plan.method, plan.info
    rows, tokens = spec.samples or method.samples, length_of(spec, plan)
    once = sum(work.block_flops(info, b, rows, tokens) for b in range(info.blocks))
    if not method.samples:
        flops = 0.0
    elif method.name == "llm-pruner":
        flops = work.taylor_flops(info, rows, tokens)
    else:
        flops = once * (2 if method.name == "wanda-sp" else 1)  # which runs every block twice
    seconds = work.seconds(flops, spec.device, info.parameters) if flops else None
    return {
        "samples": rows or None,
        "length": tokens or None,
        "flops": flops,
        "seconds": ranks.shared_seconds(seconds, spec.device, spec.processes),
        **(ranks.facts(spec.processes, rows) if rows else {}),
    }


def duration(spec: WidthSpec, plan: WidthPlan) -> tuple[float | None, str | None]:
    """Return the seconds of the whole run and where the rate is from; None if it is unknown.

    Loading, scoring the units and writing; sorting the units and cutting tensors are not counted.
    """
    info, scored = plan.info, estimate(spec, plan)
    if scored["flops"] and scored["seconds"] is None:
        return None, None
    written = info.memory_bytes.get(info.dtype, 0) * plan.parameters / info.parameters
    writing, origin = pace.writing(written)
    seconds = pace.START_S + (scored["seconds"] or 0.0) + writing
    if spec.heal != "none":
        healing = work.seconds(healing_flops(spec, plan), spec.device, info.parameters)
        if healing is None:
            return None, None
        seconds += healing
    if not scored["flops"] and spec.heal == "none":
        return seconds, origin
    return seconds, work.origin(spec.device, info.parameters)


UNIT_BYTES = 150
"""What a run holds of every channel until the variant is written: statistics and scores in
float64, and its number among those that are kept and in lists of those that are removed."""


def _capacity(
    spec: WidthSpec, plan: WidthPlan, formats: Formats, rows: int, tokens: int
) -> Capacity:
    """Return how scoring the units, and healing, runs within the memory."""
    info, method = plan.info, plan.method.name
    inner = max((shape["intermediate"] for shape in info.block_shapes), default=0)
    found = info.blocks * (inner + info.hidden) * UNIT_BYTES
    if method == "llm-pruner" and plan.ways.order in ("second", "mixed"):
        found += 8 * max(info.block_parameters, default=0)  # squared gradients, and the scores
    demand = {
        "llm-pruner": Demand(
            "gradients", info.blocks + 3, splits=False, gradients=True, extra=found
        ),
        "flap": Demand("statistics", 1, extra=found),
        # each block's input is kept
        "wanda-sp": Demand("statistics", 2, splits=False, extra=found),
        # squares, in float32
    }.get(method, Demand("weights", 0, gradients=True, extra=found))
    limit = limit_of(spec.device, spec.memory_limit, spec.processes)
    rows = ranks.most(rows, spec.processes)
    needs = [demand]
    if spec.heal != "none":
        few, length = heal_rows(spec, info)
        needs.append(of_narrower(info, few, length, spec.device, formats))
    return decide(info, formats, spec.device, limit, rows, tokens, needs)


def planned_capacity(spec: WidthSpec, plan: WidthPlan) -> Capacity:
    """Return how it would run if the text has all rows that are requested."""
    formats = dtypes.expected(spec.dtype, plan.info.dtype, spec.device, "blocks")
    return _capacity(spec, plan, formats, *_scored_on(spec, plan))


def _scored_on(spec: WidthSpec, plan: WidthPlan) -> tuple[int, int]:
    """Return the rows that units are scored on, and their length."""
    return spec.samples or plan.method.samples or 1, length_of(spec, plan) or 1


def memory_facts(spec: WidthSpec, plan: WidthPlan) -> dict[str, Any]:
    """Return what a dry run says of the memory; how often healing passes depends on its refits."""
    formats = dtypes.expected(spec.dtype, plan.info.dtype, spec.device, "blocks")
    room = planned_capacity(spec, plan)
    shown = room.facts() if spec.heal == "none" else room.needs()
    return shown | footprint(spec, plan, formats).facts()


def criterion_of(spec: WidthSpec) -> str:
    """Return a short description of the criterion that scores the units, and its ranking."""
    order = "the channels' sums (vector)" if spec.order == "vector" else f"{spec.order} order"
    ranked = "ranked over all blocks" if spec.ranking == "global" else "block-wise"
    structure = spec.structure.upper()
    return {
        "llm-pruner": f"Taylor, {order}, {ranked}",
        "flap": f"{spec.metric.upper()}, {STRUCTURES[spec.structure]} ({structure}), "
        "bias compensation",
        "wanda-sp": "weight times input norm, layer by layer",
        "magnitude": f"L2 norm of the unit{', ' + ranked if spec.ranking == 'global' else ''}",
        "random": f"random, seed {spec.seed}",
    }[spec.method]


STRUCTURES = {
    "al-am": "adaptive",
    "al-mm": "adaptive, the number of heads given",
    "ul-mm": "all blocks alike, the number of heads given",
    "ul-um": "all blocks and parts alike",
}
"""FLAP's structures in words."""


def shapes(plan: WidthPlan, counts: Any) -> list[dict[str, int]]:
    """Return heads, key/value heads and neurons of every block after the cut."""
    result = []
    for unit in plan.units:
        kept: Counts = counts.get(unit.block, unit.all.counts)
        result.append(
            {
                "block": unit.block,
                "heads": kept.groups * unit.queries,
                "kv_heads": kept.groups,
                "neurons": kept.neurons,
            }
        )
    return result


def _sized(
    base: Pruning, plan: WidthPlan, aim: Target | None, after: int, ratio: float
) -> WidthPruning:
    """Return the record with method and sizes; ``ratio`` is the method's own."""
    before = plan.info.parameters
    if aim:
        over = after - aim.parameters
        aim = replace(aim, difference=over, relative_difference=over / aim.parameters)
    common = {field.name: getattr(base, field.name) for field in fields(base)}
    return replace(
        _used(WidthPruning(**common), plan),
        method=plan.method.name,
        label=plan.method.label,
        method_ratio=ratio,
        parameters_before=before,
        parameters_after=after,
        ratio=1 - after / before,
        target=aim,
        layers=plan.blocks,
        attention_layers=plan.extent.attention,
        mlp_layers=plan.extent.mlp,
        variant=_variant(plan),
    )


def _used(record: WidthPruning, plan: WidthPlan) -> WidthPruning:
    """Return the record with those of the method's options that have an effect on it."""
    chosen, name = plan.ways, plan.method.name
    record = replace(record, round_to=chosen.round_to)
    if name == "llm-pruner":
        record = replace(record, order=chosen.order)
    if plan.method.ranks:
        record = replace(record, ranking=chosen.ranking)
    if name == "flap":
        record = replace(
            record,
            metric=chosen.metric,
            structure=chosen.structure,
            remove_heads=chosen.heads,
        )
    return record


def _variant(plan: WidthPlan) -> str:
    """Return what differs from the method's usual way, for names; empty if nothing does."""
    found = list(plan.ways.differing(plan.method))
    attention, mlp = plan.extent.attention, plan.extent.mlp
    if plan.extent.parts != "both":
        found.append("MLP only" if mlp else "attention only")
    elif attention != mlp:
        found.append(f"attention of {len(attention)} and MLP of {len(mlp)} blocks")
    return ", ".join(found)


def run(spec: WidthSpec, run: Run) -> None:
    """Score, choose, cut, and write the checkpoint into the run directory."""
    with contextlib.ExitStack() as stack:
        _make(spec, run, stack)


def _make(spec: WidthSpec, run: Run, stack: contextlib.ExitStack) -> None:
    """Make the checkpoint; ``stack`` closes what refitted weights are kept in."""
    from core.model import loading
    from core.width.write import write

    method = methods.get(spec.method)
    reads = bool(method.samples) or spec.heal != "none"
    checkpoint = locate.open(spec.checkpoint, run.progress, need_tokenizer=reads)
    plan, aim = make_plan(spec, checkpoint.info, run.progress)
    staging.check_space(run.book, checkpoint.info.disk_bytes)  # before scoring, not after it
    prepared = loading.prepare(spec, checkpoint, "blocks")
    chosen = _select(spec, run, plan, prepared, stack)
    selection = chosen.selection
    if not run.ranks.is_first:
        return
    base = _start(spec, checkpoint)
    counts = {block: keep.counts for block, keep in selection.keep.items()}
    after = plan.left(counts)
    record = replace(
        _sized(base, plan, aim, after, selection.ratio),
        bias_compensation=bool(selection.biases),
        rescued=tuple(selection.rescued),
        calibration=chosen.text,
        processes=spec.processes,
        healing=replace(chosen.healing, **prepared.facts()) if chosen.healing else None,
        **prepared.facts(),
        blocks=_dropped(plan, selection, shapes(plan, counts)),
    )
    write(checkpoint.folder, run.dir, plan, selection, record, run.progress, chosen.replaced)
    run.progress.log(_sentence(record, run.dir))


def _start(spec: WidthSpec, checkpoint: locate.Checkpoint) -> Pruning:
    """Return what pruning.json says of a cut that drops no block."""
    return depth.make_record(
        checkpoint.folder,
        checkpoint.info,
        Removal(),
        criterion=criterion_of(spec),
        name=checkpoint.name,
    )


@dataclass(frozen=True)
class _Chosen:
    """What is kept, and how it was healed."""

    selection: Selection
    text: Calibration | None
    """What the method was calibrated on."""
    healing: Healing | None
    replaced: Replaced


def _select(
    spec: WidthSpec, run: Run, plan: WidthPlan, prepared: Prepared, stack: contextlib.ExitStack
) -> _Chosen:
    """Load the model, let the method choose, heal if asked to, and free the model."""
    from core.importance.branches import make_batch
    from core.model import loading, memory
    from core.width.selection import Job

    rows: list[list[int]] = []
    text = None
    if plan.method.samples:
        length = length_of(spec, plan)
        source = text_of(spec.calibration, prepared.folder)
        tokenizer = loading.load_tokenizer(prepared.folder)
        few, wanted = spec.samples is None, spec.samples or plan.method.samples
        drawn = drawn_rows(spec, source, tokenizer, wanted, length, run.progress, or_fewer=few)
        rows = drawn.rows
        text = Calibration(
            **sources.describe(source),
            samples=len(rows),
            length=length,
            seed=spec.seed,
            text=drawn.facts,
        )
    longest = max(map(len, rows), default=1)
    room = _capacity(spec, plan, prepared.formats, max(1, len(rows)), longest)
    states = room.folder_of_states(run.dir)  # a full disk is said before scoring, not after it
    view = view_of(prepared, room, run.progress.log)
    batch = make_batch(rows, view, room.group, run.ranks) if rows else None
    job = Job(view, plan, batch, spec.seed, run.progress)
    with memory.out_of_memory_explained(f"scoring heads and neurons by {plan.method.label}"):
        selection = plan.method.load().select(job)
    healing: Healing | None = None
    replaced: Replaced = {}
    if spec.heal != "none" and run.ranks.is_first:  # all processes have chosen the same
        healing, replaced = _heal(spec, run, plan, prepared, view, selection, stack, states)
    view.close()
    return _Chosen(selection, text, healing, replaced)


def _heal(
    spec: WidthSpec,
    run: Run,
    plan: WidthPlan,
    prepared: Prepared,
    view: BlockView,
    selection: Selection,
    stack: contextlib.ExitStack,
    states: Path | None,
) -> tuple[Healing, Replaced]:
    """Refit the narrower blocks; return the record and the replaced tensors.

    ``states``: the folder on whose disk the hidden states are; None: in memory.
    """
    from core.importance.branches import make_batch
    from core.model import loading, memory
    from core.width.healing import Shelf, refit

    (samples, length), few = heal_rows(spec, plan.info), spec.heal_samples is None
    source = text_of(spec.calibration, prepared.folder)
    tokenizer = loading.load_tokenizer(prepared.folder)
    drawn = drawn_rows(spec, source, tokenizer, samples, length, run.progress, or_fewer=few)
    seams.check_tokens(plan.info.hidden, len(drawn.rows), len(drawn.rows) * length, "heal-")
    stored = loading.stored_formats(prepared.folder)
    batch, shelf = make_batch(drawn.rows, view), Shelf(run.dir)
    stack.callback(shelf.close)
    with memory.out_of_memory_explained("healing the cut"):
        healing, tensors = refit(
            view, plan.units, selection, batch, stored, run.progress, shelf, states
        )
    kept = sum(seam.kept for seam in healing.seams)
    run.progress.log(
        f"Healing by {spec.heal}: held-out KL to the dense model {healing.kl_before:.4f} to "
        f"{healing.kl_after:.4f} nats per token; {kept} of {len(healing.seams)} refits kept."
    )
    text = Calibration(
        **sources.describe(source),
        samples=len(drawn.rows),
        length=length,
        seed=spec.seed,
        text=drawn.facts,
    )
    return replace(healing, calibration=text), tensors


def _dropped(
    plan: WidthPlan, selection: Selection, kept: list[dict[str, int]]
) -> tuple[BlockCut, ...]:
    """Return what every block keeps, and the removed units by their numbers in the source."""
    result = []
    for unit, shape in zip(plan.units, kept, strict=True):
        keep = selection.keep.get(unit.block, unit.all)
        groups = sorted(set(range(unit.groups)) - set(keep.groups))
        heads = (g * unit.queries + q for g in groups for q in range(unit.queries))
        neurons = sorted(set(range(unit.neurons)) - set(keep.neurons))
        result.append(BlockCut(**shape, dropped_kv_heads=tuple(groups), dropped_heads=tuple(heads),
                               dropped_neurons=tuple(neurons)))  # fmt: skip
    return tuple(result)


def _sentence(record: WidthPruning, out: Path) -> str:
    aim = record.target
    near = ""
    if aim and aim.difference is not None and aim.relative_difference is not None:
        near = (
            f", {abs(aim.difference):,} ({abs(aim.relative_difference):.3%}) "
            f"{'more' if aim.difference > 0 else 'fewer'} than requested"
        )
    return (
        f"Wrote {record.parameters_after:,} of {record.parameters_before:,} parameters "
        f"(ratio {record.ratio:.4f}; {record.label}'s own ratio "
        f"{record.method_ratio:.6g}){near}, to {out}."
    )
