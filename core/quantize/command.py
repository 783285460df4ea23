"""``python -m core quantize CHECKPOINT --bits 8 --out DIR``: an int8 or int4 variant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core import words
from core.checkpoint import locate
from core.prune.results import Pruning
from core.quantize import plan as planning
from core.quantize.plan import Plan
from core.quantize.results import QuantizationRecord
from core.runs import pace
from core.runs.devices import MIB
from core.runs.progress import StderrProgress
from core.runs.spec import option

if TYPE_CHECKING:
    from core.checkpoint.locate import Checkpoint
    from core.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec:
    """Write an int8 or int4 variant of a checkpoint (weights only)."""

    checkpoint: str = option(
        positional=True, help="Folder, run, Hub id, or demo; dense, pruned or retrained."
    )
    bits: int = option(help="Bits per weight: 8 or 4.", low=4, high=8)
    group: int | None = option(
        None,
        low=2,
        unit="weights",
        help="Weights that share a scale; it must divide every input width. Default: for 8 bits "
        "one scale per output channel, for 4 bits 128 or the largest smaller group that fits.",
    )
    out: str = option(help="Folder for the quantized checkpoint.")
    dry_run: bool = option(False, help="Show what would be written without writing it.")


def check(spec: QuantizeSpec) -> None:
    """Raise an error for a checkpoint, bits or a group that cannot be used."""
    _read(spec, "config")


def dry_run(spec: QuantizeSpec) -> dict[str, Any]:
    """Return the content that quantization.json would have, and the groups that fit."""
    checkpoint, plan = _read(spec, "headers")
    taken = planning.footprint(checkpoint.info, plan)
    writing, origin = pace.writing(taken.written_bytes)
    return record_of(checkpoint, plan).to_dict() | {
        "dry_run": True,
        "out": spec.out,
        "groups": list(planning.fitting(checkpoint.info)),
        "note": plan.note,
        "memory_mib": round(taken.memory_bytes / MIB, 1),
        **taken.facts(),
        "seconds": pace.START_S + taken.convert_s + writing,
        "kind": "estimated",
        "seconds_from": origin,
    }


def run(spec: QuantizeSpec, run: Run) -> None:
    """Quantize the weights on the CPU and write the checkpoint into the run directory."""
    from core.model import quantized_weights
    from core.quantize.write import write

    version = quantized_weights.require()
    checkpoint, plan = _read(spec, "weights", run)
    record = replace(record_of(checkpoint, plan), torchao=version)
    if plan.note:
        run.progress.log(plan.note)
    write(checkpoint.folder, run.dir, plan, record, run.progress)
    run.progress.log(
        f"Quantized {record.tensors} weights to {record.label} "
        f"({record.parameters:,} of {record.total_parameters:,} parameters); "
        f"{', '.join(record.left)} stay in {record.dtype}. The weights take "
        f"{words.size(record.bytes_after)} instead of {words.size(record.bytes_before)}, in "
        f"{run.dir}."
    )


def _read(spec: QuantizeSpec, need: locate.Need, run: Run | None = None) -> tuple[Checkpoint, Plan]:
    progress = run.progress if run else StderrProgress()
    checkpoint = locate.open(spec.checkpoint, progress, need=need, need_tokenizer=False)
    return checkpoint, planning.make(checkpoint.info, spec.bits, spec.group)


def record_of(checkpoint: Checkpoint, plan: Plan) -> QuantizationRecord:
    """Return the content of quantization.json."""
    info = checkpoint.info
    earlier = Pruning.read(checkpoint.folder)
    return QuantizationRecord(
        bits=plan.bits,
        group=plan.group,
        scheme=planning.SCHEMES[plan.bits],
        layout=planning.LAYOUTS[plan.bits],
        source=checkpoint.name,
        source_key=info.key,
        base_model=(earlier.base_model if earlier else "") or checkpoint.name,
        tensors=len(plan.matrices),
        parameters=plan.parameters,
        total_parameters=info.parameters,
        left=planning.left(info),
        dtype=info.dtype,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
    )
