"""A short test of learning rates: a few steps from the same start with each of them.

All rates take the same steps on the same rows, with the warm-up and the schedule of the options, so
they differ in nothing else. The rate with the lowest held-out loss (or divergence, if the training
minimises it) is suggested; a training of many more steps usually wants that rate or a lower one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from core.model.memory import peak_memory_mib
from core.model.precision import dtype_name
from core.retrain import batches
from core.retrain.loss import moved
from core.retrain.recovery import Held, Recovery
from core.retrain.results import Data, Heldout, Rate, Settings, Summary
from core.retrain.session import Session
from core.retrain.spec import RANGE_ROWS, RANGE_SEQUENCES, RANGE_STEPS, RANGES, RetrainSpec
from core.retrain.trainer import schedule_of, with_kept

if TYPE_CHECKING:
    from core.runs.run import Run


def range_test(spec: RetrainSpec, run: Run) -> None:
    """Try each rate and write the table and the summary.

    Raises `InputError` for anything that the training itself would refuse.
    """
    session = Session(replace(spec, retention=False, also=(), questions=0, lr=None), run)
    settings = session.settings
    steps, batch = min(RANGE_STEPS, settings.steps), min(RANGE_SEQUENCES, settings.batch)
    lengths = [batches.length(sequence) for sequence in session.sequences]
    plan = batches.StepPlan(lengths, batch, 1, spec.seed)
    taken = [[session.sequences[i] for i in plan.indices(step)] for step in range(steps)]
    read = [row for packs in taken for pack in packs for row in pack]
    session.sequences = [pack for packs in taken for pack in packs]
    session.settings = replace(
        settings,
        steps=steps,
        batch=batch,
        micro_batch=min(batch, settings.micro_batch),
        warmup=-(-steps * settings.warmup // settings.steps),
    )
    session.rows = replace(session.rows, train=read, heldout=session.rows.heldout[:RANGE_ROWS])
    session.yardstick = replace(session.yardstick, rows=session.rows.heldout)
    session.measure_dense()
    model = session.load()
    trials = _Trials(session, model, taken)
    rates = RANGES["lora" if spec.method == "lora" else "weights"]
    rows = []
    for number, rate in enumerate(rates):
        run.progress.step(number, len(rates), f"{steps} steps at a learning rate of {rate:g}")
        held = trials.after(rate)
        result = Recovery(session.yardstick.loss, session.before, held)
        rows.append(
            Rate(
                rate=rate,
                heldout_loss=held.loss,
                heldout_kl=held.kl,
                recovered=result.recovered,
                recovered_kl=result.recovered_kl,
            )
        )
        run.progress.log(f"Learning rate {rate:g}: held-out loss {held.loss:.4f}.")
    Rate.write(run, rows)
    _summary(session, rows, trials).write(run)
    run.progress.step(len(rates), len(rates), "learning rates tried")


@dataclass
class _Trials:
    """Trainings of a few steps from one start."""

    session: Session
    model: Any
    taken: list[list[batches.Pack]]
    """The sequences of each step."""

    def __post_init__(self) -> None:
        self.start = {name: weight.detach().clone() for name, weight in self._trained()}
        self.tokens = sum(batches.length(pack) for packs in self.taken for pack in packs)
        self.seconds = 0.0

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((n, w) for n, w in self.model.named_parameters() if w.requires_grad)

    def after(self, rate: float) -> Held:
        """Return the model on the held-out rows after the steps at a peak rate of ``rate``."""
        session, settings = self.session, self.session.settings
        with torch.no_grad():
            for name, weight in self._trained():
                weight.copy_(self.start[name])
        torch.manual_seed(session.spec.seed)
        weights = [weight for _, weight in self._trained()]
        optimiser = torch.optim.AdamW(
            weights, rate, (0.9, settings.beta2), weight_decay=settings.weight_decay
        )
        schedule = schedule_of(session.spec.schedule, optimiser, settings.warmup, settings.steps)
        objective = session.objective()
        self.model.train()
        began = time.perf_counter()
        for packs in self.taken:
            items = sum(row.items for pack in packs for row in pack)
            for at in range(0, len(packs), settings.micro_batch):
                micro = packs[at : at + settings.micro_batch]
                made = moved(with_kept(micro, session.kept, session.below), session.device)
                objective(self.model, made | {"items": items})[0].backward()
            torch.nn.utils.clip_grad_norm_(weights, session.spec.clip or torch.inf)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            session.progress.check_cancel()
        self.seconds += time.perf_counter() - began
        return session.measure(self.model)


def _summary(session: Session, rows: list[Rate], trials: _Trials) -> Summary:
    spec, taken = session.spec, session.settings
    best = Rate.best(rows, by_kl=not session.goal.entropy)
    held = Held(best.heldout_loss, best.heldout_kl) if best else session.before
    result = Recovery(session.yardstick.loss, session.before, held)
    return Summary(
        state="done",
        method=spec.method,
        checkpoint=spec.checkpoint,
        dense=session.dense_name,
        **result.summary(),
        steps=taken.steps,
        settings=Settings(
            steps=taken.steps,
            batch=taken.batch,
            micro_batch=taken.micro_batch,
            lr=best.rate if best else None,
            warmup=taken.warmup,
            layout=taken.layout,
        ),
        parameters=session.info.parameters,
        tokens=len(rows) * trials.tokens,
        training_s=trials.seconds,
        tokens_per_s=len(rows) * trials.tokens / trials.seconds,
        seconds=time.monotonic() - session.started,
        peak_memory_mib=peak_memory_mib(session.device),
        device=str(session.device),
        dtype=dtype_name(session.precision.weights),
        compute_dtype=dtype_name(session.precision.arithmetic),
        seed=spec.seed,
        data=Data(
            **session.rows.data,
            kind=session.rows.kind,
            template=session.rows.template,
            rows=len(session.rows.train),
            cut=session.rows.cut,
            dropped=session.rows.dropped,
            sequences=len(session.sequences),
        ),
        heldout=Heldout(
            **session.rows.heldout_data,
            rows=len(session.rows.heldout),
            tokens=sum(row.items for row in session.rows.heldout),
        ),
    )
