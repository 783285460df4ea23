"""One visit of one variant in a separate process: ``python -m core.benchmark.worker``.

Reads one JSON request (`Request`) from the first line of standard input and exits when that pipe
closes; writes one JSON event per line: ``loaded``, ``cell``, ``run``, ``result``, ``skipped``,
``tensors``, ``largest``, ``rates``, ``uncompiled``, ``failed``. All other output goes to standard
error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import noise
from core.benchmark import meter
from core.benchmark.protocol import Cell
from core.benchmark.results import Limit
from core.checkpoint import config_rules, headers
from core.errors import DepthcutError, OutOfMemoryError
from core.runs.devices import MIB

if TYPE_CHECKING:
    import torch

LARGEST_TRIED = 65535
"""The largest batch tried; also the limit of ``--batch-sizes``. CUDA's attention kernels start one
row of blocks per sequence, and a grid has at most 65,535 of them."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The work of one worker."""

    folder: str
    device: str
    dtype: str
    random_weights: bool
    input_tokens: int
    warmup: int
    runs: int
    min_runs: int
    seed: int
    cells: tuple[tuple[int, int], ...] = ()
    """(batch size, output tokens), in order."""
    cell_limit_s: float | None = None
    search_limit_s: float | None = None
    """Time for finding the largest batch; None: unlimited."""
    memory_limit_mib: int | None = None
    count_tensors: bool = False
    """Also count the memory of tensors at every point if the device does not report it (CPU)."""
    find_largest: bool = False
    measure_rates: bool = False
    compiled: bool = False
    """Generate with a static cache and compiled steps; a point's first generation compiles."""


Emit = Callable[..., None]


def dtype_of(request: Request, device: torch.device) -> torch.dtype:
    """Return what the checkpoint's weights are held and computed in."""
    from core.model import precision

    return precision.decide(request.dtype, device, headers.inspect(request.folder).dtype).weights


def load(request: Request, device: torch.device) -> Any:
    """Load the checkpoint, or create a model with random weights from its config."""
    import torch

    from core.model import loading, memory

    folder = Path(request.folder)
    config = headers.read_config(folder / "config.json")
    dtype = dtype_of(request, device)
    if not request.random_weights:
        return loading.load_model(folder, device, dtype, check=False)
    chosen = loading.model_class(config)
    own = getattr(chosen, "config_class", None) is not None
    info = headers.inspect(folder)
    settings = loading.settings_of(config_rules.for_variant(config, tied=info.tied))
    before = torch.get_default_dtype()
    torch.manual_seed(request.seed)
    try:
        torch.set_default_dtype(dtype)
        with memory.out_of_memory_explained("making random weights"), device:
            made = (chosen._from_config if own else chosen.from_config)(settings)
    finally:
        torch.set_default_dtype(before)
    return made.to(device, dtype).eval().requires_grad_(False)


class Visit:
    """The measurements of one loaded model."""

    limit: Limit = ""
    """What the last work that did not fit ran into."""
    slowest_s = 0.0
    """Seconds of the latest cell's slowest generation."""

    def __init__(self, request: Request, emit: Emit) -> None:
        """Load what ``request`` names, under its memory limit."""
        from core.benchmark import generate
        from core.model import loading, memory, precision

        self.request, self.emit = request, emit
        self.measured: list[Cell] = []
        self.device = precision.resolve_device(request.device)
        generate.import_and_settle(self.device)
        tokenizer = None
        with contextlib.suppress(DepthcutError):  # before the meter: it is not part of the model
            tokenizer = loading.load_tokenizer(request.folder)
        self.meter = meter.MemoryMeter(self.device)
        if request.memory_limit_mib:
            meter.limit(self.device, request.memory_limit_mib)
        self.model = load(request, self.device)
        vocab = int(self.model.config.vocab_size)
        self.ids = generate.prompt_ids(tokenizer, vocab, request.input_tokens)
        emit(
            "loaded",
            device=str(self.device),
            dtype=precision.dtype_name(self.model.dtype),
            weight_bytes=memory.weight_bytes(self.model.parameters()),
            prompt_ids=self.ids,
            capacity_mib=request.memory_limit_mib or meter.capacity_mib(self.device),
        )

    def prompts(self, batch: int) -> torch.Tensor:
        """Return the prompt ``batch`` times: ``[batch, input tokens]``."""
        import torch

        return torch.tensor([self.ids], device=self.device).repeat(batch, 1)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Warm up, then time runs until there are enough or the cell's time limit is reached."""
        from core.benchmark import generate
        from core.benchmark.utilisation import UtilisationSampler

        request, ids = self.request, self.prompts(cell.batch_size)
        compiled = request.compiled
        config = generate.force_length(self.model, cell.output_tokens, compiled=compiled)
        limit = request.cell_limit_s or float("inf")
        compile_s = None
        if compiled:
            began = time.perf_counter()
            generate.timed(self.model, ids, config)
            compile_s = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(request.warmup):
            generate.timed(self.model, ids, config)
            if time.perf_counter() - began > limit / 3:
                break
        times: list[tuple[float, float]] = []
        self.meter.reset()
        sampler = UtilisationSampler(self.device)
        sampler.start()
        try:
            while len(times) < request.runs:
                times.append(generate.timed(self.model, ids, config))
                self.emit("run", latency_s=times[-1][0])
                if len(times) >= request.min_runs and time.perf_counter() - began > limit:
                    break
        finally:
            sampler.stop()
        peaks = self.meter.read()
        return {
            "latencies_s": [t for t, _ in times],
            "first_tokens_s": [f for _, f in times],
            **dataclasses.asdict(peaks),
            "utilisation_pct": sampler.samples,
            "compile_s": compile_s,
        }

    def fits(self, work: Callable[[], Any]) -> tuple[bool, Any]:
        """Do ``work`` and return (True, result), or (False, None) if it is too large.

        Too large means that memory ran out, or that no GPU kernel takes a batch of this size;
        `limit` then tells which.
        """
        from core.model import memory

        self.limit = ""
        try:
            with memory.out_of_memory_explained("generating"):
                return True, work()
        except OutOfMemoryError:
            self.limit = "memory"
        except RuntimeError as error:
            if not any(sign in str(error).lower() for sign in memory.BEYOND_LAUNCH):
                raise
            self.limit = "kernels"
        memory.free_memory(self.device)
        return False, None

    def cells(self) -> int:
        """Measure every cell, skipping larger ones after running out; return the largest batch."""
        full: list[Cell] = []
        largest = 0
        for batch, output in self.request.cells:
            cell = Cell(batch, output)
            if any(c.batch_size <= batch and c.output_tokens <= output for c in full):
                self.emit("skipped", **dataclasses.asdict(cell))
                continue
            self.emit("cell", **dataclasses.asdict(cell))
            ok, result = self.fits(lambda cell=cell: self.measure(cell))  # type: ignore[misc]
            if ok:
                largest = max(largest, batch)
                self.measured.append(cell)
                self.slowest_s = max(result["latencies_s"])
            else:
                full.append(cell)
            found = {"oom": not ok, "limit": self.limit, **(result or {})}
            self.emit("result", **dataclasses.asdict(cell), **found)
        return largest

    def tensors(self) -> None:
        """Report each point's peak of tensors: weights, cache, activations, sampling."""
        from core.model import memory

        held = memory.weight_bytes(self.model.state_dict().values())
        for cell in self.measured:
            count = functools.partial(self._tensors_beside_weights, cell)
            ok, most = self.fits(count)
            if ok:
                mib = (held + most) / MIB
                self.emit("tensors", **dataclasses.asdict(cell), allocated_mib=mib)

    def _tensors_beside_weights(self, cell: Cell) -> int:
        """Return a generation's peak bytes: of the prompt's pass or of the last two steps."""
        from core.benchmark import generate

        ids, one = self.prompts(cell.batch_size), generate.force_length(self.model, 1)
        prompt = meter.tensor_peak(lambda: generate.timed(self.model, ids, one))
        if cell.output_tokens == 1:
            return prompt
        filled: list[Any] = []
        last = meter.tensor_peak(
            lambda: self.end(ids, filled),
            before=lambda: filled.append(self.fill(ids, len(self.ids) + cell.output_tokens - 3)),
        )
        return max(prompt, last)

    def fill(self, ids: torch.Tensor, tokens: int) -> Any:
        """Return a cache of ``tokens`` tokens per sequence.

        It is filled in chunks of the prompt's length, which takes a tenth of the time of
        generation and the same memory.
        """
        import torch

        from core.model.caching import cache_name

        cache, name = None, cache_name(self.model)
        with torch.inference_mode():
            while tokens > 0:
                chunk = ids[:, :tokens]
                held = {name: cache, "use_cache": True}
                out = self.model(chunk, **held, logits_to_keep=1)
                cache, tokens = out[name], tokens - chunk.shape[1]
        return cache

    def end(self, ids: torch.Tensor, cache: Sequence[Any]) -> bool:
        """Generate the last two tokens on a filled cache, the first item of ``cache``.

        Two, because the scores of the second-to-last step are still allocated in the last one.
        """
        import torch

        from core.benchmark import generate
        from core.model.caching import cache_name

        whole = ids[:, :1].repeat(1, cache[0].get_seq_length() + 1 if cache[0] else 1)
        with torch.inference_mode():
            self.model.generate(
                whole,
                attention_mask=torch.ones_like(whole),
                generation_config=generate.force_length(self.model, 2),
                **{cache_name(self.model): cache[0]},
            )
        return True

    def holds(self, batch: int, output: int) -> bool:
        """Whether the end of a generation fits: full cache, one prompt pass, one sampling step."""

        def work() -> bool:
            ids = self.prompts(batch)
            return self.end(ids, [self.fill(ids, len(self.ids) + output - 3)])

        return self.fits(work)[0]

    def _generate(self, batch: int, config: Any) -> None:
        """Generate once with ``batch`` sequences."""
        from core.benchmark import generate

        generate.timed(self.model, self.prompts(batch), config)

    def largest(self, start: int) -> None:
        """Find the largest batch that fits by doubling and bisection, confirmed by generating.

        ``start`` is a batch that fits, or 0. The search ends before a try that would presumably
        exceed its time limit: tries take time in proportion to the batch, or less.
        """
        from core.benchmark import generate

        output = max(o for _, o in self.request.cells)
        end = time.perf_counter() + (self.request.search_limit_s or float("inf"))

        def has_time(seconds: float) -> bool:
            return time.perf_counter() + seconds <= end

        low, fails, limit = 0, None, ""
        batch, last = max(1, start), (1, 0.0)
        while batch and has_time(last[1] * batch / last[0]):
            began = time.perf_counter()
            if self.holds(batch, output):
                low, last = batch, (batch, time.perf_counter() - began)
            else:
                fails, limit = batch, self.limit
            batch = _next_batch(low, fails)
        if batch:
            limit = "time"
        elif fails is None:
            fails, limit = LARGEST_TRIED + 1, "kernels"
        config = generate.force_length(self.model, output)
        confirmed = False
        while low and not confirmed and has_time(self.slowest_s * max(1.0, low / max(1, start))):
            work = functools.partial(self._generate, low, config)
            confirmed = self.fits(work)[0]
            if not confirmed:
                fails, limit = low, self.limit
                low -= max(1, low // 32)
        self.emit(
            "largest", batch_size=low, fails_at=fails, output_tokens=output, limit=limit,
            confirmed=confirmed or not low,
        )  # fmt: skip


def _next_batch(low: int, fails: int | None) -> int:
    """Return the batch to try after ``low`` fits and ``fails`` does not; 0 to stop."""
    if fails is None:
        return 0 if low == LARGEST_TRIED else min(2 * low, LARGEST_TRIED)
    return (low + fails) // 2 if fails - low > max(1, low // 32) else 0


def work(request: Request, emit: Emit) -> None:
    """Execute a request, reporting every step to ``emit``; rates are measured last."""
    from core.model import memory, precision

    if request.cells:
        visit = Visit(request, emit)
        try:
            largest = visit.cells()
        except DepthcutError:
            raise
        except Exception as error:
            if not request.compiled:
                raise
            # a compiler that is missing, or a model that it cannot take, must not end the run
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            emit("uncompiled", reason=f"{type(error).__name__}: {reason.strip()}"[:300])
            return
        if request.count_tensors and visit.device.type == "cpu":
            visit.tensors()
        if request.find_largest:
            visit.largest(largest)
        device = visit.device
        del visit
        memory.free_memory(device)
    if request.measure_rates:
        from core.benchmark import rates

        device = precision.resolve_device(request.device)
        found = rates.measure(device, dtype_of(request, device))
        emit("rates", **dataclasses.asdict(found))


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """Serve one request and return 0, or the exit status of the error."""
    noise.silence()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: str, **values: Any) -> None:
        events.write(json.dumps({"event": event, **values}) + "\n")
        events.flush()

    request = Request(**json.loads(sys.stdin.readline()))
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        work(request, emit)
    except DepthcutError as error:
        oom = isinstance(error, OutOfMemoryError)
        emit("failed", message=error.message, hint=error.hint, oom=oom, status=error.exit_status)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.stderr.flush()
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a daemon thread waits on standard input
