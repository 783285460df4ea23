"""transformers' Trainer with given micro-batches, checked after every step.

The loss of an optimiser step is the mean over all its predicted tokens and does not depend on the
micro-batch size.
A `StepWatcher` clips, reports and checks every step, evaluates and asks for checkpoints; a cancel
request lets the step finish and saves. Checkpoints lie in the run's bookkeeping folder, and only
those with a ``complete.json`` count.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from core import words
from core.errors import Cancelled
from core.retrain import (
    diagnostics,
    head,
    results,
    row_cache,
    sharded,
    split_files,
    states,
    teacher,
    tracking,
    weights,
)
from core.retrain.batches import Pack, StepPlan
from core.retrain.diagnostics import Finding
from core.retrain.loss import autocast, causal_of, collate, kl_sum, predicted_states
from core.retrain.recovery import Held, Recovery
from core.retrain.results import Evaluation, Saved, Step
from core.retrain.spec import Goal, RetrainSpec, Settings
from core.runs.progress import Progress
from core.runs.ranks import ALONE, Ranks
from core.runs.workspace import write_json

COMPLETE = Saved.FILE
SCHEDULES = {"constant": "constant_with_warmup"}
"""transformers' names of schedules that it calls otherwise."""
EVALUATION_SHARE = 0.1
"""Most of the training time that evaluations take unless their interval is given."""


class Stopped(Exception):
    """Training stopped before taking a step; carries the finding that explains why."""

    def __init__(self, finding: Finding) -> None:
        """Keep ``finding``."""
        super().__init__(finding.message)
        self.finding = finding


class MicroBatches(Dataset):
    """All micro-batches of a training in order: ``steps`` times ``accumulation``.

    If several processes share the steps, each takes an equal number of every step's.
    """

    def __init__(
        self,
        sequences: Sequence[Pack],
        plan: StepPlan,
        steps: int,
        kept: row_cache.Cache | None = None,
        below: states.Below | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Take ``sequences`` in the order of ``plan``, with what was ``kept`` of the teacher.

        ``below``: the states that enter the first trained block.
        """
        self._sequences = sequences
        self._plan = plan
        self._ranks, self._each = ranks, plan.accumulation // ranks.size
        self._count = steps * self._each
        self._items = [sum(row.items for row in rows) for rows in sequences]
        self._kept, self._below = kept, below
        reads = kept is not None or below is not None
        self._get = teacher.read_ahead(self._made, self._count) if reads else self._made

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one collated micro-batch and ``items``, the predicted tokens of its whole step."""
        return self._get(index)

    def _made(self, index: int) -> dict[str, Any]:
        step, turn = divmod(index, self._each)
        parts = self._plan.step(step)
        part = parts[turn * self._ranks.size + self._ranks.rank]
        batch = with_kept([self._sequences[i] for i in part], self._kept, self._below)
        return batch | {"items": sum(self._items[i] for chosen in parts for i in chosen)}


def with_kept(
    packs: Sequence[Pack], kept: row_cache.Cache | None, below: states.Below | None = None
) -> dict[str, Any]:
    """Return a collated micro-batch, with what was kept on disk of the teacher and of states."""
    return collate(packs) | (kept.of(packs) if kept else {}) | (below.of(packs) if below else {})


@dataclass(frozen=True)
class Objective:
    """The training objective: cross entropy, KL(teacher || model), or both.

    The teacher's distributions are kept ones, which come with the batch, or those of ``teacher``.
    """

    device: torch.device
    compute: torch.dtype | None = None
    teacher: Any = None
    goal: Goal = Goal(True, 0.0, 0)

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the objective and the loss alone of a micro-batch, as parts of its step's mean."""
        return sharded.within(model, lambda: self._computed(model, batch))

    def _computed(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.compute, model):
            hidden, targets = predicted_states(model, batch)
            wanted = self._wanted(batch)

            def of(logits: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
                return self._losses(logits, targets[piece], wanted(piece), batch["items"])

            output = causal_of(model).lm_head
            found = head.in_pieces(hidden, output, of, self.compute)
            if found is None:
                found = of(output(hidden).float(), slice(None))
        return found[0], found[1].detach()

    def _losses(
        self, logits: Tensor, targets: Tensor, wanted: Any, items: int
    ) -> tuple[Tensor, Tensor]:
        """Return the objective and the loss alone of some tokens of a step of ``items`` tokens."""
        with torch.set_grad_enabled(self.goal.entropy and torch.is_grad_enabled()):
            loss = functional.cross_entropy(logits, targets, reduction="sum") / items
        if not self.goal.kl_weight:
            return loss, loss
        kl = kl_sum(logits, wanted) if self.goal.is_live else teacher.kl_kept(logits, *wanted)
        divergence = self.goal.kl_weight * kl / items
        return loss + divergence if self.goal.entropy else divergence, loss

    def _wanted(self, batch: dict[str, Any]) -> Callable[[slice], Any]:
        """Return the teacher's logits, or what was kept of them, as a function of the tokens."""
        if not self.goal.kl_weight:
            return lambda piece: None
        if self.teacher is None:
            return lambda piece: [batch[name][piece] for name in teacher.NAMES]
        whole = {name: value for name, value in batch.items() if name != "states"}
        with torch.no_grad():
            found, _ = sharded.within(self.teacher, lambda: predicted_states(self.teacher, whole))

        def logits(piece: slice) -> Tensor:
            with torch.no_grad(), autocast(self.device, self.compute):
                return causal_of(self.teacher).lm_head(found[piece]).float()

        return logits


class RetrainTrainer(Trainer):
    """A Trainer with given micro-batches and a given objective.

    In float16 the loss is scaled (Micikevicius et al., arXiv 1710.03740, section 3.2), because
    small gradients would become zero. accelerate's optimiser then skips steps whose gradients
    overflow and adjusts the scale, and Trainer saves the scale with each checkpoint.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        batches: MicroBatches,
        objective: Objective,
        ranks: Ranks = ALONE,
    ) -> None:
        """Train ``model``, which may be split among ``ranks``, on ``batches``."""
        super().__init__(model=model, args=args, train_dataset=batches)
        self.ranks = ranks
        self.is_split = sharded.is_split(model)
        """Whether each process holds a part of weights, gradients and optimiser states."""
        self.remove_callback(PrinterCallback)  # standard output is for results
        self._objective = objective
        self.scaler = None
        """Scales the loss; only in float16."""
        if objective.compute == torch.float16:
            # accelerate itself makes one only for devices that it knows to compute in float16
            self.scaler = torch.amp.GradScaler(objective.device.type)
            self.accelerator.scaler = self.scaler
        self.step_loss = torch.zeros((), device=objective.device)
        self.tokens = 0
        """Non-padding tokens computed since the start, by all processes."""
        self.fresh = 0
        """Those of the step under way, by this process."""

    def get_train_dataloader(self) -> DataLoader:
        """Return the micro-batches in order; the generator leaves torch's global one untouched."""
        return DataLoader(
            self.train_dataset, batch_size=1, collate_fn=_only, generator=torch.Generator()
        )

    def training_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Compute one micro-batch and add to the gradients."""
        if not model.training:  # iterating over all modules is slow for a small model
            model.train()
        inputs = self._prepare_inputs(inputs)
        objective, loss = self._objective(model, inputs)
        (self.scaler.scale(objective) if self.scaler else objective).backward()
        self.step_loss += loss
        self.fresh += inputs["tokens"]
        return loss

    def join(self) -> None:
        """Complete a step: add up gradients, loss and tokens of all processes."""
        ranks = self.ranks
        if ranks.size > 1:
            if not self.is_split:  # otherwise its parts are added up after every block
                params = (p.grad for p in self.model.parameters() if p.grad is not None)
                ranks.sum_all_(params)
            parts = ranks.gather((float(self.step_loss), self.fresh))
            self.step_loss.fill_(sum(loss for loss, _ in parts))
            self.fresh = sum(tokens for _, tokens in parts)
        self.tokens += self.fresh
        self.fresh = 0

    def clip(self, most: float) -> float:
        """Scale the gradients to a norm of at most ``most``; return the norm before."""
        if self.is_split:
            return sharded.clip_(self.model.parameters(), most, self.ranks)
        wanted = [p for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(wanted, most))

    def unscale(self) -> float:
        """Divide the gradients by the loss scale; return the scale, 1 without scaling."""
        if self.scaler is None:
            return 1.0
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer.optimizer)  # the one that accelerate's wrapper steps
        return float(scale)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: Trainer would count all parameters again in every micro-batch."""
        return 0

    # --- checkpoints: of a split model, all processes take part and the first one writes ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.is_split or self.ranks.is_first:
            super()._save_checkpoint(model, trial)
            return
        folder = self._get_output_dir(trial)
        self._save(folder)
        self._save_optimizer_and_scheduler(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.is_split:
            super()._save(output_dir, state_dict)
            return
        split_files.write(self.model, Path(output_dir or self.args.output_dir), self.ranks)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_split:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        split_files.write_optimiser(self.optimizer, Path(output_dir) / OPTIMIZER_NAME, self.ranks)
        if self.ranks.is_first:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_split:
            weights.load_trained(self.model, Path(resume_from_checkpoint))
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_split or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
        if state.is_file() and schedule.is_file():
            split_files.load_optimiser(self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))


def _only(batch: list[dict[str, Any]]) -> dict[str, Any]:
    return batch[0]


class OneDevice(TrainingArguments):
    """Trainer's arguments for one given device; transformers itself always takes the first GPU."""

    def __init__(self, chosen: torch.device, **options: Any) -> None:
        """Train on ``chosen``; ``options`` are those of `TrainingArguments`."""
        self._chosen = chosen
        super().__init__(use_cpu=chosen.type == "cpu", **options)

    @property
    def device(self) -> torch.device:
        """The chosen device; CUDA's current device and accelerate's state are set to it as well."""
        _ = super().device  # the first time, this sets both to the first GPU
        if self._chosen.type == "cuda":
            torch.cuda.set_device(self._chosen)
            if self.distributed_state is not None:
                self.distributed_state.device = self._chosen
        return self._chosen

    @property
    def n_gpu(self) -> int:
        """1 on a GPU: no DataParallel on machines with several."""
        return min(1, super().n_gpu)


def arguments(
    spec: RetrainSpec,
    settings: Settings,
    folder: Path,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> TrainingArguments:
    """Return Trainer's arguments for one device; `StepWatcher` drives the steps.

    Of several processes each has a Trainer of its own, which knows nothing of the others.
    """
    # Fused AdamW updates all weights in one pass instead of several.
    fused = device.type in ("cuda", "cpu") and torch.__version__ >= "2.4"
    return OneDevice(
        device,
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulation // ranks.size,
        learning_rate=settings.lr,
        lr_scheduler_type=SCHEDULES.get(spec.schedule, spec.schedule),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=0.0,
        optim="adamw_torch_fused" if fused else "adamw_torch",
        seed=spec.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to=(list(spec.report_to) if ranks.is_first else []) or "none",
        run_name=Path(spec.out).resolve().name,
        project=tracking.PROJECT,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def schedule_of(name: str, optimiser: Any, warmup: int, steps: int) -> Any:
    """Return the schedule that Trainer has for ``name`` of the options."""
    return get_scheduler(
        SCHEDULES.get(name, name), optimiser, num_warmup_steps=warmup, num_training_steps=steps
    )


def time_left(
    step: int, settings: Settings, step_s: float, evaluation_s: float, after: int = 0
) -> float:
    """Return the seconds left once ``step`` is taken but not yet evaluated.

    ``step_s`` and ``evaluation_s`` are what a step and an evaluation take; ``after`` is the number
    of evaluations that follow the training, e.g. of the merged checkpoint.
    """
    every = settings.eval_every
    evaluations = settings.steps // every - (step - 1) // every + (settings.steps % every > 0)
    training_s = (settings.steps - step) * step_s
    during_s = evaluations * evaluation_s
    if settings.sparing:  # the last one always takes place
        during_s = min(during_s, evaluation_s + EVALUATION_SHARE * training_s)
    return training_s + during_s + after * evaluation_s


class StepWatcher(TrainerCallback):
    """Clips, reports and checks every step; evaluates, saves, stops."""

    def __init__(
        self,
        settings: Settings,
        progress: Progress,
        measure: Callable[[], Held],
        *,
        dense: float | None,
        before: Held,
        clip: float,
        memory: Callable[[], float],
        computed: str = "float32",
        evaluations_after: int = 0,
        evaluation_s: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        """Take the settings of one training.

        ``measure`` returns the model in training on the held-out rows, in all processes at once;
        ``computed`` is the format that a step computes in; ``evaluations_after`` follow the
        training, and one has taken ``evaluation_s``.
        """
        self.ranks = ranks
        """The processes that share every step and evaluation; the first saves and decides."""
        self.computed, self.evaluations_after = computed, evaluations_after
        self.evaluation_s = evaluation_s
        """What the latest evaluation took."""
        self.evaluations_s = 0.0
        """What all evaluations of this process after the first have taken."""
        self._begun: tuple[int, float] | None = None
        """Steps taken and seconds trained after this process's first step, which warms up."""
        self.trainer: RetrainTrainer
        self.settings, self.progress, self.measure = settings, progress, measure
        self.dense, self.before, self.clip, self.memory = dense, before, clip, memory
        self.watch = diagnostics.Watch(dense)
        self.findings: list[Finding] = []
        self.after: tuple[int, Held] | None = None
        """Step and result of the latest evaluation."""
        self.best: tuple[int, Held] = (0, before)
        """Step and result of the evaluation with the lowest held-out loss."""
        self.cancelled = False
        self.training_s = 0.0
        self.last_loss: float | None = None
        self._since = 0.0
        self._step: tuple[float, float, float | None] = (math.nan, math.nan, None)
        """Loss, learning rate and gradient norm of the step under way; no norm if it is skipped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and clip the gradient; raise `Stopped` before a step that is not finite.

        With a loss scale above 1, a gradient that is not finite means that the scale is too large.
        """
        self.trainer.join()
        scale = self.trainer.unscale()
        grad_norm = self.trainer.clip(self.clip or math.inf)
        loss = float(self.trainer.step_loss)
        self.trainer.step_loss.zero_()
        lr = kwargs["lr_scheduler"].get_last_lr()[0]
        if scale > 1 and math.isfinite(loss) and not math.isfinite(grad_norm):
            self.progress.log(
                f"Step {state.global_step + 1} skipped: its gradients overflow float16 with a loss "
                f"scale of {scale:g}. The scale is halved."
            )
            self._step, self.last_loss = (loss, lr, None), loss
            return
        finding = diagnostics.not_finite(state.global_step + 1, loss, grad_norm, self.computed)
        if finding:
            self.note(finding)
            raise Stopped(finding)
        self._step = (loss, lr, grad_norm)
        self.last_loss = loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the finished step; evaluate and save if due; stop after a cancel request."""
        self._stop_clock()
        step = state.global_step
        speed = self.trainer.tokens / max(self.training_s, 1e-9)
        loss, lr, grad_norm = self._step
        done = Step(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=self.trainer.tokens,
            tokens_per_s=speed,
            memory_mib=self.memory(),
        )
        results.report(self.progress, done)
        if args.report_to:
            self.trainer.log(tracking.of_step(done))
        for finding in [] if grad_norm is None else self.watch.feed(step, loss, grad_norm):
            self.note(finding)
        try:
            self.progress.step(
                step,
                self.settings.steps,
                f"step {step:,}, loss {loss:.3f}",
                left_s=self._left(step),
            )
        except Cancelled:
            self.cancelled = True
        stop = any(f.stop for f in self.findings)
        last = step >= self.settings.steps
        timely = self._is_time_to_evaluate(step)
        self.cancelled, timely = self.ranks.first((self.cancelled, timely))
        if not self.cancelled and (stop or last or timely):
            try:
                self.evaluate(step)
            except Cancelled:
                self.cancelled = True
        due = last or step % self.settings.eval_every == 0
        writes = self.ranks.is_first or self.trainer.is_split
        control.should_save = (self.cancelled or (due and not stop)) and writes
        control.should_training_stop = control.should_training_stop or self.cancelled or stop
        self._since = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete, and delete all others except the best."""
        if not self.ranks.is_first:
            self._since = time.perf_counter()
            return
        root = Path(args.output_dir)
        newest = root / f"checkpoint-{state.global_step}"
        known = self.after[1] if self.after and self.after[0] == state.global_step else None
        if known is not None and known.loss < self.best[1].loss:
            self.best = (state.global_step, known)
        saved = Saved(
            step=state.global_step,
            heldout_loss=known.loss if known else None,
            heldout_kl=known.kl if known else None,
            tokens=self.trainer.tokens,
            training_s=self.training_s,
            best_step=self.best[0],
            best_loss=self.best[1].loss,
            best_kl=self.best[1].kl,
        )
        write_json(newest / COMPLETE, saved.to_dict())
        for folder in root.glob("checkpoint-*"):
            if folder not in (newest, root / f"checkpoint-{self.best[0]}"):
                shutil.rmtree(folder, ignore_errors=True)
        self._since = time.perf_counter()

    def evaluate(self, step: int) -> None:
        """Measure held-out loss and divergence, and report them with the recovered shares.

        Before the first step, the model is what it was when it was loaded and measured.
        """
        held = self.before
        if step:
            began = time.perf_counter()
            held = self.measure()
            self.evaluation_s = time.perf_counter() - began
            self.evaluations_s += self.evaluation_s
        self.after = (step, held)
        loss, result = held.loss, Recovery(self.dense, self.before, held)
        found = Evaluation(
            step=step,
            heldout_loss=loss if math.isfinite(loss) else None,
            heldout_loss_dense=self.dense,
            heldout_loss_before=self.before.loss,
            recovered=result.recovered,
            heldout_kl=held.kl if held.kl is not None and math.isfinite(held.kl) else None,
            recovered_kl=result.recovered_kl,
        )
        results.report(self.progress, found)
        if self.trainer.args.report_to and step:  # trackers begin with the training
            self.trainer.log(tracking.of_evaluation(found))
        share = (
            ""
            if result.recovered is None
            else f", {words.percent(result.recovered)} of the gap recovered"
        )
        if result.recovered_kl is not None:
            share += f", {words.percent(result.recovered_kl)} of the KL"
        self.progress.log(f"Step {step}: held-out loss {loss:.4f}{share}.")
        for finding in self.watch.evaluated(step, self.before.loss, loss):
            self.note(finding)

    def _is_time_to_evaluate(self, step: int) -> bool:
        """Whether an evaluation is due and, unless its interval was given, takes its share."""
        if step % self.settings.eval_every:
            return False
        taken = self.evaluations_s + self.evaluation_s
        return not self.settings.sparing or taken <= EVALUATION_SHARE * self.training_s

    def note(self, finding: Finding) -> None:
        """Log a finding and store it."""
        self.findings.append(finding)
        self.progress.log(str(finding))
        results.report(self.progress, results.notice(finding))

    def _left(self, step: int) -> float | None:
        """Return the seconds left; None before the second step of this process."""
        self._begun = self._begun or (step, self.training_s)
        first, spent = self._begun
        if step == first:
            return None
        step_s = (self.training_s - spent) / (step - first)
        return time_left(step, self.settings, step_s, self.evaluation_s, self.evaluations_after)

    def _stop_clock(self) -> None:
        self.training_s += time.perf_counter() - self._since


def complete_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Return step and folder of every completely written checkpoint, oldest first."""
    found = []
    for folder in root.glob("checkpoint-*"):
        if saved := Saved.read(folder):
            found.append((saved.step, folder))
    return sorted(found)
