"""``python -m core prune CHECKPOINT --drop 3,5 --out DIR``: write a checkpoint without blocks.

With ``--heal`` the run takes the device, loads the model and repairs the seams before it writes;
without, it copies bytes: torch is not imported, and the run waits for nobody.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core import outside
from core.checkpoint import chat, locate
from core.checkpoint import neurons as neuron_order
from core.checkpoint.drop import Removal, check_removal
from core.checkpoint.headers import CheckpointInfo
from core.checkpoint.vocabulary import text_of
from core.data import sources
from core.data.calibration import JOIN_HELP, JOINS, SOURCE_HELP
from core.errors import OptionError, PlanError
from core.heal import demand, seams
from core.importance import estimate as work
from core.importance.capacity import Capacity, decide, limit_of, view_of
from core.importance.drawing import drawn_rows
from core.prune import depth, staging, toggle
from core.prune.plan import parameters_after
from core.prune.results import Calibration, Healing, PlanFile
from core.prune.scores import canonical
from core.runs import dtypes, pace
from core.runs.dtypes import DTYPE_BYTES
from core.runs.footprint import FILES, Footprint
from core.runs.progress import StderrProgress
from core.runs.results import from_dict
from core.runs.spec import MemoryOptions, option

if TYPE_CHECKING:
    from core.runs.run import Run

_Duration = tuple[float | None, str | None]

SAMPLES, LENGTH = 128, 512


@dataclass(frozen=True, kw_only=True)
class PruneSpec(MemoryOptions):
    """Write a checkpoint without some of its blocks or their parts, and heal it if asked to."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    drop: tuple[int, ...] = option((), help="Blocks to drop, e.g. 3,5 or 4-8.")
    attention: tuple[int, ...] = option(
        (), help="Blocks that lose their attention, and with it their key/value cache, e.g. 3,5."
    )
    mlp: tuple[int, ...] = option((), help="Blocks that lose their MLP, e.g. 7.")
    mlp_width: tuple[str, ...] = option(
        (), help="Blocks whose MLP keeps some of its neurons, as block:neurons, e.g. 3:768,7:384."
    )
    neurons: str | None = option(
        None, help="Budget run that ranked the neurons, for --mlp-width. A plan names its own."
    )
    plan: str | None = option(None, help="A plan's JSON file, as printed by plan.")
    criterion: str | None = option(
        None, help="Criterion behind --drop, for the record; a plan contains its own."
    )
    heal: str = option(
        "none",
        choices=seams.CHOICES,
        help="Closed-form repair of the seams: refit (the projection before each seam, also of "
        "parts of blocks and of narrower MLPs), linear "
        "(ReplaceMe), scale (Prune&Comp), or auto, the best of them. Only what lowers the "
        "held-out KL to the dense model is kept. The options on text, device and precision are "
        "for healing.",
    )
    calibration: str = option("auto", help=f"Text to heal on: {SOURCE_HELP}")
    samples: int | None = option(
        None,
        low=seams.HELD_OUT,
        high=100000,
        help=f"Rows to heal on, a quarter of them held out. Default: {SAMPLES}, or as many as the "
        "text has.",
    )
    length: int | None = option(
        None,
        low=2,
        unit="tokens",
        help=f"Tokens per row. Default: {LENGTH}, or the model's context if that is shorter.",
    )
    seed: int = option(1234, low=0, help="Seed for rows and crops.")
    join: str = option("auto", help=JOIN_HELP, choices=JOINS)
    chat_template: str = option("auto", help=chat.HELP, choices=chat.CHOICES)
    out: str = option(help="Folder for the smaller checkpoint.")
    dry_run: bool = option(False, help="Show what would be written without writing it.")


def run(spec: PruneSpec, run: Run) -> None:
    """Write the variant into the run directory, which the runner has already checked."""
    heals = spec.heal != "none"
    checkpoint = locate.open(spec.checkpoint, run.progress, need_tokenizer=heals)
    removal, plan = selection(spec, checkpoint.info)
    if heals:  # a full disk is said before healing, not after it
        left = parameters_after(checkpoint.info, removal) / checkpoint.info.parameters
        staging.check_space(run.book, round(checkpoint.info.disk_bytes * left))
    with contextlib.ExitStack() as stack:
        found = _heal(spec, run, checkpoint, removal, stack) if heals else (None, {})
        healing, replaced = found
        record = depth.prune(
            checkpoint.folder,
            removal,
            run.dir,
            criterion=chosen_by(spec, plan),
            plan=plan or None,
            name=checkpoint.name,
            overwrite=True,
            progress=run.progress,
            healing=healing,
            replaced=replaced,
        )
    run.progress.log(
        f"Wrote {record.blocks_after} of {record.blocks_before} blocks, "
        f"{record.parameters_after:,} of {record.parameters_before:,} parameters "
        f"(ratio {record.ratio:.4f}), without {record.removal.text}, to {run.dir}."
    )


def check(spec: PruneSpec) -> None:
    """Raise an error for what cannot be healed, before the run waits for the device."""
    if spec.heal != "none":
        checkpoint = locate.open(spec.checkpoint, StderrProgress(), need="config")
        removal, _ = selection(spec, checkpoint.info)
        check_healing(spec, checkpoint.info, removal)
        if spec.memory_limit is not None:
            planned_capacity(spec, checkpoint.info, removal).check()


def planned_capacity(spec: PruneSpec, info: CheckpointInfo, removal: Removal) -> Capacity:
    """Return how healing runs within the memory if the text has all rows that are requested."""
    formats = dtypes.expected(spec.dtype, info.dtype, spec.device, "blocks")
    return _capacity(spec, info, removal, formats, spec.samples or SAMPLES)


def _capacity(
    spec: PruneSpec, info: CheckpointInfo, removal: Removal, formats: dtypes.Formats, rows: int
) -> Capacity:
    tokens = length_of(spec, info)
    need = demand.of_cut(info, spec.heal, removal, rows, tokens, spec.device, formats)
    limit = limit_of(spec.device, spec.memory_limit)
    return decide(info, formats, spec.device, limit, rows, tokens, [need])


def check_healing(
    spec: PruneSpec, info: CheckpointInfo, removal: Removal
) -> tuple[seams.Seam, ...]:
    """Return the seams; raises an error if they cannot be healed with this many tokens."""
    missing = seams.missing_parts(info.block_shapes)
    found = seams.check_seams(spec.heal, removal, missing)
    if spec.length is not None and info.context and spec.length > info.context:
        raise OptionError(
            f"--length: {spec.length} tokens exceed the model's context of {info.context}.",
            f"Use {info.context} or fewer.",
        )
    rows = spec.samples or SAMPLES
    seams.check_tokens(info.hidden, rows, rows * length_of(spec, info))
    return found


def length_of(spec: PruneSpec, info: CheckpointInfo) -> int:
    """Return the tokens per row: as given, or the default within the model's context."""
    return spec.length or min(LENGTH, info.context or LENGTH)


def duration(spec: PruneSpec, info: CheckpointInfo, removal: Removal) -> _Duration:
    """Return the estimated seconds of the whole run and where the rate is from; None if unknown.

    Without healing, bytes are copied. With it, the model is loaded and run, see `healing_flops`.
    """
    left = parameters_after(info, removal) / info.parameters
    copying, origin = pace.writing(info.memory_bytes.get(info.dtype, 0) * left)
    if spec.heal == "none":
        return pace.CUT_START_S + copying, origin
    computing = work.seconds(healing_flops(spec, info, removal), spec.device, info.parameters)
    if computing is None:
        return None, None
    return pace.START_S + computing + copying, work.origin(spec.device, info.parameters)


def healing_flops(spec: PruneSpec, info: CheckpointInfo, removal: Removal) -> float:
    """Return the operations of healing: what `core.heal.healing` runs, and its regressions."""
    return sum(_healing_flops(spec, info, removal))


def _healing_flops(spec: PruneSpec, info: CheckpointInfo, removal: Removal) -> tuple[float, float]:
    """Return the operations of running both models, and of the regressions, which are in float64.

    Each method runs the dense and the pruned model below the last seam on all rows and, after each
    repair, what is left above it on the held-out rows. Attention and MLP count as half of a block.
    """
    rows, tokens = spec.samples or SAMPLES, length_of(spec, info)
    held = -(-rows // seams.HELD_OUT)
    missing = seams.missing_parts(info.block_shapes)
    gone, found = seams.parts_of(removal), seams.check_seams(spec.heal, removal, missing)
    every = range(2 * info.blocks)

    def run(parts: Iterable[int], rows: int) -> float:
        return sum(work.block_flops(info, part // 2, rows, tokens) for part in parts) / 2

    def kept(low: int, high: int = 2 * info.blocks) -> list[int]:
        return [part for part in every[low:high] if part not in gone]

    compared = 2 * work.head_flops(info, held, tokens)
    total, fitted = run(every, held) + run(kept(found[0].low), held) + 2 * compared, 0.0
    for method in seams.methods_for(spec.heal, removal):
        total += run(every[: found[-1].high], rows) + run(kept(0, found[-1].high), rows)
        for seam in found:
            total += run(kept(seam.high), held) + compared
            if method == "scale":
                continue
            block, part = divmod(seam.low - 1, 2)
            shape = info.block_shapes[block]
            inner = removal.neurons.get(block, shape["intermediate"])
            inner = inner if part else shape["heads"] * info.head_dim
            total += run([seam.low - 1], 2 * rows)
            fitted += demand.regression_flops(inner, info.hidden, method, rows, tokens)
    return total, fitted


def footprint(
    spec: PruneSpec, info: CheckpointInfo, removal: Removal, formats: dtypes.Formats
) -> Footprint:
    """Return what a cut takes, healed or not; ``formats`` are those for blocks."""
    left = round(info.stored_bytes * parameters_after(info, removal) / info.parameters)
    if spec.heal == "none":
        return Footprint(
            memory_bytes=depth.COPYING_BYTES, way=FILES, read_bytes=left, written_bytes=left
        )
    room = _capacity(spec, info, removal, formats, spec.samples or SAMPLES)
    flops, fitted = _healing_flops(spec, info, removal)
    methods = len(seams.methods_for(spec.heal, removal))
    often = methods * seams.reads(seams.seams_of(removal), info.blocks)
    rows, tokens = spec.samples or SAMPLES, length_of(spec, info)
    state = rows * tokens * info.hidden * dtypes.BYTES[dtypes.computable(formats.arithmetic)]
    moved = 2 * seams.passes(spec.heal, removal, info.blocks) * state
    return room.footprint(info, flops + fitted, often, float64=fitted, written=left, moved=moved)


def _heal(
    spec: PruneSpec,
    run: Run,
    checkpoint: locate.Checkpoint,
    removal: Removal,
    stack: contextlib.ExitStack,
) -> tuple[Healing, depth.Replaced]:
    """Load the model, heal the cut, and return the record and the replaced tensors' bytes.

    These are made of the model when they are written; ``stack`` closes it.
    """
    from core.heal.healing import heal
    from core.importance.branches import make_batch
    from core.model import loading, memory
    from core.model.streaming import stored_bytes

    folder, length = checkpoint.folder, length_of(spec, checkpoint.info)
    source = text_of(spec.calibration, folder)
    tokenizer = loading.load_tokenizer(folder)
    few = spec.samples is None
    drawn = drawn_rows(
        spec, source, tokenizer, spec.samples or SAMPLES, length, run.progress, or_fewer=few
    )
    seams.check_tokens(checkpoint.info.hidden, len(drawn.rows), len(drawn.rows) * length)
    prepared = loading.prepare(spec, checkpoint, "blocks")
    stored = loading.stored_formats(folder)
    room = _capacity(spec, checkpoint.info, removal, prepared.formats, len(drawn.rows))
    states = room.folder_of_states(run.dir)
    view = view_of(prepared, room, run.progress.log)
    stack.callback(view.close)
    with memory.out_of_memory_explained("healing the cut"):
        batch = make_batch(drawn.rows, view)
        found = heal(view, removal, batch, spec.heal, run.progress, stored=stored, folder=states)
    run.progress.log(
        f"Healing by {spec.heal}: held-out KL to the dense model {found.kl_before:.4f} to "
        f"{found.kl_after:.4f} nats per token; "
        + (f"kept {found.method}." if found.method != "none" else "no repair was kept.")
    )
    healing = replace(
        found.record(spec.heal),
        calibration=Calibration(
            **sources.describe(source),
            samples=len(drawn.rows),
            length=length,
            seed=spec.seed,
            text=drawn.facts,
        ),
        **prepared.facts(),
    )

    def data(name: str) -> bytes:
        return bytes(stored_bytes(found.tensors[name](view.tensor(name))))

    return healing, {name: functools.partial(data, name) for name in found.tensors}


def dry_run(spec: PruneSpec) -> dict[str, Any]:
    """Return the content that pruning.json would have; config.json alone is enough."""
    checkpoint = locate.open(
        spec.checkpoint, StderrProgress(), need="headers", need_tokenizer=False
    )
    removal, plan = selection(spec, checkpoint.info)
    record = depth.make_record(
        checkpoint.folder,
        checkpoint.info,
        removal,
        criterion=chosen_by(spec, plan),
        plan=plan or None,
        name=checkpoint.name,
    )
    left = record.parameters_after or 0
    widths = DTYPE_BYTES
    formats = dtypes.expected(spec.dtype, checkpoint.info.dtype, spec.device, "blocks")
    seconds, origin = duration(spec, checkpoint.info, removal)
    return record.to_dict() | {
        "dry_run": True,
        **_planned_healing(spec, checkpoint.info, removal),
        "out": spec.out,
        "memory_bytes": {dtype: left * width for dtype, width in widths.items()},
        **footprint(spec, checkpoint.info, removal, formats).facts(),
        "seconds": seconds,
        "seconds_from": origin,
    }


def _planned_healing(spec: PruneSpec, info: CheckpointInfo, removal: Removal) -> dict[str, Any]:
    """Return what healing would do; raises an error if it cannot."""
    if spec.heal == "none":
        return {}
    found = check_healing(spec, info, removal)
    return {
        "heal": spec.heal,
        "seams": [[seam.first, seam.end - 1] for seam in found],
        "removed": [seam.removed for seam in found],
        "samples": spec.samples or SAMPLES,
        "length": length_of(spec, info),
        **planned_capacity(spec, info, removal).needs(),
        "flops": healing_flops(spec, info, removal),
    }


def chosen_by(spec: PruneSpec, plan: dict[str, Any]) -> str | None:
    """Return the criterion to record; raises `OptionError` for an unknown one."""
    if plan:
        found = from_dict(PlanFile, plan)
        return found.criterion if found else None
    return canonical(spec.criterion) if spec.criterion else None


def named(spec: PruneSpec) -> Removal:
    """Return the blocks and parts that the options name."""
    width = toggle.width_from_text(",".join(spec.mlp_width))
    order = (spec.neurons or "") if width else ""
    return Removal(spec.drop, spec.attention, spec.mlp, width, order)


def selection(spec: PruneSpec, info: CheckpointInfo) -> tuple[Removal, dict[str, Any]]:
    """Return what to remove, and the plan it comes from (empty if blocks are named).

    Raises `PlanError` if neither or both are given, or if it cannot be removed.
    """
    given = named(spec)
    if given and spec.plan:
        names = ("drop", "attention", "mlp", "mlp_width")
        first = next(n for n in names if getattr(spec, n)).replace("_", "-")
        raise PlanError(
            f"Both --{first} and --plan are given.",
            "Give either --drop, --attention, --mlp and --mlp-width, or --plan FILE.",
        )
    if not spec.plan:
        if not given:
            raise PlanError(
                "Neither --drop nor --plan is given.",
                "Give --drop 3,5, --attention 3,5 or --mlp 7, or --plan FILE.",
            )
        return _checked(given, info), {}
    plan = _read_plan(spec.plan)
    planned = from_dict(PlanFile, plan)
    lists = (planned.drop, planned.attention, planned.mlp) if planned else ()
    width = planned.mlp_width if planned else None
    if planned is None or all(numbers is None for numbers in (*lists, width)):
        raise PlanError(
            f"{spec.plan} has no list 'drop' of block numbers, nor 'attention' or 'mlp'.",
            "Give the JSON output of the plan command.",
        )
    for name in ("drop", "attention", "mlp", "mlp_width"):
        if name in plan and getattr(planned, name) is None:
            what = "list of block numbers" if name != "mlp_width" else "table of block and neurons"
            raise PlanError(
                f"'{name}' in {spec.plan} is not a {what}.",
                "Give the JSON output of the plan command.",
            )
    if any(not block.isdecimal() or len(block) > 6 for block in width or ()):
        raise PlanError(
            f"'mlp_width' in {spec.plan} names a block that is not a number.",
            "Give the JSON output of the plan command.",
        )
    if planned.blocks not in (None, info.blocks):
        raise PlanError(
            f"The plan {spec.plan} is for {planned.blocks} blocks, but the checkpoint has "
            f"{info.blocks}.",
            "Give the checkpoint that the plan was made for.",
        )
    narrow = tuple((int(block), count) for block, count in (width or {}).items())
    order = (spec.neurons or planned.neurons) if narrow else ""
    drop, attention, mlp = (numbers or () for numbers in lists)
    return _checked(Removal(drop, attention, mlp, narrow, order), info), plan


def _checked(removal: Removal, info: CheckpointInfo) -> Removal:
    """Return ``removal`` if it can be cut; the order of its neurons is checked too."""
    found = check_removal(removal, info.block_shapes)
    width = [shape["intermediate"] for shape in info.block_shapes]
    neuron_order.kept(found, width, info.key)
    return found


def _read_plan(name: str) -> dict[str, Any]:
    path = outside.path_of(name)
    path = path / "plan.json" if outside.is_folder(path) else path
    try:
        plan = outside.read_json(path)
    except (OSError, outside.Malformed) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PlanError(
            f"Cannot read the plan {outside.brief(name, 200)}: {reason}.",
            "Give the JSON output of the plan command.",
        ) from None
    return plan if isinstance(plan, dict) else {}
