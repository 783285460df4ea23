"""``python -m core live [CHECKPOINT]``: keep models in memory; answer for any skipped blocks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import Cancelled, DepthcutError
from core.live.replies import Measured, Part, Status, Waiting
from core.runs import processes
from core.runs.spec import DeviceOptions, option

if TYPE_CHECKING:
    from core.live.protocol import Generate, Perplexity, Tokens
    from core.live.server import Job
    from core.live.store import Loaded
    from core.runs.run import Run

POLL_S = 0.2
"""How often the process looks for cancel requests and queued runs while it is idle."""
PART_S = 0.1
"""Minimum seconds between reports of a partial perplexity."""
RESERVE_MIB = 2048
"""Memory of a GPU that is kept for activations and logits: a block of LLaMA-7B on 16,384 tokens in
16 bits takes over 1 GiB."""


@dataclass(frozen=True, kw_only=True)
class LiveSpec(DeviceOptions):
    """Keep models in memory and answer for any set of skipped blocks."""

    checkpoint: str = option(
        "",
        positional=True,
        help="Checkpoint to load at start: folder, run, Hub id, smollm2, or demo. Others load on "
        "demand.",
    )
    out: str = option("", help="Run directory to write. Default: a new one in the workspace.")
    memory: int | None = option(
        None,
        help="Max memory for models and hidden states. Default: what is free on a GPU, less a "
        "tenth of it (at least 2 GiB) for activations; half of the machine's memory on a CPU.",
        low=1,
        unit="MiB",
    )
    idle: int = option(1800, help="Shut down after this long without a request.", low=1, unit="s")


def budget_mib(kind: str, free_mib: float, total_mib: float) -> float:
    """Return the default budget of a device of ``kind`` (cpu, cuda or mps), in MiB.

    A GPU is there for the models: they may use what is free at the start, less a reserve for
    activations and logits, which are computed in bounded pieces (`core.live.whatif.CHUNK_TOKENS`):
    a tenth of the device and at least 2 GiB, but never more than half of what is free. So 24 GiB
    hold a 7B in 16 bits (13 GiB). A CPU's memory also serves all other programs: half of it.
    """
    if kind == "cpu":
        return total_mib / 2
    return free_mib - min(max(RESERVE_MIB, total_mib / 10), free_mib / 2)


def run(spec: LiveSpec, run: Run) -> None:
    """Serve until stopped, cancelled, or idle for too long."""
    from core.benchmark.meter import capacity_mib, free_mib
    from core.live.server import Server
    from core.live.store import Store
    from core.model.precision import resolve_device

    device = resolve_device(spec.device)
    total = capacity_mib(device)
    budget = float(spec.memory or budget_mib(device.type, free_mib(device, total), total))
    resident = Resident(spec, run, Store(device, spec.dtype, budget, run.progress.log))
    if spec.checkpoint:
        resident.store.get(spec.checkpoint)
    with Server(run.dir, resident.status) as resident.server:
        run.progress.log(f"Ready on {device}, using up to {budget:,.0f} MiB.")
        resident.serve()


class Resident:
    """The run's main loop: answers questions one by one, and gives way to queued runs."""

    server: Any

    def __init__(self, spec: LiveSpec, run: Run, store: Any) -> None:
        """Answer with the models of ``store``; at this point the run holds the device."""
        self.spec, self._run, self.store = spec, run, store
        self.answered = 0

    def status(self) -> Status:
        """Return the process's models, memory and state; may be called from any thread."""
        lock = self._run.device_lock
        return Status(
            models=tuple(self.store.names),
            memory_mib=round(self.store.used_mib, 1),
            budget_mib=round(self.store.budget_mib, 1),
            process_mib=round(processes.memory_mib(), 1),
            device=str(self.store.device),
            held=bool(lock and lock.held),
            situation=self.server.situation,
            waiting=self.server.waiting,
            answered=self.answered,
        )

    def serve(self) -> None:
        """Answer questions until a stop is requested or the idle time is over."""
        self._show("")
        while not self.server.stop_asked.is_set():
            self._run.progress.check_cancel()
            self._give_way()
            if self.server.unload_asked.is_set():
                self.store.clear()
                self._show("")
                self.server.unload_asked.clear()
            job = self.server.next(POLL_S)
            if job:
                self._answer(job)
                self.server.last_asked = time.monotonic()
            elif time.monotonic() - self.server.last_asked > self.spec.idle:
                self._run.progress.log(f"Shutting down: no request for {self.spec.idle} s.")
                return

    def _show(self, situation: str) -> None:
        """Report what is going on to waiting clients and on the run's card."""
        self.server.situation = situation
        held = ", ".join(self.store.names) or "no model loaded"
        idle = f"ready: {held}" if self._run.device_lock else "released the device to a queued run"
        self._run.progress.step(0, 0, situation or idle)

    def _give_way(self) -> None:
        """Free everything if another run is waiting for the device."""
        lock = self._run.device_lock
        if lock is None or not lock.held or not lock.waiting():
            return
        ahead = str(lock.waiting()[0].get("run") or "another run")
        self._run.progress.log(f"Releasing {self.store.device} to {ahead}.")
        self.store.clear()
        lock.release()
        self._run.device_lock = None
        self._run.write_status(device="")
        self._show("")

    def _take_back(self, job: Job) -> None:
        """Take the device again; the question queues with the runs."""
        from core.live.server import Gone

        lock = self._run.device_lock
        if lock is not None and lock.held:
            return

        def wait(ahead: str) -> None:
            self.server.situation = f"waiting for {self.store.device}, behind {ahead}"
            job.check()

        try:
            self._run.take_device(str(self.store.device), wait)
        except Gone:
            self._run.write_status(state="running", device="", waiting_for="")
            raise

    def _answer(self, job: Job) -> None:
        from core.live.server import Gone, Hurried
        from core.runs.failures import as_known

        try:
            self._take_back(job)
            self._show(f"answering for {job.question.checkpoint}")
            loaded = self._model(job)
            if job.kind == "perplexity":
                self._perplexity(job, loaded, job.question)
            elif job.kind == "tokens":
                self._tokens(job, loaded, job.question)
            else:
                self._generate(job, loaded, job.question)
            self.answered += 1
        except Gone:
            pass
        except Hurried:
            self.server.put(job)
        except Cancelled as error:
            job.fail(error)
            raise
        except DepthcutError as error:
            job.fail(error)
        except Exception as error:
            known = as_known(error)
            self._run.progress.log(f"Error: {known}")
            job.fail(known)
        self._show("")

    def _check(self, job: Job) -> None:
        self._run.progress.check_cancel()
        job.check()

    def _model(self, job: Job) -> Loaded:
        name = job.question.checkpoint

        def loading() -> None:
            self._check(job)
            self._show(f"loading {name}")
            job.emit(Waiting(why=f"loading {name}"))

        return self.store.get(name, loading)

    def _perplexity(self, job: Job, loaded: Loaded, ask: Perplexity) -> None:
        from core.live.server import Hurried
        from core.model.precision import dtype_name

        began = time.perf_counter()
        text, windows, total = loaded.text(ask, self.store.room_bytes())
        if ask.fresh:
            text.forget()
        reported = began

        def part(answer: Any) -> None:
            nonlocal reported
            if time.perf_counter() - reported >= PART_S and answer.windows < windows:
                reported = time.perf_counter()
                job.emit(
                    Part(
                        ppl=answer.ppl,
                        windows=answer.windows,
                        of=total,
                        dense_ppl=answer.dense_ppl,
                        stderr=answer.stderr,
                    )
                )

        def check() -> None:
            self._check(job)
            if not ask.quick and self.server.hurried:
                raise Hurried

        if ask.paired and ask.removal:
            text.answer((), check=check, windows=windows)
        answer = text.answer(ask.removal, part, check, windows)
        job.emit(
            Measured(
                ppl=answer.ppl,
                windows=answer.windows,
                of=total,
                dense_ppl=answer.dense_ppl,
                stderr=answer.stderr,
                predictions=answer.predictions,
                block_passes=answer.block_passes,
                seconds=time.perf_counter() - began,
                tokens_per_s=loaded.tokens_per_s,
                checkpoint_key=loaded.info.key,
                device=str(self.store.device),
                dtype=dtype_name(loaded.view.dtype),
            )
        )

    def _generate(self, job: Job, loaded: Loaded, ask: Generate) -> None:
        from core.live.writing import write

        def stop() -> bool:
            return job.gone.is_set() or self._run.cancel_requested()

        result = write(loaded, ask, job.emit, stop)
        self._check(job)
        job.emit(result)

    def _tokens(self, job: Job, loaded: Loaded, ask: Tokens) -> None:
        from core.live.reading import read

        job.emit(read(loaded, ask))
