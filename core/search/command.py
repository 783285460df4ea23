"""``python -m core search CHECKPOINT --out DIR``: the best sets of blocks to remove."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core.checkpoint import chat, locate
from core.checkpoint.headers import CheckpointInfo
from core.checkpoint.vocabulary import text_of
from core.data import sources
from core.data.calibration import JOIN_HELP, JOINS, SOURCE_HELP
from core.errors import DataError, OptionError, PlanError
from core.heal import demand, seams
from core.importance.capacity import Capacity, Demand, decide, limit_of, view_of
from core.importance.drawing import drawn_rows
from core.importance.estimate import block_flops
from core.prune import plan
from core.runs import devices, dtypes, pace, ranks
from core.runs.footprint import Footprint
from core.runs.spec import MemoryOptions, ProcessOptions, option
from core.search import rehearsal
from core.search.finds import Finds
from core.search.ledger import NONE, Copied, Cost, Drop, Ledger, Tape, TimeUp
from core.search.methods import METHODS, Task
from core.search.results import HeldoutRow, PairRow, Search, SetRow
from core.search.rows import heldout
from core.search.units import BLOCK, KINDS, Units

if TYPE_CHECKING:
    from core.runs.run import Run
    from core.search.measure import Share

OBJECTIVES = ("kl", "nll")
HEALS = ("none", *seams.METHODS)
SAMPLES = 10
TAPE = "measured.jsonl"


@dataclass(frozen=True, kw_only=True)
class SearchSpec(MemoryOptions, ProcessOptions):
    """Search for the sets of blocks, or of their parts, whose removal costs least."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    out: str = option(help="Run directory to write.")
    counts: tuple[int, ...] = option(
        (),
        help="Numbers of blocks, or of --units, to remove, e.g. 1-8. Default: up to a quarter.",
        low=1,
    )
    methods: tuple[str, ...] = option(
        ("one-shot", "greedy", "pairs"),
        help="Methods to run, separated by commas. evolve starts from what the others find.",
        choices=tuple(METHODS),
    )
    units: str = option(
        BLOCK,
        help="What goes one at a time: block, or sublayer (the attention or the MLP of a block). "
        "--counts are numbers of these.",
        choices=KINDS,
    )
    objective: str = option(
        "kl",
        help="What to minimise: KL from the dense model, or negative log-likelihood of the text.",
        choices=OBJECTIVES,
    )
    heal: str = option(
        "none",
        help="Choose sets by what they cost after their seams were healed as by prune --heal: a "
        "quarter of the calibration rows measures, the others are fitted on. Parts: refit only.",
        choices=HEALS,
    )
    heal_best: int = option(
        6,
        help="With --heal: of the sets that a method compares, heal this many of the cheapest.",
        low=1,
        high=10000,
    )
    calibration: str = option("auto", help=f"Text to search on: {SOURCE_HELP}")
    samples: int | None = option(
        None,
        help=f"Calibration rows. Default: {SAMPLES}, or with --heal as many as healing needs.",
        low=1,
        high=100000,
    )
    length: int = option(128, help="Tokens per row.", low=2, high=1048576, unit="tokens")
    seed: int = option(1234, help="Seed for rows, crops and evolution.", low=0)
    join: str = option("auto", help=JOIN_HELP, choices=JOINS)
    chat_template: str = option("auto", help=chat.HELP, choices=chat.CHOICES)
    protect_first: int | None = option(
        None, help="First blocks to keep. Default: as for plan.", low=0
    )
    protect_last: int | None = option(
        None, help="Last blocks to keep. Default: as for plan.", low=0
    )
    time_limit_s: float | None = option(
        None,
        help="End the search after this much time of measuring, all attempts together, and keep "
        "the best sets found.",
        low=0,
        unit="seconds",
    )
    resume: bool = option(False, help="Continue the search in --out that was stopped or killed.")
    dry_run: bool = option(False, help="Estimate block passes and time without running anything.")


def check(spec: SearchSpec) -> None:
    """Raise what is wrong with counts, protection and length before waiting for the device."""
    info = locate.open(spec.checkpoint, need="config").info
    _task(spec, info)
    if spec.memory_limit is not None:
        formats = dtypes.expected(spec.dtype, info.dtype, spec.device, "blocks")
        _room(spec, info, formats).check()


def _task(spec: SearchSpec, info: CheckpointInfo) -> Task:
    """Return what to search.

    Raises `PlanError` if protection leaves nothing or a count is out of range, `OptionError` if
    rows are longer than the context, or no method is named.
    """
    if spec.processes > 1 and spec.heal != "none":
        raise OptionError(
            f"--processes {spec.processes}: one process heals sets, since it fits all rows at "
            "once.",
            "Leave out --processes or --heal.",
        )
    first, last = _protection(spec, info)
    units = Units.of_model(spec.units, info)
    free = units.free(first, last)
    most = min(len(free), units.total - len(units.missing) - 1)
    if most < 1:
        raise PlanError(
            f"Protecting the first {first} and last {last} of {info.blocks} blocks leaves none to "
            "remove.",
            "Lower --protect-first or --protect-last.",
        )
    counts = tuple(sorted(set(spec.counts))) or tuple(range(1, max(1, units.total // 4) + 1))
    counts = counts if spec.counts else tuple(c for c in counts if c <= most)
    if counts[0] < 1 or counts[-1] > most:
        wrong = counts[0] if counts[0] < 1 else counts[-1]
        raise PlanError(
            f"--counts: {wrong} is out of range.",
            f"With the first {first} and last {last} of {info.blocks} blocks protected, 1 to "
            f"{most} {units.noun}s can be removed.",
        )
    if not spec.methods:
        raise OptionError("--methods is empty.", f"Choose from: {', '.join(METHODS)}.")
    if info.context and spec.length > info.context:
        raise OptionError(
            f"--length: {spec.length} tokens exceed the model's context of {info.context}.",
            f"Use {info.context} or fewer.",
        )
    if spec.heal != "none":
        _check_healing(spec, info, first)
    return Task(free, counts, spec.seed)


def _check_healing(spec: SearchSpec, info: CheckpointInfo, first: int) -> None:
    if spec.units != BLOCK and spec.heal != "refit":
        raise OptionError(
            f"--heal {spec.heal} repairs the seams of whole blocks, not of parts.",
            "Use --heal refit, or leave --units sublayer out.",
        )
    if spec.heal != "scale" and not first:
        raise PlanError(
            f"--heal {spec.heal}: block 0 may be removed, but the repair changes the block before "
            "a cut, and block 0 has none.",
            "Use --protect-first 1 or more"
            + (", or --heal scale." if spec.units == BLOCK else ", or leave out --heal."),
        )
    rows = samples_of(spec, info)
    seams.check_tokens(info.hidden, rows, rows * spec.length)


def samples_of(spec: SearchSpec, info: CheckpointInfo) -> int:
    """Return the calibration rows: as given, or 10, or with healing as many as that needs."""
    if spec.samples is not None or spec.heal == "none":
        return spec.samples or SAMPLES
    needed = math.ceil(seams.TOKENS_PER_DIMENSION * info.hidden / spec.length)
    return max(SAMPLES, seams.HELD_OUT * math.ceil(needed / seams.HELD_OUT))


def _protection(spec: SearchSpec, info: CheckpointInfo) -> tuple[int, int]:
    first, last = plan.default_protection(info.blocks)
    return (
        first if spec.protect_first is None else spec.protect_first,
        last if spec.protect_last is None else spec.protect_last,
    )


def _methods(spec: SearchSpec) -> tuple[str, ...]:
    """Return the methods in the order in which they run."""
    return tuple(name for name in METHODS if name in spec.methods)


def dry_run(spec: SearchSpec) -> dict[str, Any]:
    """Return the estimated block passes, memory and time; only headers are needed."""
    checkpoint = locate.open(spec.checkpoint, need="config")
    info = checkpoint.info
    formats = dtypes.expected(spec.dtype, info.dtype, spec.device, "blocks")
    found = rehearsed(spec, info, formats, devices.free_bytes(spec.device)[1])
    samples, ledger = samples_of(spec, info), found.ledger
    like = spec.device, info.parameters
    rate = pace.flops_per_s("search", *like) or pace.flops_per_s("importance", *like)
    return {
        "blocks": info.blocks,
        "units": spec.units,
        "counts": list(found.task.counts),
        "methods": list(_methods(spec)),
        "objective": spec.objective,
        "calibration": text_of(spec.calibration, checkpoint.folder),
        "heal": spec.heal,
        "samples": samples,
        "length": spec.length,
        "dtype": formats.weights,
        "sets_at_once": ledger.most,
        **found.room.needs(),
        **found.footprint.facts(),
        "sets": len(ledger.costs),
        "sets_healed": len(ledger.healed),
        "passes": found.passes,
        "total_passes": ledger.passes,
        "plain_passes": ledger.plain_passes,
        "flops": found.footprint.flops,
        "seconds": ranks.shared_seconds(
            found.footprint.flops / rate if rate else None, spec.device, spec.processes
        ),
        **ranks.facts(spec.processes, samples),
        "kind": "estimated",
        "seconds_from": "the rate of the last run in this workspace" if rate else None,
    }


@dataclass(frozen=True)
class Rehearsed:
    """A search that was not run, and what it would take."""

    task: Task
    room: Capacity
    ledger: Ledger
    passes: dict[str, int]
    """Block passes of each method."""
    footprint: Footprint


def rehearsed(
    spec: SearchSpec, info: CheckpointInfo, formats: dtypes.Formats, free: int | None
) -> Rehearsed:
    """Return what a search would take.

    ``formats`` are those for blocks, ``free`` the device's free bytes. Raises what `check` raises.
    """
    task, room = _task(spec, info), _room(spec, info, formats)
    most = _most(spec, info, formats.weights, room, free)
    units, samples = Units.of_model(spec.units, info), samples_of(spec, info)
    kept = _keeps(spec, info, room, free)
    ledger, passes, found = _rehearsal(task, _methods(spec), units, most, *_healing(spec), kept)
    about = units, spec.heal, samples, spec.length
    last = rehearsal.heldout(info, ledger, found, *about, room.groups)
    healed = rehearsal.refits(info, ledger.healed, *about)
    flops = rehearsal.flops(info, ledger, screened(spec, samples), spec.length, samples)
    if kept:
        flops += sum(block_flops(info, b, samples, spec.length) for b in range(info.blocks))
    width = dtypes.BYTES[dtypes.computable(formats.arithmetic)]
    again = sum(ledger.healed[drop].passes for drop in found if drop in ledger.healed)
    through = (again + sum(one.passes for one in ledger.healed.values())) / units.each
    taken = replace(room, groups=1).footprint(  # only the held-out rows are in groups
        info,
        flops + healed.flops + last.flops,
        ledger.groups + healed.reads + kept + last.reads,
        float64=healed.float64_flops + last.float64_flops,
        moved=2 * through * samples * spec.length * info.hidden * width,
        processes=spec.processes,
    )
    if not taken.can_run:
        return Rehearsed(task, room, ledger, passes, taken)
    state = -(-screened(spec, samples) // spec.processes) * spec.length * info.hidden
    states = (min(most, len(ledger.costs)) - STATES) * state
    taken = replace(taken, memory_bytes=taken.memory_bytes + max(0, states) * width)
    return Rehearsed(task, room, ledger, passes, taken)


@functools.lru_cache(maxsize=16)
def _rehearsal(
    task: Task,
    methods: tuple[str, ...],
    units: Units,
    most: int,
    heal: str,
    heal_best: int,
    kept: bool,
) -> tuple[Ledger, dict[str, int], list[Drop]]:
    """Return what `core.search.rehearsal.rehearse` does; the same objects for the same search."""
    return rehearsal.rehearse(task, methods, units, most, heal, heal_best, kept=kept)


STATES = 4
"""The fewest states to measure sets with: the dense one twice, and those of two sets."""


def _room(spec: SearchSpec, info: CheckpointInfo, formats: dtypes.Formats) -> Capacity:
    """Return how the search runs within the memory. Sets are split into groups, rows are not."""
    limit = limit_of(spec.device, spec.memory_limit, spec.processes)
    samples = samples_of(spec, info)
    rows = ranks.most(screened(spec, samples), spec.processes)
    demands = [Demand("sets", STATES, splits=False, rows=rows)]
    if spec.heal != "none":
        demands += _healing_demands(spec, info, formats)
    return decide(info, formats, spec.device, limit, samples, spec.length, demands)


def _healing_demands(
    spec: SearchSpec, info: CheckpointInfo, formats: dtypes.Formats
) -> list[Demand]:
    """Return what healing one of the sets holds, and measuring it on as many other rows.

    At most every removed unit leaves a seam. If the states of all rows do not fit, the other rows
    go through the model in groups, and the dense states of theirs are on the disk too.
    """
    repairs = max(spec.counts, default=info.blocks // 4)
    rows = samples_of(spec, info)
    need = demand.demand(info, (spec.heal,), repairs, rows, spec.length, spec.device, formats)
    others = demand.TOKEN_BYTES * rows * spec.length
    need = replace(need, extra=need.extra + others, disk_states=(need.disk_states or 0) + 1)
    return [need, Demand("other rows", 3, extra=2 * others)]


def _most(
    spec: SearchSpec, info: CheckpointInfo, dtype: str, room: Capacity, free: int | None
) -> int:
    """Return the number of sets whose states are held at once; ``free``: bytes of the device."""
    if free is not None and devices.meant(spec.device) == "cpu":
        free //= spec.processes
    rows = ranks.most(screened(spec, samples_of(spec, info)), spec.processes)
    most = rehearsal.states_at_once(info, rows, spec.length, dtype, free)
    kept = _kept_bytes(spec, info) if _keeps(spec, info, room, free) else 0
    return room.states(most, rows * spec.length * info.hidden, dtype, kept)


def _kept_bytes(spec: SearchSpec, info: CheckpointInfo) -> int:
    """Return the bytes of the dense streams of all rows before every block."""
    stream = samples_of(spec, info) * spec.length * info.hidden * dtypes.BYTES["float32"]
    return (info.blocks + 1) * stream


def _keeps(spec: SearchSpec, info: CheckpointInfo, room: Capacity, free: int | None) -> bool:
    """Whether sets are healed, and a quarter of the free memory holds the dense streams.

    With a limit they also have to fit in what is left of it.
    """
    if spec.heal == "none" or room.disk_bytes:
        return False
    kept = _kept_bytes(spec, info)
    if room.limit_bytes is not None and room.used_bytes + kept > room.limit_bytes:
        return False
    return free is None or kept <= free // rehearsal.SHARE_OF_FREE


def screened(spec: SearchSpec, samples: int) -> int:
    """Return the number of rows on which sets are compared as they are.

    With healing, that only decides which sets are healed: `SAMPLES` rows of the held-out quarter.
    """
    if spec.heal == "none":
        return samples
    return min(SAMPLES, samples // seams.HELD_OUT)


def _healing(spec: SearchSpec) -> tuple[str, int]:
    return spec.heal, spec.heal_best


def run(spec: SearchSpec, run: Run) -> None:
    """Search, measure what was found on held-out rows, and write the result files."""
    import torch
    import transformers

    from core import __version__
    from core.importance.branches import make_batch
    from core.importance.streams import Files
    from core.model import loading, memory, precision
    from core.search.measure import Healer, Meter, Share

    checkpoint = locate.open(spec.checkpoint, run.progress)
    folder, info = checkpoint.folder, checkpoint.info
    task, methods = _task(spec, info), _methods(spec)
    units = Units.of_model(spec.units, info)
    tokenizer = loading.load_tokenizer(folder)
    source = text_of(spec.calibration, folder)
    template = chat.for_text(spec.chat_template, tokenizer)
    samples, heals = samples_of(spec, info), spec.heal != "none"
    drawn = drawn_rows(spec, source, tokenizer, samples, spec.length, run.progress)
    other_rows, other_words = heldout(source, tokenizer, drawn, spec.length, spec.seed, template)
    if not other_rows:
        run.progress.log("There are no held-out rows: the text has no more of this length.")
    prepared = loading.prepare(spec, checkpoint, "blocks")
    dtype = precision.dtype_name(prepared.precision.arithmetic)
    room, free = _room(spec, info, prepared.formats), devices.free_bytes(spec.device)[1]
    tape = _tape(
        run,
        {
            "checkpoint": info.key,
            "calibration": sources.describe(source)["content"],
            "samples": samples,
            "length": spec.length,
            "seed": spec.seed,
            **({"heal": spec.heal, "screened": screened(spec, samples)} if heals else {}),
            **({"units": spec.units} if spec.units != BLOCK else {}),
            **({"join": spec.join} if spec.join != "auto" else {}),
            **({"chat template": spec.chat_template} if spec.chat_template != "auto" else {}),
            "objective": spec.objective,
            "device": str(prepared.device),
            "dtype": dtype,
        },
        _most(spec, info, dtype, room, free),
    )
    run.note(TAPE)
    if tape.groups:
        run.progress.log(f"Resuming: {sum(map(len, tape.groups)):,} sets are measured already.")
    states = room.folder_of_states(run.dir)
    view = view_of(prepared, room, run.progress.log)
    batch = make_batch(drawn.rows, view)
    expected = rehearsal.rehearse(task, methods, units, tape.most, *_healing(spec))[0].passes
    progress = Share(run.progress, lambda: ledger.passes, expected)
    stored = loading.stored_formats(folder)
    healer = (
        Healer(
            view, batch, spec.heal, stored, progress, units, _keeps(spec, info, room, free), states
        )
        if heals
        else None
    )
    held_out = seams.is_held_out(torch.arange(len(drawn.rows)))
    some = [r for r, held in zip(drawn.rows, held_out.tolist(), strict=True) if held or not heals]
    screen = make_batch(some[: screened(spec, len(drawn.rows))], view, ranks=run.ranks)
    ledger = Ledger(
        Meter(view, screen, progress, units),
        spec.objective,
        units.total,
        tape.most,
        spec.time_limit_s,
        tape,
        heal=healer,
        heal_best=spec.heal_best,
    )
    with (
        memory.out_of_memory_explained("searching sets of blocks"),
        contextlib.ExitStack() as stack,
    ):
        finds = Finds(ledger, info, run.progress, spec.heal, units)
        stopped = _search(task, methods, ledger, finds, progress)
        rows = finds.rows
        others: dict[Drop, Cost] = {}
        if other_rows:
            progress.label = "Held-out rows"
            shared = run.ranks if len(other_rows) >= run.ranks.size else ranks.ALONE
            others_batch = make_batch(other_rows, view, room.group, shared)
            files = stack.enter_context(contextlib.closing(Files(run.dir, view.device)))
            held = Meter(view, others_batch, progress, units, files)
            sets = list(dict.fromkeys(finds.sets.values()))
            if healer:
                others = healer.measured(sets, held)
            else:
                book = Ledger(held, spec.objective, units.total, tape.most)
                book.values(sets)
                others = book.costs
            HeldoutRow.write(run, _by_row(held.rows, spec.heal, units))
    view.close()
    if stopped:
        run.progress.log(stopped)
    SetRow.write(run, [_with_heldout(row, others.get(finds.set_of(row))) for row in rows])
    if "pairs" in methods:
        PairRow.write(run, _pairs(task.free, ledger, units))
    flops = rehearsal.flops(info, ledger, screen.rows, spec.length, len(drawn.rows))
    rows_of = len(drawn.rows)
    flops += rehearsal.refits(info, ledger.healed, units, spec.heal, rows_of, spec.length).flops
    lengths = batch.lengths.cpu()
    dense = others.get(NONE)
    first, last = _protection(spec, info)
    Search(
        checkpoint=spec.checkpoint,
        checkpoint_key=info.key,
        family=info.family,
        blocks=info.blocks,
        objective=spec.objective,
        methods=methods,
        counts=task.counts,
        units=spec.units,
        protect_first=first,
        protect_last=last,
        heal=spec.heal,
        heal_best=spec.heal_best if heals else None,
        sets_healed=len(ledger.healed),
        fitted_tokens=int(lengths[~held_out].sum()) if heals else 0,
        dense_nll=healer.dense_nll if healer else ledger.costs[NONE].nll,
        dense_heldout_nll=dense.nll if dense else None,
        calibration=source,
        calibration_content=sources.describe(source)["content"],
        text=drawn.facts,
        samples=samples,
        length=spec.length,
        seed=spec.seed,
        tokens=int((lengths[held_out] - 1).sum()) if heals else batch.predictions,
        heldout=other_words,
        heldout_tokens=sum(len(row) - 1 for row in other_rows),
        passes=ledger.passes,
        plain_passes=ledger.plain_passes,
        sets_measured=len(ledger.costs) - 1,
        seconds=round(ledger.seconds, 4),
        stopped=stopped,
        flops=flops,
        parameters=info.parameters,
        flops_per_s=flops / ledger.seconds if ledger.seconds > 0 and spec.processes == 1 else None,
        processes=spec.processes,
        **prepared.facts(),
        compute_dtype=dtype,
        versions={
            "depthcut": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    ).write(run)


def _tape(run: Run, settings: dict[str, Any], most: int) -> Tape:
    """Return what the run has measured before; other processes copy what the first has read."""
    if run.ranks.is_first:
        tape = Tape(run.path(TAPE), settings, most, resume=bool(getattr(run.spec, "resume", False)))
        run.ranks.first((tape.groups, tape.most))
        return tape
    return Copied(*run.ranks.first(({}, 0)))


def _search(task: Task, methods: Sequence[str], ledger: Ledger, finds: Finds, share: Share) -> str:
    """Run the methods; return why the search stopped early, empty if it did not."""
    for name in methods:
        share.label = name
        finds.begin(name)
        try:
            METHODS[name](task, ledger, finds.report)
        except TimeUp:
            if not finds.rows:
                raise DataError(
                    f"The time limit of {ledger.limit_s:g} s ended the search before it found "
                    "any set.",
                    "Raise --time-limit-s, and add --resume to keep what was measured.",
                ) from None
            return f"The time limit of {ledger.limit_s:g} s ended {name}."
    return ""


def _with_heldout(row: SetRow, cost: Cost | None) -> SetRow:
    return replace(row, heldout_nll=cost.nll, heldout_kl=cost.kl) if cost else row


def _by_row(
    found: dict[Drop, list[tuple[int, float, float]]], heal: str, units: Units
) -> list[HeldoutRow]:
    """Return rows of heldout_rows.csv."""
    return [
        HeldoutRow(heal, units.written(sorted(drop)), row, *values)
        for drop, rows in found.items()
        for row, values in enumerate(rows)
    ]


def _pairs(free: Sequence[int], ledger: Ledger, units: Units) -> list[PairRow]:
    """Return every pair that was measured; the interaction needs both blocks alone too."""
    rows: list[PairRow] = []
    for a in free:
        for b in (b for b in free if b > a):
            both = ledger.costs.get(frozenset({a, b}))
            if both is None:
                continue
            alone = [ledger.costs.get(frozenset({block})) for block in (a, b)]
            single = [c.by(ledger.objective) for c in alone if c]
            beyond = both.by(ledger.objective) - sum(single) + ledger.dense
            first, second = ((u, "") if units.kind == BLOCK else units.of(u) for u in (a, b))
            rows.append(
                PairRow(
                    first[0],
                    second[0],
                    both.nll,
                    both.kl,
                    beyond if len(single) == 2 else None,
                    first[1],
                    second[1],
                )
            )
    return rows
