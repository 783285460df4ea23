"""``python -m core importance CHECKPOINT --out DIR``: score every block of a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.checkpoint import chat, headers, locate
from core.checkpoint.vocabulary import text_of
from core.criteria import DEFAULT_METRICS, METRICS
from core.data import sources
from core.data.calibration import JOIN_HELP, JOINS, SOURCE_HELP, sample
from core.errors import OptionError
from core.importance import estimate as work
from core.prune.score_results import (
    AngularRow,
    BlockRow,
    GreedyRow,
    Importance,
    SampleRow,
    SublayerRow,
    WeightRow,
)
from core.runs import dtypes
from core.runs.spec import DeviceOptions, option

if TYPE_CHECKING:
    from core.importance.greedy import Round
    from core.importance.sweep import SweepResult
    from core.importance.taylor import WeightScore
    from core.runs.run import Run

SIMILARITY = ("block-influence", "angular", "relative-update")


@dataclass(frozen=True, kw_only=True)
class ImportanceSpec(DeviceOptions):
    """Score every block of a checkpoint by several criteria in one run."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    out: str = option(help="Run directory to write.")
    metrics: tuple[str, ...] = option(
        DEFAULT_METRICS,
        help="Criteria to compute, separated by commas; sleb (greedy) and sublayers only if named.",
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
    dtype = dtypes.expected(spec.dtype, info.dtype, spec.device, "blocks").weights
    rows = work.estimate(info, spec.metrics, spec.samples, spec.length, dtype, spec.rounds)
    seconds = work.seconds(rows.flops, spec.device)
    return {
        "blocks": info.blocks,
        "metrics": list(spec.metrics),
        "calibration": text_of(spec.calibration, checkpoint.folder),
        "samples": spec.samples,
        "length": spec.length,
        "dtype": dtype,
        "flops": rows.flops,
        "memory_mib": round(rows.memory_mib, 1),
        "seconds": seconds,
        "kind": "estimated",
        "seconds_from": "the rate of the last run in this workspace" if seconds else None,
    }


def _check_length(spec: ImportanceSpec, context: int) -> None:
    if context and spec.length > context:
        raise OptionError(
            f"--length: {spec.length} tokens exceed the model's context of {context}.",
            f"Use {context} or fewer.",
        )


def run(spec: ImportanceSpec, run: Run) -> None:
    """Compute the metrics and write the result files into the run directory."""
    from core.importance.branches import make_batch
    from core.model import loading, memory, precision
    from core.model.blocks import BlockView

    checkpoint = locate.open(spec.checkpoint, run.progress)
    folder, info = checkpoint.folder, checkpoint.info
    _check_length(spec, info.context)
    tokenizer = loading.load_tokenizer(folder)
    source = text_of(spec.calibration, folder)
    drawn = sample(
        source,
        tokenizer,
        spec.samples,
        spec.length,
        spec.seed,
        join=spec.join,
        chat=chat.for_text(spec.chat_template, tokenizer),
    )
    for note in drawn.facts.notes:
        run.progress.log(note)
    prepared = loading.prepare(spec, checkpoint, "blocks")
    view = BlockView(prepared.load(run.progress.log))
    batch = make_batch(drawn.rows, view)
    with memory.out_of_memory_explained("scoring blocks"):
        results = _compute(spec, run, view, batch)
    _write(run, results, len(view))
    dataclasses.replace(
        _summary(spec, info, results),
        **prepared.facts(),
        calibration=source,
        calibration_content=sources.describe(source)["content"],
        text=drawn.facts,
        tokens=batch.predictions,
        compute_dtype=precision.dtype_name(prepared.precision.arithmetic),
        versions=_versions(),
    ).write(run)


@dataclass
class _Results:
    """Results so far; None for what was not requested."""

    sweep: SweepResult | None = None
    taylor: list[WeightScore] | None = None
    magnitude: list[WeightScore] | None = None
    greedy: list[Round] | None = None
    sublayers: list[tuple[int, str, float]] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def _compute(spec: ImportanceSpec, run: Run, view: Any, batch: Any) -> _Results:
    from core.importance.greedy import greedy
    from core.importance.sweep import sublayer_perplexity, sweep
    from core.importance.taylor import magnitude, taylor

    wanted, results, progress = set(spec.metrics), _Results(), run.progress
    with_ppl = "ppl" in wanted
    ways: dict[str, tuple[set[str], str, Callable[[], Any]]] = {
        "sweep": (
            {"ppl", *SIMILARITY},
            "sweep",
            lambda: sweep(view, batch, progress, perplexity=with_ppl),
        ),
        "taylor": ({"taylor"}, "taylor", lambda: taylor(view, batch, progress)),
        "magnitude": ({"magnitude"}, "magnitude", lambda: magnitude(view)),
        "sublayers": (
            {"sublayers"},
            "sublayers",
            lambda: sublayer_perplexity(view, batch, progress),
        ),
        "sleb": ({"sleb"}, "greedy", lambda: greedy(view, batch, progress, rounds=spec.rounds)),
    }
    for name, (metrics, field, compute) in ways.items():
        if wanted & metrics:
            began = time.perf_counter()
            setattr(results, field, compute())
            results.seconds[name] = time.perf_counter() - began
    if results.sweep and results.sweep.dense_ppl is not None:
        progress.log(f"Dense perplexity {results.sweep.dense_ppl:.4f}.")
    return _only(spec, results)


def _only(spec: ImportanceSpec, results: _Results) -> _Results:
    """Drop the by-products of the sweep that were not requested."""
    if results.sweep is not None:
        empty: dict[str, Any] = {}
        if "block-influence" not in spec.metrics:
            empty["block_influence"] = []
        if "relative-update" not in spec.metrics:
            empty["relative_update"] = []
        if "angular" not in spec.metrics:
            empty["angular"] = []
        results.sweep = dataclasses.replace(results.sweep, **empty)
    return results


def _write(run: Run, results: _Results, blocks: int) -> None:
    from core.importance.taylor import block_sums

    found, none = results.sweep, [None] * blocks
    columns: tuple[Sequence[Any], ...] = (
        range(blocks),
        (found.ppl if found else []) or none,
        block_sums(results.taylor, blocks) if results.taylor else none,
        block_sums(results.magnitude, blocks) if results.magnitude else none,
        (found.block_influence if found else []) or none,
        (found.relative_update if found else []) or none,
    )
    if results.taylor or results.magnitude:
        named = results.taylor or results.magnitude or []
        taylor = [s.value for s in results.taylor] if results.taylor else [None] * len(named)
        size = [s.value for s in results.magnitude] if results.magnitude else [None] * len(named)
        both = zip(named, taylor, size, strict=True)
        WeightRow.write(run, [WeightRow(s.name, s.block, s.module, t, m) for s, t, m in both])
    if found and found.sample_nll:
        SampleRow.write(
            run,
            [
                SampleRow(branch - 1, sample, nll)
                for branch, row in enumerate(found.sample_nll)
                for sample, nll in enumerate(row)
            ],
        )
    if found and found.angular:
        AngularRow.write(run, [AngularRow(*row) for row in found.angular])
    if results.greedy is not None:
        rounds = enumerate(results.greedy, start=1)
        GreedyRow.write(run, [GreedyRow(at, r.block, r.ppl) for at, r in rounds])
    if results.sublayers is not None:
        SublayerRow.write(run, [SublayerRow(*row) for row in results.sublayers])
    BlockRow.write(run, [BlockRow(*row) for row in zip(*columns, strict=True)])


def _summary(spec: ImportanceSpec, info: headers.CheckpointInfo, results: _Results) -> Importance:
    flops = work.estimate(
        info, spec.metrics, spec.samples, spec.length, info.dtype, spec.rounds
    ).flops
    spent = sum(results.seconds.values())
    return Importance(
        checkpoint=spec.checkpoint,
        checkpoint_key=info.key,
        family=info.family,
        blocks=info.blocks,
        dense_ppl=results.sweep.dense_ppl if results.sweep else None,
        metrics=spec.metrics,
        samples=spec.samples,
        length=spec.length,
        seed=spec.seed,
        seconds={name: round(value, 4) for name, value in results.seconds.items()},
        flops=flops,
        flops_per_s=flops / spent if spent > 0 and flops > 0 else None,
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
