"""``python -m core importance CHECKPOINT --out DIR``: score every block of a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.checkpoint import chat, headers, locate
from core.checkpoint.vocabulary import text_of
from core.criteria import DEFAULT_METRICS, METRICS
from core.data import sources
from core.data.calibration import JOIN_HELP, JOINS, SOURCE_HELP
from core.errors import OptionError
from core.importance import estimate as work
from core.importance.capacity import Capacity, Demand, decide, limit_of, view_of
from core.importance.drawing import drawn_rows
from core.importance.scoring import Results, compute
from core.prune.score_results import (
    AngularRow,
    BlockRow,
    DivergenceRow,
    GreedyRow,
    Importance,
    SampleRow,
    SublayerRow,
    WeightRow,
)
from core.runs import dtypes, ranks
from core.runs.footprint import Footprint
from core.runs.spec import MemoryOptions, ProcessOptions, option

if TYPE_CHECKING:
    from core.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class ImportanceSpec(MemoryOptions, ProcessOptions):
    """Score every block of a checkpoint by several criteria in one run."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    out: str = option(help="Run directory to write.")
    metrics: tuple[str, ...] = option(
        DEFAULT_METRICS,
        help="Criteria to compute, separated by commas; kl, sleb (greedy) and sublayers only if "
        "named.",
        choices=METRICS,
    )
    calibration: str = option("auto", help=f"Text to calibrate on: {SOURCE_HELP}")
    samples: int = option(10, help="Calibration rows.", low=1, high=100000)
    length: int = option(128, help="Tokens per row.", low=2, high=1048576, unit="tokens")
    seed: int = option(1234, help="Seed for rows and crops.", low=0)
    join: str = option("auto", help=JOIN_HELP, choices=JOINS)
    chat_template: str = option("auto", help=chat.HELP, choices=chat.CHOICES)
    rounds: int | None = option(
        None, help="Number of blocks that the metric sleb removes. Default: half of them.", low=1
    )
    dry_run: bool = option(False, help="Estimate time and memory without running anything.")


def dry_run(spec: ImportanceSpec) -> dict[str, Any]:
    """Return the estimated operations, memory and time; only headers are needed."""
    checkpoint = locate.open(spec.checkpoint, need="config")
    info = checkpoint.info
    _check_length(spec, info.context)
    formats = dtypes.expected(spec.dtype, info.dtype, spec.device, "blocks")
    dtype = formats.weights
    room = _capacity(spec, info, formats, spec.samples, spec.length)
    rows = work.estimate(info, spec.metrics, spec.samples, spec.length, dtype, spec.rounds)
    taken = footprint(spec, info, formats)
    own = ranks.most(spec.samples, spec.processes)
    memory = work.estimate(info, spec.metrics, own, spec.length, dtype, spec.rounds).memory_mib
    seconds = work.seconds(rows.flops, spec.device, info.parameters)
    seconds = ranks.shared_seconds(seconds, spec.device, spec.processes)
    return {
        "blocks": info.blocks,
        "metrics": list(spec.metrics),
        "calibration": text_of(spec.calibration, checkpoint.folder),
        "samples": spec.samples,
        "length": spec.length,
        "dtype": dtype,
        "flops": rows.flops,
        "memory_mib": round(memory, 1),
        **room.facts(),
        **taken.facts(),
        **ranks.facts(spec.processes, spec.samples),
        "seconds": seconds,
        "kind": "estimated",
        "seconds_from": work.origin(spec.device, info.parameters) if seconds else None,
    }


def footprint(
    spec: ImportanceSpec, info: headers.CheckpointInfo, formats: dtypes.Formats
) -> Footprint:
    """Return what scoring takes if the text has all rows; ``formats`` are those for blocks."""
    room = _capacity(spec, info, formats, spec.samples, spec.length)
    asked = spec.metrics, spec.samples, spec.length, formats.weights, spec.rounds
    often = work.reads(info, spec.metrics, spec.rounds)
    flops = work.estimate(info, *asked).flops
    return room.footprint(info, flops, often, processes=spec.processes)


def demands(info: headers.CheckpointInfo, metrics: tuple[str, ...]) -> list[Demand]:
    """Return what the passes of an importance run hold."""
    blocks, wanted, found = info.blocks, set(metrics), []
    if {"ppl", "kl"} & wanted:
        # every set's, the dense one before the block, and with kl at the end
        found.append(Demand("sweep", blocks + 2 + ("kl" in wanted)))
    elif {"block-influence", "angular", "relative-update"} & wanted:
        found.append(Demand("sweep", 2))
    if "taylor" in wanted:
        found.append(Demand("taylor", blocks + 3, splits=False, gradients=True))
    if "sublayers" in wanted:
        found.append(Demand("sublayers", 2 * blocks))
    if "sleb" in wanted:
        found.append(Demand("sleb", blocks))
    return found


def _capacity(
    spec: ImportanceSpec,
    info: headers.CheckpointInfo,
    formats: dtypes.Formats,
    rows: int,
    tokens: int,
) -> Capacity:
    limit = limit_of(spec.device, spec.memory_limit, spec.processes)
    own = ranks.most(rows, spec.processes)
    return decide(info, formats, spec.device, limit, own, tokens, demands(info, spec.metrics))


def _check_length(spec: ImportanceSpec, context: int) -> None:
    if context and spec.length > context:
        raise OptionError(
            f"--length: {spec.length} tokens exceed the model's context of {context}.",
            f"Use {context} or fewer.",
        )


def run(spec: ImportanceSpec, run: Run) -> None:
    """Compute the metrics and write the result files into the run directory."""
    from core.importance.branches import make_batch
    from core.model import loading, precision

    checkpoint = locate.open(spec.checkpoint, run.progress)
    folder, info = checkpoint.folder, checkpoint.info
    _check_length(spec, info.context)
    tokenizer = loading.load_tokenizer(folder)
    source = text_of(spec.calibration, folder)
    drawn = drawn_rows(spec, source, tokenizer, spec.samples, spec.length, run.progress)
    prepared = loading.prepare(spec, checkpoint, "blocks")
    longest = max(map(len, drawn.rows))
    room = _capacity(spec, info, prepared.formats, len(drawn.rows), longest)
    view = view_of(prepared, room, run.progress.log)
    batch = make_batch(drawn.rows, view, room.group, run.ranks)
    about: dict[str, Any] = {
        "calibration": source,
        "calibration_content": sources.describe(source)["content"],
        "text": drawn.facts,
        "tokens": batch.predictions,
        "compute_dtype": precision.dtype_name(prepared.precision.arithmetic),
        "versions": _versions(),
    }

    def write(found: Results, complete: bool = False) -> None:
        """Write what is known so far, so that pages show each criterion as it comes."""
        _write(run, found)
        summary = dataclasses.replace(_summary(spec, info, found), **prepared.facts(), **about)
        if not complete:  # the rate of a part says nothing about a whole run
            summary = dataclasses.replace(summary, flops=None, flops_per_s=None)
        summary.write(run)

    results = compute(view, batch, spec.metrics, run.progress, rounds=spec.rounds, on_part=write)
    view.close()
    if results.dense_ppl is not None:
        run.progress.log(f"Dense perplexity {results.dense_ppl:.4f}.")
    write(results, complete=True)


def _write(run: Run, results: Results) -> None:
    if results.taylor or results.magnitude:
        named = results.taylor or results.magnitude or []
        taylor = [s.value for s in results.taylor] if results.taylor else [None] * len(named)
        size = [s.value for s in results.magnitude] if results.magnitude else [None] * len(named)
        both = zip(named, taylor, size, strict=True)
        WeightRow.write(run, [WeightRow(s.name, s.block, s.module, t, m) for s, t, m in both])
    if rows := results.sample_rows():
        SampleRow.write(run, rows)
    if divergences := results.divergence_rows():
        DivergenceRow.write(run, divergences)
    if angular := results.angular_rows():
        AngularRow.write(run, angular)
    if results.greedy is not None:
        GreedyRow.write(run, results.greedy_rows())
    if results.sublayers is not None:
        SublayerRow.write(run, [SublayerRow(*row) for row in results.sublayers])
    BlockRow.write(run, results.block_rows())


def _summary(spec: ImportanceSpec, info: headers.CheckpointInfo, results: Results) -> Importance:
    flops = work.estimate(
        info, spec.metrics, spec.samples, spec.length, info.dtype, spec.rounds
    ).flops
    spent = sum(results.seconds.values())
    return Importance(
        checkpoint=spec.checkpoint,
        checkpoint_key=info.key,
        family=info.family,
        blocks=info.blocks,
        dense_ppl=results.dense_ppl,
        metrics=spec.metrics,
        samples=spec.samples,
        length=spec.length,
        seed=spec.seed,
        seconds={name: round(value, 4) for name, value in results.seconds.items()},
        flops=flops,
        parameters=info.parameters,
        flops_per_s=flops / spent if spent > 0 and flops > 0 and spec.processes == 1 else None,
        processes=spec.processes,
    )


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from core import __version__

    return {
        "depthcut": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
