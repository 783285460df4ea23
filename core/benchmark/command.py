"""``python -m core benchmark CHECKPOINT ... --out DIR``: latency, throughput and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.benchmark import analytic, protocol, results
from core.benchmark.duration import Work
from core.benchmark.protocol import Cell, CellResult
from core.benchmark.results import (
    CompiledPoint,
    Largest,
    MeasuredVariant,
    Point,
    Sampling,
    Skipped,
    Summary,
    TimedRun,
)
from core.checkpoint import locate
from core.errors import DepthcutError, OptionError, RunError
from core.runs import devices, dtypes, processes, warm
from core.runs.devices import MIB
from core.runs.footprint import PROCESS_BYTES, Footprint, kind_of, whole
from core.runs.spec import DeviceOptions, option
from core.runs.workspace import Workspace

if TYPE_CHECKING:
    from core.checkpoint.headers import CheckpointInfo
    from core.runs.progress import Progress
    from core.runs.run import Run

CPU_LIMIT_S = 90.0
"""Default time for all points on a CPU. Chosen so that a benchmark ends while one waits for it."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSpec(DeviceOptions):
    """Measure latency, throughput and memory of checkpoints, side by side."""

    checkpoints: tuple[str, ...] = option(positional=True, help="Folders, runs, Hub ids, or demo.")
    out: str = option(help="Run directory to write.")
    batch_sizes: tuple[int, ...] = option(
        (1, 4, 16), help="Prompts processed together.", low=1, high=65535
    )
    input_tokens: int = option(12, help="Length of the prompt.", low=1, unit="tokens")
    output_tokens: tuple[int, ...] = option(
        (128,), help="Forced length of the output.", low=2, unit="tokens"
    )
    warmup: int = option(10, help="Warm-up runs per point, over all visits.", low=0)
    runs: int = option(20, help="Timed runs per point, over all visits.", low=2)
    visits: int = option(
        2, help="Number of times each variant is measured, in alternating order.", low=2
    )
    time_limit_s: float | None = option(
        None,
        help="Time limit for all points and the search for the largest batch; each visit makes at "
        "least two runs. Default: 90 on a CPU, otherwise none.",
        low=1,
        unit="seconds",
    )
    memory_limit_mib: int | None = option(
        None, help="Simulate a device with only this much memory.", low=1, unit="MiB"
    )
    largest_batch: bool = option(
        True, help="Find the largest batch that fits, on a GPU or under a memory limit."
    )
    compile: bool = option(
        False,
        help="Also measure with a static cache and steps compiled by torch.compile (CUDA: graphs), "
        "as a series of its own in compiled.csv.",
    )
    random_weights: bool = option(False, help="Use random weights; config.json is enough.")
    rates_only: bool = option(
        False, help="Only measure the device's rates, for estimates; no checkpoint is loaded."
    )
    seed: int = option(1234, help="Seed for random weights and sampling.", low=0)
    dry_run: bool = option(False, help="Show what would run and its estimated memory.")


@dataclass
class Variant:
    """One checkpoint and its results."""

    name: str
    folder: Path
    info: CheckpointInfo
    results: dict[Cell, list[CellResult]] = field(default_factory=dict)
    compiled: dict[Cell, list[CellResult]] = field(default_factory=dict)
    """The second series, if one is measured."""
    uncompiled: str = ""
    loaded: dict[str, Any] = field(default_factory=dict)
    largest: Largest | None = None

    def dtype(self, spec: BenchmarkSpec) -> str:
        """Return the dtype of the loaded model or, before that, the one it will have."""
        expected = dtypes.expected(spec.dtype, self.info.dtype, spec.device).weights
        return str(self.loaded.get("dtype") or expected)


def variants_of(spec: BenchmarkSpec, progress: Progress | None = None) -> list[Variant]:
    """Resolve and inspect the checkpoints; names are their folders', made unique."""
    config_only = spec.random_weights or spec.dry_run or spec.rates_only
    found: list[Variant] = []
    longest = spec.input_tokens + max(spec.output_tokens)
    need: locate.Need = "config" if config_only else "weights"
    for given in spec.checkpoints:
        checkpoint = locate.open(given, need=need, need_tokenizer=False, quantized=True)
        folder, info = checkpoint.folder, checkpoint.info
        if info.context and longest > info.context:
            raise OptionError(
                f"--output-tokens: prompt and output have {longest} tokens, which exceed the "
                f"context of {given}, {info.context}.",
                "Use shorter prompts or outputs.",
            )
        name = given if given == "demo" else folder.resolve().name
        if name == "merged":
            name = f"{folder.resolve().parent.name}-merged"
        same = [v for v in found if v.name == name or v.name.startswith(f"{name}#")]
        found.append(Variant(f"{name}#{len(same) + 1}" if same else name, folder, info))
    return found


def check(spec: BenchmarkSpec) -> None:
    """Raise an error for invalid checkpoints, or for lengths that exceed their contexts."""
    variants_of(spec)


def _work(
    spec: BenchmarkSpec,
    variants: Sequence[Variant],
    grid: Sequence[Cell],
    limit_s: float | None,
    device: str,
) -> tuple[Work, bool]:
    """Return the visits in estimated seconds, and whether the device's rates were ever measured.

    Rates in the variants' precision count before others of the same device.
    """
    where, dtype = Workspace(), variants[0].dtype(spec) if variants else ""
    rates = results.known_rates(where, device, dtype) or results.known_rates(where, device)
    work = Work(
        [(v.name, v.info) for v in variants],
        grid,
        rates=rates,
        input_tokens=spec.input_tokens,
        runs=spec.runs,
        warmup=spec.warmup,
        visits=spec.visits,
        point_limit_s=limit_s,
        compiled=spec.compile,
    )
    return work, rates is not None


def limit_of(spec: BenchmarkSpec, device: str) -> float | None:
    """Return the time limit in seconds, None if there is none."""
    return spec.time_limit_s or (CPU_LIMIT_S if device == "cpu" else None)


def dry_run(spec: BenchmarkSpec) -> dict[str, Any]:
    """Return what would be measured, every point's estimated memory, and the time (no torch)."""
    variants = variants_of(spec)
    grid = protocol.cells(spec.batch_sizes, spec.output_tokens)
    rows = []
    for variant in variants:
        dtype = variant.dtype(spec)
        for cell in grid:
            parts = analytic.memory_bytes(
                variant.info, cell.batch_size, spec.input_tokens, cell.output_tokens, dtype
            )
            mib = {f"{k}_mib": round(v / MIB, 2) for k, v in parts.items()}
            rows.append(
                {"variant": variant.name, **dataclasses.asdict(cell), "dtype": dtype, **mib}
            )
    order = protocol.visit_order([v.name for v in variants], spec.visits)
    device = devices.resolve(spec.device)
    limit = limit_of(spec, device)
    series = 1 + spec.compile
    taken = [footprint(spec, v.info, v.dtype(spec)) for v in variants]
    points = len(variants) * len(grid) * spec.visits * series
    each = limit / points if limit and points else None
    work, known = _work(spec, variants, grid, each, device)
    return {
        "order": [name for _, name in order],
        "generations": len(variants) * len(grid) * (spec.runs + spec.warmup) * series,
        "time_limit_s": spec.time_limit_s,
        "seconds": round(work.total_s, 1),
        "least_s": round(work.least_s, 1),
        "seconds_from": "this device's rates in the last benchmark of this workspace"
        if known
        else "assumed rates",
        "points": rows,
        "read_bytes": sum(one.read_bytes for one in taken),
        "flops": sum(one.flops for one in taken),
        "kind": "estimated",
    }


def footprint(
    spec: BenchmarkSpec, info: CheckpointInfo, dtype: str, limit: int | None = None
) -> Footprint:
    """Return what measuring one checkpoint takes, without the search for the largest batch.

    ``dtype``: format of the model in memory; ``limit``: the device's memory in bytes.
    """
    each = spec.runs + spec.warmup
    memory, flops, steps, cache = 0, 0.0, 0, 0.0
    for cell in protocol.cells(spec.batch_sizes, spec.output_tokens):
        about = info, cell.batch_size, spec.input_tokens
        memory = max(memory, analytic.memory_bytes(*about, cell.output_tokens, dtype)["total"])
        flops += each * analytic.generation_flops(*about, cell.output_tokens)
        steps += each * cell.output_tokens
        middle = spec.input_tokens + cell.output_tokens // 2
        moved = analytic.CACHE_MOVES * analytic.kv_bytes(info, cell.batch_size, middle, dtype)
        cache += each * cell.output_tokens * moved
    memory += PROCESS_BYTES[kind_of(spec.device)]
    return Footprint(
        memory_bytes=memory,
        way=whole(memory, limit),
        flops=flops,
        passes=steps,
        cache_bytes=cache,
        read_bytes=0 if spec.random_weights else spec.visits * info.stored_bytes,
    )


WORKER = "core.benchmark.worker"


def _talk(
    request: dict[str, Any], progress: Progress, template: warm.Template | None = None
) -> Iterator[dict[str, Any]]:
    """Run one worker and yield its events; it is killed when the caller stops iterating.

    The last event is ``ended`` with the exit status.
    """
    # silences the profiler's start and stop messages
    env = processes.environment(KINETO_LOG_LEVEL="99")
    asked, ask = os.pipe()
    told, tell = os.pipe()
    with open(ask, "w", encoding="utf-8") as requests, open(told, encoding="utf-8") as events:
        try:
            process = warm.start(
                template, [*warm.MODULE, WORKER], streams=(asked, tell, 2), env=env
            )
        finally:
            os.close(asked)
            os.close(tell)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended; its status tells why
                requests.write(json.dumps(request) + "\n")
                requests.flush()
            for line in events:
                progress.check_cancel()
                yield json.loads(line)
            yield {"event": "ended", "status": process.wait()}
        finally:
            process.kill()
            process.wait()


class Session:
    """One benchmark: the plan, the workers one after another, and their results."""

    def __init__(self, spec: BenchmarkSpec, progress: Progress, device: str) -> None:
        """Prepare the grid and the time limit per point."""
        self.spec, self.progress, self.device = spec, progress, device
        self.template: warm.Template | None = None
        """Workers are forked from it, if there is one."""
        self.variants = variants_of(spec)
        self.grid = protocol.cells(spec.batch_sizes, spec.output_tokens)
        self.total = len(self.variants) * len(self.grid) * spec.visits * (1 + spec.compile)
        self.done = 0
        self.skipped: list[Skipped] = []
        self.order: list[str] = []
        self.measured_rates: list[analytic.Rates] = []
        can_run_out = device.startswith("cuda") or spec.memory_limit_mib is not None
        self.finds_largest = spec.largest_batch and can_run_out
        limit = limit_of(spec, device)
        parts = self.total + self.finds_largest * len(self.variants)
        self.cell_limit_s = limit / parts if limit else None
        self.work, _ = _work(spec, self.variants, self.grid, self.cell_limit_s, device)
        self.began, self.skipped_s = time.monotonic(), 0.0

    def request(self, variant: Variant, **changes: Any) -> dict[str, Any]:
        """Return a worker's request for one visit."""
        spec = self.spec
        return {
            "folder": str(variant.folder),
            "device": self.device,
            "dtype": spec.dtype,
            "random_weights": spec.random_weights,
            "input_tokens": spec.input_tokens,
            "min_runs": 2,
            "seed": spec.seed,
            "warmup": 1,
            "runs": 1,
            "cell_limit_s": self.cell_limit_s,
            "search_limit_s": self.cell_limit_s,
            "memory_limit_mib": spec.memory_limit_mib,
            **changes,
        }

    def rates(self) -> analytic.Rates | None:
        """Return the device's rates: the mean over both ends of the benchmark.

        Each visit of the first variant (the first and, with two visits, the last) measures them at
        its end; if none could, a separate worker does.
        """
        if not self.measured_rates:
            self.progress.step(self.done, self.total, "the device's rates")
            request = self.request(self.variants[0], measure_rates=True, memory_limit_mib=None)
            for event in _talk(request, self.progress, self.template):
                if event.pop("event") == "rates":
                    self.measured_rates.append(analytic.Rates(**event))
        if not self.measured_rates:
            self.progress.log("Cannot measure the device's rates; latency will not be estimated.")
            return None
        return analytic.mean_rates(self.measured_rates)

    def visit(self, visit: int, variant: Variant, *, compiled: bool = False) -> None:
        """Measure one variant once, restarting the worker if the system killed it."""
        spec = self.spec
        known = variant.compiled if compiled else variant.results
        known_full = {c for c, rs in known.items() if any(r.oom for r in rs)}
        left = [c for c in self.grid if visit == 0 or (c in known and c not in known_full)]
        self._pass_over(variant, [c for c in self.grid if c not in left])
        find = self.finds_largest and visit == 0 and not compiled
        if not compiled:
            self.order.append(variant.name)
        warmup = max(1, protocol.share(spec.warmup, spec.visits, visit)) if spec.warmup else 0
        while left:
            request = self.request(
                variant,
                cells=[(c.batch_size, c.output_tokens) for c in left],
                warmup=warmup,
                runs=protocol.share(spec.runs, spec.visits, visit),
                find_largest=find,
                count_tensors=visit == 0 and not spec.memory_limit_mib and not compiled,
                measure_rates=variant is self.variants[0]
                and not spec.memory_limit_mib
                and not compiled,
                compiled=compiled,
            )
            killed_at = self._listen(request, visit, variant, left)
            if killed_at is None:
                return
            full = killed_at  # the system's out-of-memory killer counts as an out-of-memory error
            larger = [
                c
                for c in left
                if c.batch_size >= full.batch_size and c.output_tokens >= full.output_tokens
            ]
            self._skip(variant, [c for c in larger if c != full], noted=not compiled)
            left = [c for c in left if c not in larger]

    def _skip(self, variant: Variant, cells: list[Cell], *, noted: bool = True) -> None:
        for cell in cells if noted else ():
            self.skipped.append(
                Skipped(
                    variant=variant.name,
                    batch_size=cell.batch_size,
                    output_tokens=cell.output_tokens,
                )
            )
        self._pass_over(variant, cells)

    def _pass_over(self, variant: Variant, cells: list[Cell]) -> None:
        """Count points as done that take no time."""
        before = self.work.done_s
        self.work.finish(variant.name, cells)
        self.skipped_s += self.work.done_s - before
        self.done += len(cells)

    def _listen(
        self, request: dict[str, Any], visit: int, variant: Variant, left: list[Cell]
    ) -> Cell | None:
        """Process one worker's events; return the cell at which it was killed, if it was."""
        spec, current, cell = self.spec, None, None
        compiled = bool(request.get("compiled"))
        for event in _talk(request, self.progress, self.template):
            kind = event.pop("event")
            if kind in ("cell", "result", "skipped", "tensors"):
                cell = Cell(event.pop("batch_size"), event.pop("output_tokens"))
                current = cell if kind == "cell" else None
            if kind == "loaded":
                variant.loaded = event
            elif kind == "uncompiled":
                variant.uncompiled = event["reason"]
                self.progress.log(f"{variant.name} with compiled steps: {variant.uncompiled}")
                self._pass_over(variant, left)
                left.clear()
                return None
            elif kind == "cell":
                assert cell is not None
                what = f"batch {cell.batch_size}, {cell.output_tokens} tokens"
                series = " compiled" if compiled else ""
                label = f"{variant.name}{series}, visit {visit + 1} of {spec.visits}: {what}"
                left_s = self.work.left_s(time.monotonic() - self.began, self.skipped_s)
                self.progress.step(self.done, self.total, label, left_s=left_s)
            elif kind == "skipped":
                assert cell is not None
                self._skip(variant, [cell], noted=not compiled)
                left.remove(cell)
            elif kind == "result":
                assert cell is not None
                self._take(variant, CellResult(cell, visit, **_tuples(event)), compiled=compiled)
                left.remove(cell)
            elif kind == "tensors":
                assert cell is not None
                counted = variant.results[cell][-1]
                variant.results[cell][-1] = dataclasses.replace(counted, **event)
            elif kind == "rates":
                self.measured_rates.append(analytic.Rates(**event))
            elif kind == "largest":
                variant.largest = Largest(**event)
            elif kind == "failed" and event["oom"]:
                return self._nothing_fits(variant, visit, left, compiled=compiled)
            elif kind == "failed":
                error = DepthcutError(event["message"], event["hint"])
                error.exit_status = event["status"]
                raise error
            elif kind == "ended" and event["status"]:
                killed = event["status"] in (-9, -6)  # SIGKILL, or abort of a failed allocation
                if not killed:
                    raise RunError(
                        f"The worker for {variant.name} ended with status {event['status']}.",
                        "What it printed before, if anything, is in the log.",
                    )
                if current is None:
                    if left:
                        return self._nothing_fits(variant, visit, left, compiled=compiled)
                    continue
                self._take(variant, CellResult(current, visit, oom=True), compiled=compiled)
                return current
        left.clear()
        return None

    def _nothing_fits(
        self, variant: Variant, visit: int, left: list[Cell], *, compiled: bool
    ) -> Cell | None:
        """Record that the weights alone do not fit."""
        self.progress.log(f"{variant.name}: the weights alone do not fit.")
        first = left[0]
        self._take(variant, CellResult(first, visit, oom=True), compiled=compiled)
        self._skip(variant, left[1:], noted=not compiled)
        left.clear()
        if variant.largest is None and not compiled:
            variant.largest = Largest(batch_size=0, fails_at=1)
        return first

    def _take(self, variant: Variant, result: CellResult, *, compiled: bool = False) -> None:
        held = variant.compiled if compiled else variant.results
        held.setdefault(result.cell, []).append(result)
        self.work.finish(variant.name, [result.cell])
        self.done += 1
        cell = result.cell
        if result.oom:
            why = results.WHY[result.limit or "memory"]
            self.progress.log(f"{variant.name}, batch {cell.batch_size}: {why}.")
            return
        self.progress.metric(
            variant=f"{variant.name}, compiled" if compiled else variant.name,
            visit=result.visit,
            **dataclasses.asdict(cell),
            latency_s=protocol.percentile(result.latencies_s, 0.5),
        )


def _tuples(event: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in event.items()}


def _points(session: Session, rates: analytic.Rates | None) -> list[Point]:
    """Return the rows of points.csv, with measured and estimated values."""
    spec, found = session.spec, []
    for variant in session.variants:
        dtype = variant.dtype(spec)
        for cell in (c for c in session.grid if c in variant.results):
            shape = (cell.batch_size, spec.input_tokens, cell.output_tokens)
            made = protocol.point(
                variant.name,
                spec.input_tokens,
                variant.results[cell],
                estimated_latency_s=analytic.latency_s(variant.info, rates, *shape)
                if rates and not variant.info.quantization
                else None,
                estimated_memory_mib=analytic.memory_bytes(variant.info, *shape, dtype)["total"]
                / MIB,
            )
            found.append(made)
    return found


def _compiled_points(session: Session) -> list[CompiledPoint]:
    """Return the rows of compiled.csv."""
    found = []
    for variant in session.variants:
        for cell in (c for c in session.grid if c in variant.compiled):
            visits = variant.compiled[cell]
            made = protocol.point(variant.name, session.spec.input_tokens, visits)
            slowest = max((r.compile_s for r in visits if r.compile_s), default=None)
            found.append(CompiledPoint(**{**vars(made), "compile_s": slowest}))
    return found


def _only_growth(session: Session) -> bool:
    """Whether tensors were counted at no point, so that the process's growth stands for them."""
    found = [r for v in session.variants for rs in v.results.values() for r in rs]
    return all(r.allocated_mib is None for r in found)


def run(spec: BenchmarkSpec, run: Run) -> dict[str, Any]:
    """Measure all variants and write points.csv, runs.csv and summary.json."""
    import platform
    from importlib.metadata import version

    import torch

    from core.model.precision import resolve_device

    began = time.monotonic()
    device = resolve_device(spec.device)
    session = Session(spec, run.progress, str(device))
    if spec.rates_only:
        rates = session.rates()
    else:
        with warm.template(str(device), run.progress.check_cancel) as session.template:
            rates = _measure(session, run)
    points = write(session, run, rates)
    run.progress.step(session.total, session.total, "Done.")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    Summary(
        device=str(device),
        device_name=gpu or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=version("transformers"),
        prompt=protocol.PROMPT,
        input_tokens=spec.input_tokens,
        sampling=Sampling(top_k=protocol.TOP_K, top_p=protocol.TOP_P),
        seed=spec.seed,
        random_weights=spec.random_weights,
        compiled=spec.compile,
        runs_asked=spec.runs,
        warmup_asked=spec.warmup,
        order=tuple(session.order),
        peak_memory="process growth" if _only_growth(session) else "tensors",
        memory_limit_mib=spec.memory_limit_mib,
        skipped=tuple(session.skipped),
        seconds=round(time.monotonic() - began, 1),
        variants=() if spec.rates_only else tuple(_measured(v, spec) for v in session.variants),
        rates=rates,
        analytic=results.accuracy(points),
    ).write(run)
    return {"points": len(points), "did_not_fit": sum(p.oom for p in points)}


def _measure(session: Session, run: Run) -> analytic.Rates | None:
    """Visit all variants in turn, writing what is known so far; return the device's rates."""
    order = protocol.visit_order([v.name for v in session.variants], session.spec.visits)
    for visit, name in order:
        session.visit(visit, next(v for v in session.variants if v.name == name))
        write(session, run, None)
    for visit, name in order if session.spec.compile else ():
        variant = next(v for v in session.variants if v.name == name)
        if not variant.uncompiled:
            session.visit(visit, variant, compiled=True)
            CompiledPoint.write(run, _compiled_points(session))
    return session.rates()


def _measured(variant: Variant, spec: BenchmarkSpec) -> MeasuredVariant:
    """Return what the summary holds of a variant."""
    return MeasuredVariant(
        name=variant.name,
        path=str(variant.folder),
        parameters=variant.info.parameters,
        blocks=variant.info.blocks,
        dtype=variant.dtype(spec),
        weight_bytes=variant.loaded.get("weight_bytes"),
        capacity_mib=variant.loaded.get("capacity_mib"),
        largest_batch=variant.largest,
        uncompiled=variant.uncompiled,
    )


def write(session: Session, run: Run, rates: analytic.Rates | None) -> list[Point]:
    """Write the results so far to points.csv and runs.csv; return the points."""
    points = _points(session, rates)
    Point.write(run, points)
    TimedRun.write(
        run,
        (
            TimedRun(
                variant=v.name,
                batch_size=c.batch_size,
                input_tokens=session.spec.input_tokens,
                output_tokens=c.output_tokens,
                visit=r.visit,
                run=n,
                latency_s=t,
                first_token_s=f,
            )
            for v in session.variants
            for c, visits in v.results.items()
            for r in visits
            for n, (t, f) in enumerate(zip(r.latencies_s, r.first_tokens_s, strict=True))
        ),
    )
    return points
