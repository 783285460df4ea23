"""``python -m core prune CHECKPOINT --drop 3,5 --out DIR``: write a checkpoint without blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core import outside
from core.checkpoint import locate
from core.checkpoint.drop import check_drop
from core.checkpoint.headers import CheckpointInfo
from core.errors import PlanError
from core.prune import depth
from core.prune.results import PlanFile
from core.prune.scores import canonical
from core.runs.dtypes import DTYPE_BYTES
from core.runs.progress import StderrProgress
from core.runs.results import from_dict
from core.runs.spec import option

if TYPE_CHECKING:
    from core.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """Write a checkpoint without some of its blocks."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    drop: tuple[int, ...] = option((), help="Blocks to drop, e.g. 3,5 or 4-8.")
    plan: str | None = option(None, help="A plan's JSON file, as printed by plan.")
    criterion: str | None = option(
        None, help="Criterion behind --drop, for the record; a plan contains its own."
    )
    out: str = option(help="Folder for the smaller checkpoint.")
    dry_run: bool = option(False, help="Show what would be written without writing it.")


def run(spec: PruneSpec, run: Run) -> None:
    """Write the variant into the run directory, which the runner has already checked."""
    checkpoint = locate.open(spec.checkpoint, run.progress, need_tokenizer=False)
    drop, plan = selection(spec, checkpoint.info)
    record = depth.prune(
        checkpoint.folder,
        drop,
        run.dir,
        criterion=chosen_by(spec, plan),
        plan=plan or None,
        name=checkpoint.name,
        overwrite=True,
        progress=run.progress,
    )
    run.progress.log(
        f"Wrote {record.blocks_after} of {record.blocks_before} blocks, "
        f"{record.parameters_after:,} of {record.parameters_before:,} parameters "
        f"(ratio {record.ratio:.4f}), to {run.dir}."
    )


def dry_run(spec: PruneSpec) -> dict[str, Any]:
    """Return the content that pruning.json would have; config.json alone is enough."""
    checkpoint = locate.open(
        spec.checkpoint, StderrProgress(), need="headers", need_tokenizer=False
    )
    drop, plan = selection(spec, checkpoint.info)
    record = depth.make_record(
        checkpoint.folder,
        checkpoint.info,
        drop,
        criterion=chosen_by(spec, plan),
        plan=plan or None,
        name=checkpoint.name,
    )
    left = record.parameters_after or 0
    widths = DTYPE_BYTES
    return record.to_dict() | {
        "dry_run": True,
        "out": spec.out,
        "memory_bytes": {dtype: left * width for dtype, width in widths.items()},
    }


def chosen_by(spec: PruneSpec, plan: dict[str, Any]) -> str | None:
    """Return the criterion to record; raises `OptionError` for an unknown one."""
    if plan:
        found = from_dict(PlanFile, plan)
        return found.criterion if found else None
    return canonical(spec.criterion) if spec.criterion else None


def selection(spec: PruneSpec, info: CheckpointInfo) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the blocks to drop and the plan they come from (empty for ``--drop``).

    Raises `PlanError` if neither or both are given, or if the blocks cannot be dropped.
    """
    if bool(spec.drop) == bool(spec.plan):
        both = "Both --drop and --plan are" if spec.plan else "Neither --drop nor --plan is"
        raise PlanError(f"{both} given.", "Give either --drop, e.g. --drop 3,5, or --plan FILE.")
    if not spec.plan:
        return check_drop(spec.drop, info.blocks), {}
    plan = _read_plan(spec.plan)
    planned = from_dict(PlanFile, plan)
    if planned is None or planned.drop is None:
        raise PlanError(
            f"{spec.plan} has no list 'drop' of block numbers.",
            "Give the JSON output of the plan command.",
        )
    if planned.blocks not in (None, info.blocks):
        raise PlanError(
            f"The plan {spec.plan} is for {planned.blocks} blocks, but the checkpoint has "
            f"{info.blocks}.",
            "Give the checkpoint that the plan was made for.",
        )
    return check_drop(planned.drop, info.blocks), plan


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
