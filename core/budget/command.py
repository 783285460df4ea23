"""``python -m core budget CHECKPOINT --out DIR``: what every version of every block costs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.budget import demand
from core.budget import versions as blocks_as
from core.checkpoint import chat, locate
from core.checkpoint.headers import CheckpointInfo
from core.checkpoint.neurons import NeuronOrder
from core.checkpoint.vocabulary import text_of
from core.data import sources
from core.data.calibration import JOIN_HELP, JOINS, SOURCE_HELP
from core.errors import OptionError
from core.importance import passes as counting
from core.importance.capacity import Capacity, decide, limit_of, view_of
from core.importance.drawing import drawn_rows
from core.importance.estimate import block_flops, head_flops
from core.prune.budgets import Library
from core.prune.version_results import (
    MLP_SHARES,
    VERSIONS,
    WHOLE,
    Budget,
    PlanCheck,
    VersionRow,
    latency_errors,
)
from core.runs import devices, dtypes, pace
from core.runs.footprint import Footprint
from core.runs.spec import MemoryOptions, option
from core.search.ledger import Tape
from core.search.rehearsal import states_at_once
from core.width.units import units_of

if TYPE_CHECKING:
    from core.budget.measure import Measured
    from core.budget.timing import Timing
    from core.model.blocks import BlockView
    from core.model.loading import Prepared
    from core.runs.progress import Progress
    from core.runs.run import Run

CONTEXT = 512
TAPE = "measured.jsonl"
STEPS = 8
"""Tokens generated after the prompt in every timing."""


@dataclass(frozen=True, kw_only=True)
class BudgetSpec(MemoryOptions):
    """Measure what every version of every block costs, in quality and in time, for plan."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    out: str = option(help="Run directory to write.")
    versions: tuple[str, ...] = option(
        tuple(VERSIONS),
        help="What a block can become, separated by commas: "
        + ", ".join(VERSIONS)
        + ". Whole blocks are always measured.",
        choices=tuple(VERSIONS),
    )
    batch: int = option(1, help="Sequences that are timed together.", low=1, high=4096)
    context: int | None = option(
        None,
        help=f"Tokens of the prompt that is timed. Default: {CONTEXT}, or what the model's context "
        "leaves.",
        low=1,
        high=1048576,
        unit="tokens",
    )
    runs: int = option(5, help="Timings of every version; their median counts.", low=1, high=1000)
    check_plans: int = option(
        10,
        help="Plans for latency budgets at even distances that are solved, timed and measured "
        "whole at the end, to show how far predictions are off.",
        low=0,
        high=1000,
    )
    calibration: str = option("auto", help=f"Text that KL is measured on: {SOURCE_HELP}")
    samples: int = option(10, help="Calibration rows.", low=1, high=100000)
    length: int = option(128, help="Tokens per row.", low=2, high=1048576, unit="tokens")
    seed: int = option(1234, help="Seed for rows and crops.", low=0)
    join: str = option("auto", help=JOIN_HELP, choices=JOINS)
    chat_template: str = option("auto", help=chat.HELP, choices=chat.CHOICES)
    resume: bool = option(
        False, help="Continue the budget run in --out that was stopped or killed; times are new."
    )
    dry_run: bool = option(False, help="Estimate block passes and time without running anything.")


def check(spec: BudgetSpec) -> None:
    """Raise what is wrong with versions and lengths before waiting for the device."""
    info = locate.open(spec.checkpoint, need="config").info
    named, context = _checked(spec, info)
    if spec.memory_limit is not None:
        formats = dtypes.expected(spec.dtype, info.dtype, spec.device, "blocks")
        _room(spec, info, named, context, formats).check()


def _checked(spec: BudgetSpec, info: CheckpointInfo) -> tuple[tuple[str, ...], int]:
    """Return the versions, in their usual order, and the context."""
    named = tuple(name for name in VERSIONS if name in spec.versions)
    blocks_as.check(info, named)
    if info.context and spec.length > info.context:
        raise OptionError(
            f"--length: {spec.length} tokens exceed the model's context of {info.context}.",
            f"Use {info.context} or fewer.",
        )
    most = info.context - STEPS - 1 if info.context else CONTEXT
    if spec.context is not None and info.context and spec.context > most:
        raise OptionError(
            f"--context: {spec.context} tokens and {STEPS + 1} more exceed the model's context of "
            f"{info.context}.",
            f"Use {most} or fewer.",
        )
    return named, spec.context or max(1, min(CONTEXT, most))


def dry_run(spec: BudgetSpec) -> dict[str, Any]:
    """Return the estimated block passes and time; only headers are needed."""
    checkpoint = locate.open(spec.checkpoint, need="config")
    info = checkpoint.info
    named, context = _checked(spec, info)
    formats = dtypes.expected(spec.dtype, info.dtype, spec.device, "blocks")
    room = _room(spec, info, named, context, formats)
    free = devices.free_bytes(spec.device)[1]
    groups = _groups(spec, info, named, formats.weights, room, free)
    taken = footprint(spec, info, formats, free)
    like = spec.device, info.parameters
    rate = pace.flops_per_s("budget", *like) or pace.flops_per_s("importance", *like)
    sets = sum(map(len, groups))
    return {
        "blocks": info.blocks,
        "versions": list(named),
        "calibration": text_of(spec.calibration, checkpoint.folder),
        "samples": spec.samples,
        "length": spec.length,
        "batch": spec.batch,
        "context": context,
        "dtype": formats.weights,
        **room.needs(),
        **taken.facts(),
        "timed_layers": _layers(spec, info, named, context, room),
        "sets": sets,
        "passes": int(_passes(info, groups)),
        "plain_passes": sets * info.blocks,
        "timings": _timings(spec, info, named),
        "flops": taken.flops,
        "seconds": taken.flops / rate if rate else None,
        "kind": "estimated",
        "seconds_from": "the rate of the last run in this workspace" if rate else None,
    }


def footprint(
    spec: BudgetSpec, info: CheckpointInfo, formats: dtypes.Formats, free: int | None
) -> Footprint:
    """Return what a budget run takes: ranking neurons, KL, timings, and plans that are checked.

    ``formats`` are those for blocks, ``free`` the device's free bytes.
    """
    named, context = _checked(spec, info)
    room = _room(spec, info, named, context, formats)
    groups = _groups(spec, info, named, formats.weights, room, free)
    flops = _flops(info, spec, _passes(info, groups), sum(map(len, groups)))
    ranks_neurons = bool(set(named) & set(MLP_SHARES))
    whole = sum(block_flops(info, b, spec.samples, spec.length) for b in range(info.blocks))
    flops += ranks_neurons * whole
    flops += spec.check_plans * (whole + head_flops(info, spec.samples, spec.length))
    prompt = sum(block_flops(info, b, spec.batch, context) for b in range(info.blocks))
    timings = _timings(spec, info, named) + spec.check_plans * (spec.runs + 1)
    often = len(groups) + ranks_neurons + bool(spec.check_plans)
    return room.footprint(info, flops + timings * prompt, often)


def _groups(
    spec: BudgetSpec,
    info: CheckpointInfo,
    named: tuple[str, ...],
    dtype: str,
    room: Capacity,
    free: int | None,
) -> list[list[frozenset[Any]]]:
    """Return the versions in groups, each of which is measured in one pass over the weights."""
    sets = [blocks_as.lost(b, v) for b in range(info.blocks) for v in named]
    return counting.grouped(sets, _most(spec, info, dtype, room, free) - 1)


def _timings(spec: BudgetSpec, info: CheckpointInfo, named: tuple[str, ...]) -> int:
    """Return the number of prompts that are timed."""
    stacks = len(blocks_as.kinds(info)) * (1 + len({WHOLE, *named} - {"drop"}))
    return stacks * (spec.runs + 1)


def _passes(info: CheckpointInfo, groups: list[list[frozenset[Any]]]) -> float:
    """Return the block passes of measuring KL, shared prefixes once; a part is half a block."""
    narrow = frozenset(u for some in groups for one in some for u in one if u[1] in MLP_SHARES)
    parts = ("attention", "mlp", *MLP_SHARES)
    every = ((block, part) for block in range(info.blocks) for part in parts)
    units = [unit for unit in every if unit in narrow or unit[1] not in MLP_SHARES]
    first = [frozenset(), *groups[0]]  # the dense model's states are kept for later passes
    # a narrower MLP runs only in the sets that name it: the others skip it
    skips = [[one ^ narrow for one in some] for some in [first, *groups[1:]]]
    return sum(counting.shared(units, some)[0] for some in skips) / 2


def _flops(info: CheckpointInfo, spec: BudgetSpec, passes: float, sets: int) -> float:
    each = sum(block_flops(info, b, spec.samples, spec.length) for b in range(info.blocks))
    return passes * each / info.blocks + (sets + 1) * head_flops(info, spec.samples, spec.length)


def _most(
    spec: BudgetSpec, info: CheckpointInfo, dtype: str, room: Capacity, free: int | None
) -> int:
    most = states_at_once(info, spec.samples, spec.length, dtype, free)
    return room.states(most, spec.samples * spec.length * info.hidden, dtype)


def _timed(spec: BudgetSpec, info: CheckpointInfo) -> str:
    """Return the format that a benchmark holds the model in."""
    return dtypes.computable(dtypes.expected(spec.dtype, info.dtype, spec.device).weights)


def _room(
    spec: BudgetSpec,
    info: CheckpointInfo,
    named: tuple[str, ...],
    context: int,
    formats: dtypes.Formats,
) -> Capacity:
    """Return how measuring and timing run within the memory; rows are not split."""
    needs = demand.demands(info, named, formats, _timed(spec, info), spec.batch, context)
    limit = limit_of(spec.device, spec.memory_limit)
    return decide(info, formats, spec.device, limit, spec.samples, spec.length, needs)


def _layers(
    spec: BudgetSpec, info: CheckpointInfo, named: tuple[str, ...], context: int, room: Capacity
) -> int:
    """Return how many blocks are timed together."""
    timed = _timed(spec, info)
    return demand.layers(info, named, room, timed, spec.device, spec.batch, context)


def run(spec: BudgetSpec, run: Run) -> None:
    """Measure KL and time of every version, and write the result files."""
    import torch
    import transformers

    from core import __version__
    from core.budget import checks, measure
    from core.importance.branches import make_batch
    from core.model import loading, memory, precision

    checkpoint = locate.open(spec.checkpoint, run.progress)
    folder, info = checkpoint.folder, checkpoint.info
    named, context = _checked(spec, info)
    tokenizer = loading.load_tokenizer(folder)
    source = text_of(spec.calibration, folder)
    drawn = drawn_rows(spec, source, tokenizer, spec.samples, spec.length, run.progress)
    prepared = loading.prepare(spec, checkpoint, "blocks")
    dtype = precision.dtype_name(prepared.precision.arithmetic)
    room = _room(spec, info, named, context, prepared.formats)
    tape = Tape(
        run.path(TAPE),
        {
            "checkpoint": info.key,
            "calibration": sources.describe(source)["content"],
            "samples": spec.samples,
            "length": spec.length,
            "seed": spec.seed,
            "join": spec.join,
            "chat template": spec.chat_template,
            "versions": named,
            "device": str(prepared.device),
            "dtype": dtype,
        },
        _most(spec, info, dtype, room, devices.free_bytes(spec.device)[1]),
        resume=spec.resume,
    )
    run.note(TAPE)
    if tape.groups:
        measured = sum(map(len, tape.groups)) - 1  # the first group has the dense model
        run.progress.log(f"Resuming: KL of {measured:,} versions is measured already.")
    view = view_of(prepared, room, run.progress.log)
    batch = make_batch(drawn.rows, view)
    with memory.out_of_memory_explained("measuring versions of blocks"):
        order = None
        if set(named) & set(MLP_SHARES):
            units = dict(enumerate(units_of(info)))
            order = measure.rank_neurons(view, batch, units, run.progress)
        costs = measure.measure(view, batch, named, tape.most, run.progress, order, tape)
        run.progress.log(f"KL of {len(costs.of)} versions in {costs.seconds:.1f} s.")
        layers = _layers(spec, info, named, context, room)
        view, timed_dtype, timed = _time(
            spec, info, view, prepared, named, context, layers, tokenizer, run.progress
        )
    flops = _flops(info, spec, costs.passes, len(costs.of))
    rows = _rows(spec, info, named, context, timed_dtype, costs, timed)
    rest = info.parameters - sum(info.block_parameters)
    summary = Budget(
        checkpoint=spec.checkpoint,
        checkpoint_key=info.key,
        family=info.family,
        blocks=info.blocks,
        measured=named,
        dense_nll=costs.dense_nll,
        calibration=source,
        calibration_content=sources.describe(source)["content"],
        text=drawn.facts,
        samples=spec.samples,
        length=spec.length,
        seed=spec.seed,
        tokens=batch.predictions,
        passes=costs.passes,
        plain_passes=len(costs.of) * info.blocks,
        batch=spec.batch,
        context=context,
        steps=STEPS,
        runs=spec.runs,
        rest_prefill_s=timed.rest.prefill,
        rest_decode_s=timed.rest.decode,
        rest_params=rest,
        rest_weight_bytes=rest * dtypes.BYTES[timed_dtype],
        dense_prefill_s=timed.dense.prefill if timed.dense else None,
        dense_decode_s=timed.dense.decode if timed.dense else None,
        timed_layers=layers,
        seconds=round(costs.seconds, 4),
        noise=round(timed.noise, 4),
        timing_seconds=round(timed.seconds, 4),
        flops=flops,
        parameters=info.parameters,
        flops_per_s=flops / costs.seconds if costs.seconds > 0 else None,
        **prepared.facts(),
        compute_dtype=dtype,
        timed_dtype=timed_dtype,
        versions={
            "depthcut": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    )
    if order:
        NeuronOrder(
            checkpoint_key=info.key,
            method=measure.CRITERION,
            order={str(block): tuple(ranked) for block, ranked in order.items()},
        ).write(run)
    if spec.check_plans:
        table = {(row.block, row.version): row for row in rows}
        library = Library(str(run.dir), summary, table, {})
        with memory.out_of_memory_explained("checking plans"):
            checked = checks.check(
                library, spec.check_plans, view, batch, tape.most, order, tokenizer, run.progress,
                timed=None if room.streams else view,
            )  # fmt: skip
        PlanCheck.write(run, checked)
        if errors := latency_errors(checked):
            run.progress.log(
                f"Predicted latency of {len(errors)} plans: median error "
                f"{statistics.median(errors):.1%}, largest {max(errors):.1%}."
            )
    view.close()
    VersionRow.write(run, rows)
    summary.write(run)


def _time(
    spec: BudgetSpec,
    info: CheckpointInfo,
    view: BlockView,
    prepared: Prepared,
    named: tuple[str, ...],
    context: int,
    layers: int,
    tokenizer: Any,
    progress: Progress,
) -> tuple[BlockView, str, Timing]:
    """Return the model to measure plans on, the format that was timed in, and the times.

    A benchmark may hold the model in another format than that for measuring KL: a model in memory
    is converted. Of one that is read block by block, as many blocks as fit are loaded.
    """
    from core.budget import timing
    from core.model import memory, precision
    from core.model.blocks import BlockView
    from core.model.streaming import StreamedView, loaded_partly

    whole = precision.decide(spec.dtype, view.device, info.dtype)
    named_dtype = precision.dtype_name(whole.weights)
    groups = list(blocks_as.kinds(info).values())
    options = {
        "batch": spec.batch,
        "context": context,
        "runs": spec.runs,
        "steps": STEPS,
        "layers": layers,
        "tokenizer": tokenizer,
        "progress": progress,
    }
    if not isinstance(view, StreamedView):
        if whole.weights != view.dtype:
            view = BlockView(view.model.to(whole.weights))
        return view, named_dtype, timing.measure(view, groups, named, **options)
    view.rest()
    memory.free_memory(view.device)
    loaded = timing.some(groups, layers)
    progress.log(f"Timing {layers} blocks at a time: not all fit in memory.")
    part = loaded_partly(prepared.folder, loaded, whole.weights, view.device)
    timed = timing.partly(part, loaded, groups, named, **options)
    del part
    memory.free_memory(view.device)
    return view, named_dtype, timed


def _rows(
    spec: BudgetSpec,
    info: CheckpointInfo,
    named: tuple[str, ...],
    context: int,
    dtype: str,
    costs: Measured,
    timed: Timing,
) -> list[VersionRow]:
    """Return versions.csv: whole and then every version, block by block."""
    rows = []
    for block in range(info.blocks):
        for version in (WHOLE, *named):
            kl, nll = costs.of.get((block, version), (0.0, costs.dense_nll))
            params = 0 if version == "drop" else blocks_as.parameters(info, block, version)
            took = timed.of[block, version]
            rows.append(
                VersionRow(
                    block,
                    version,
                    kl,
                    nll,
                    took.prefill,
                    took.decode,
                    params,
                    params * dtypes.BYTES[dtype],
                    blocks_as.neurons_left(info.block_shapes[block]["intermediate"], version),
                    blocks_as.cache_bytes(info, block, version, spec.batch, context, dtype),
                )
            )
    return rows
