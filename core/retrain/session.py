"""One retraining from spec to results: data, dense and pruned losses, training, writing."""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core import checkpoint
from core.errors import (
    Cancelled,
    CheckpointError,
    InputError,
    NotFiniteError,
    OptionError,
    OutOfMemoryError,
    OutputError,
    RunError,
)
from core.model import (
    dtype_name,
    load_model,
    load_tokenizer,
    peak_memory_mib,
    reset_peak_memory,
    resolve_device,
    resolve_dtype,
)
from core.retrain import diagnostics, rows, weights
from core.retrain.command import RetrainSpec, settings_of
from core.retrain.diagnostics import Finding
from core.retrain.loss import collate, heldout_loss
from core.retrain.recovery import Recovery
from core.retrain.trainer import (
    COMPLETE,
    MicroBatches,
    Objective,
    RetrainTrainer,
    StepWatcher,
    Stopped,
    arguments,
    complete_checkpoints,
)
from core.workspace import write_json, write_text

if TYPE_CHECKING:
    from core.run import Run

LARGE = 1_000_000_000
"""From so many parameters on, activations are recomputed by default."""


@dataclass(frozen=True)
class Precision:
    """What the weights are held in, and what is computed in (None: the same)."""

    weights: torch.dtype
    compute: torch.dtype | None


def precision(spec: RetrainSpec, device: torch.device, declared: Any) -> Precision:
    """Choose precision: trained weights in float32, computing in bfloat16 where a GPU has it.

    LoRA keeps the frozen weights in the checkpoint's precision. An explicit --dtype is taken for
    weights and computing alike. The CPU computes in float32, where it is fastest.
    """
    if spec.dtype != "auto":
        asked = resolve_dtype(spec.dtype, device)
        return Precision(asked, None if asked == torch.float32 else asked)
    if device.type == "cpu":
        return Precision(torch.float32, None)
    half = resolve_dtype("auto", device, {"dtype": "bfloat16"})
    if half != torch.bfloat16:
        return Precision(torch.float32, None)
    held = resolve_dtype("auto", device, declared) if spec.method == "lora" else torch.float32
    return Precision(held, torch.bfloat16)


class Session:
    """Everything that one retraining shares between its phases."""

    def __init__(self, spec: RetrainSpec, run: Run) -> None:
        """Check the spec and read the data; nothing is loaded yet."""
        self.spec, self.run, self.progress = spec, run, run.progress
        self.started = time.time()
        self.device = resolve_device(spec.device)
        self.folder = checkpoint.resolve(spec.checkpoint, run.progress)
        self.info = checkpoint.inspect(self.folder, allow_config_only=False)
        self.precision = precision(spec, self.device, {"dtype": self.info.dtype})
        self.dense_name, self.dense_folder = self._find_dense()
        encoder = rows.ModelTokenizer(load_tokenizer(self.folder), rows.config_eos(self.folder))
        self.rows = rows.prepare(spec, encoder, vocab=self.info.vocab, context=self.info.context)
        self.sequences = rows.sequences(
            self.rows.train, settings_of(spec, 1).layout, spec.cutoff, spec.seed
        )
        self.settings = settings_of(spec, len(self.sequences))
        self.findings: list[Finding] = []
        self.dense_loss: float | None = None
        self.teacher: Any = None
        self.before = 0.0
        self.checkpoints = run.book / "checkpoints"
        self._say_data()

    def _find_dense(self) -> tuple[str | None, Path | None]:
        """Return name and folder of the dense model; a source that is gone is no error."""
        name = self.spec.dense or weights.dense_of(self.folder)
        if name is None:
            found = None
        else:
            try:
                found = checkpoint.resolve(name, self.progress, need_tokenizer=False)
            except InputError:
                if self.spec.dense:
                    raise
                self.progress.log(f"The dense model {name} is not there; recovery is not stated.")
                found = None
        if found is None:
            if self.spec.distil:
                raise OptionError("--distil needs the dense model.", "Give it with --dense.")
            return None, None
        vocab = checkpoint.inspect(found).vocab
        if vocab != self.info.vocab:
            raise CheckpointError(
                f"The dense model has a vocabulary of {vocab:,}, the pruned one of "
                f"{self.info.vocab:,}.",
                "Give the model that the pruned one was cut from with --dense.",
            )
        return name, found

    def _say_data(self) -> None:
        data, settings = self.rows, self.settings
        self.progress.log(
            f"{len(data.train)} rows to train on ({data.kind}; {data.cut} cut at "
            f"{self.spec.cutoff} tokens, {data.dropped} left out), {len(data.heldout)} held out; "
            f"{settings.steps} steps of {settings.batch} sequences ({settings.layout})."
        )

    # --- resuming ---

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same for a resumed run to be the same run."""
        spec = asdict(self.spec)
        changeable = (
            "out", "resume", "dry_run", "device", "dtype", "micro_batch", "retry", "merge",
            "merge_dtype", "checkpoint", "dense", "data", "holdout_data", "gradient_checkpointing",
        )  # fmt: skip
        same = {k: v for k, v in spec.items() if k not in changeable}
        content = {
            "weights": self.info.key,
            "rows": self.rows.data,
            "heldout": len(self.rows.heldout),
        }
        return json.loads(json.dumps({**same, **content}))

    def resume_from(self) -> Path | None:
        """Return the checkpoint to go on from, after checking that it is of the same run.

        Without --resume, what an earlier attempt left is deleted.
        """
        marker = self.run.book / "training.json"
        if not self.spec.resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            write_json(marker, self.fingerprint())
            return None
        known = complete_checkpoints(self.checkpoints)
        if marker.is_file():
            before = json.loads(marker.read_text(encoding="utf-8"))
            for name, value in self.fingerprint().items():
                if before.get(name) != value:
                    raise OptionError(
                        f"--resume: {name} was {before.get(name)}, now it is {value}.",
                        "Resume with the same options, or start anew with another --out.",
                    )
        elif known:
            raise OutputError(
                f"{marker} is missing, so the checkpoints there cannot be told.",
                "Start anew with another --out.",
            )
        write_json(marker, self.fingerprint())
        if not known:
            self.progress.log("There is no checkpoint to resume from; starting at the beginning.")
            return None
        step, folder = known[-1]
        trim_metrics(self.run.book / "metrics.jsonl", step)
        self.progress.log(f"Going on after step {step}.")
        return folder

    # --- models ---

    def measure_dense(self) -> None:
        """Measure the dense model; keep it only as a teacher."""
        if self.dense_folder is None:
            return
        declared = checkpoint.read_config(self.dense_folder / "config.json")
        held = precision(self.spec, self.device, declared)
        dtype = held.compute or held.weights
        model = load_model(self.dense_folder, self.device, dtype)
        self.dense_loss = heldout_loss(model, self.rows.heldout, self.device, None, self.progress)
        self.progress.log(f"Dense model: held-out loss {self.dense_loss:.4f}.")
        if self.spec.distil:
            self.teacher = model

    def load(self) -> Any:
        """Load the pruned model, measure it, and make it ready to train."""
        model = load_model(self.folder, self.device, self.precision.weights)
        self.before = heldout_loss(
            model, self.rows.heldout, self.device, self.precision.compute, self.progress
        )
        self.progress.log(f"Pruned model: held-out loss {self.before:.4f}.")
        torch.manual_seed(self.spec.seed)
        if self.spec.method == "lora":
            model = weights.with_adapters(model, self.spec)
        else:
            model.requires_grad_(True)
        wanted = self.spec.gradient_checkpointing
        if wanted == "on" or (wanted == "auto" and self.info.parameters > LARGE):
            enable = getattr(model, "activation_checkpointing_enable", None)
            enable = enable or model.gradient_checkpointing_enable  # its name until transformers 5
            enable({"use_reentrant": False})
        return model

    def objective(self) -> Objective:
        """Return what is minimised."""
        return Objective(self.device, self.precision.compute, self.teacher, self.spec.kl_weight)

    # --- memory ---

    def largest_micro_batch(self, model: Any, below: int) -> int:
        """Return the largest micro-batch that fits, by trying the longest sequences."""
        longest = sorted(self.sequences, key=_length)[-below:]
        objective = self.objective()

        def fits(count: int) -> bool:
            batch = collate(longest[-count:])
            moved = {
                k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()
            }
            items = sum(row.items for rows_ in longest[-count:] for row in rows_)
            try:
                model.train()
                objective(model, moved | {"items": items})[0].backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return False
            finally:
                model.zero_grad(set_to_none=True)
                free_memory(self.device)
            return True

        return diagnostics.largest_that_fits(below, fits)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is one of the ways in which memory runs out."""
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def free_memory(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _length(sequence: rows.Sequence_) -> int:
    return sum(len(row.ids) for row in sequence)


def trim_metrics(path: Path, step: int) -> None:
    """Delete the lines after ``step``, which a resumed run writes again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if int(json.loads(line).get("step") or 0) <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    write_text(path, "".join(kept))


# --- the phases ---------------------------------------------------------------------------------


def retrain(spec: RetrainSpec, run: Run) -> None:
    """Carry out one retraining; see the module docstring and docs for the files it writes.

    Raises:
        InputError: options, data or checkpoints that cannot be used, before anything starts.
        Cancelled: on request, after the adapter was saved.
        NotFiniteError, RunError: training did not converge; the last good state was saved.
        OutOfMemoryError: names the largest micro-batch that fits.
    """
    session = Session(spec, run)
    resume = session.resume_from()
    reset_peak_memory(session.device)
    session.measure_dense()
    while True:
        model = session.load()
        note_gap(session)
        watcher = make_watcher(session, model)
        stopped = train(session, model, watcher, resume)
        if stopped is None or stopped.kind != "out-of-memory":
            break
        micro = session.settings.micro_batch
        finding = explain_memory(session, model)
        watcher.note(finding)
        del model, watcher
        free_memory(session.device)
        if not spec.retry or session.settings.micro_batch == micro:
            raise OutOfMemoryError(finding.message, finding.hint)
        done = complete_checkpoints(session.checkpoints)
        resume = done[-1][1] if done else None
        trim_metrics(run.book / "metrics.jsonl", done[-1][0] if done else -1)
        session.findings.append(finding)
        session.progress.log(f"Going on with a micro-batch of {session.settings.micro_batch}.")
    finish(session, model, watcher, stopped)


def note_gap(session: Session) -> None:
    """Say at the start if the gap is too large for the method."""
    gap = Recovery(session.dense_loss, session.before, session.before).gap
    finding = diagnostics.pruned_too_hard(session.spec.method, gap)
    if finding and finding not in session.findings:
        session.findings.append(finding)
        session.progress.log(str(finding))
        session.progress.metric(event="finding", step=0, kind=finding.kind, message=str(finding))


def make_watcher(session: Session, model: Any) -> StepWatcher:
    """Return the callback that reports, evaluates and saves."""

    def judge() -> float:
        return heldout_loss(
            model,
            session.rows.heldout,
            session.device,
            session.precision.compute,
            session.progress,
        )

    return StepWatcher(
        session.settings,
        session.progress,
        judge,
        dense=session.dense_loss,
        before=session.before,
        clip=session.spec.clip,
        memory=lambda: peak_memory_mib(session.device),
    )


def train(
    session: Session, model: Any, watcher: StepWatcher, resume: Path | None
) -> Finding | None:
    """Train to the end, a cancel request or a finding that stops; return that finding."""
    lengths = [_length(sequence) for sequence in session.sequences]
    settings = session.settings
    plan = rows.StepPlan(lengths, settings.batch, settings.accumulation, session.spec.seed)
    batches = MicroBatches(session.sequences, plan, settings.steps)
    args = arguments(session.spec, settings, session.checkpoints, session.device)
    trainer = RetrainTrainer(model, args, batches, session.objective())
    watcher.trainer = trainer
    trainer.add_callback(watcher)
    if resume is None:
        watcher.evaluate(0)
    else:
        record = json.loads((resume / COMPLETE).read_text(encoding="utf-8"))
        watcher.best = (record["best_step"], record["best_loss"])
        watcher.after = (record["step"], record["heldout_loss"] or session.before)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except Stopped as stop:
        return stop.finding
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Looked into by the caller: here the traceback still holds the activations.
        return diagnostics.out_of_memory(settings.micro_batch, session.spec.cutoff, 0)
    return next((f for f in watcher.findings if f.stop), None)


def explain_memory(session: Session, model: Any) -> Finding:
    """Find the largest micro-batch that fits, and set it for another try."""
    model.zero_grad(set_to_none=True)
    free_memory(session.device)
    micro = session.settings.micro_batch
    fitting = session.largest_micro_batch(model, micro)
    if fitting:
        accumulation = -(-session.settings.batch // fitting)
        session.settings = replace(session.settings, micro_batch=fitting, accumulation=accumulation)
    return diagnostics.out_of_memory(micro, session.spec.cutoff, fitting)


def finish(session: Session, model: Any, watcher: StepWatcher, stopped: Finding | None) -> None:
    """Write adapter, merged checkpoint, metrics and summary; then say how it ended."""
    spec, run = session.spec, session.run
    kept_step = watcher.after[0] if watcher.after else 0
    if stopped:
        kept_step = keep_last_good(session, model, watcher)
    session.findings += watcher.findings
    after = watcher.after[1] if watcher.after else session.before
    result = Recovery(session.dense_loss, session.before, after)
    if not stopped and not watcher.cancelled:
        finding = diagnostics.pruned_too_hard(spec.method, result.gap, result.recovered)
        if finding and result.recovered is not None:
            session.findings.append(finding)
            session.progress.log(str(finding))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = watcher.trainer.state.global_step
    if spec.method == "lora":
        weights.save_adapter(model, run.path("adapter"))
    peak = peak_memory_mib(session.device)
    merged = None
    # A cancelled run keeps what is quick to write; resuming it writes the rest.
    if (spec.merge or spec.method != "lora") and not watcher.cancelled:
        session.teacher = None
        watcher.trainer.model = watcher.trainer.model_wrapped = None
        watcher.trainer.optimizer = None
        free_memory(session.device)
        merged = weights.merge_and_save(
            model,
            session.folder,
            run.path("merged"),
            dtype=weights.merged_dtype(spec, session.info.dtype),
            rows=session.rows.heldout,
            device=session.device,
            compute=session.precision.compute,
        )
        session.progress.log(
            f"merged/ is {merged['dtype']}; its logits differ by at most "
            f"{merged['max_logit_difference']:.2g} from the trained model's."
        )
    write_results(session, watcher, result, steps, kept_step, trainable, peak, merged, stopped)
    if watcher.cancelled:
        raise Cancelled("Cancelled on request.", "--resume goes on from here.")
    if stopped:
        kind = NotFiniteError if stopped.kind == "nan" else RunError
        raise kind(stopped.message, f"The state of step {kept_step} was kept. {stopped.hint}")
    shutil.rmtree(session.checkpoints, ignore_errors=True)


def keep_last_good(session: Session, model: Any, watcher: StepWatcher) -> int:
    """Put the best evaluated state back (the start, if nothing was better); return its step."""
    step, loss = watcher.best
    folder = session.checkpoints / f"checkpoint-{step}"
    if step and (folder / COMPLETE).is_file():
        weights.load_trained(model, folder)
    else:
        step, loss = 0, session.before
        weights.reset(model, session.folder)
    watcher.after = (step, loss)
    return step


def write_results(
    session: Session,
    watcher: StepWatcher,
    result: Recovery,
    steps: int,
    kept_step: int,
    trainable: int,
    peak: float,
    merged: dict[str, Any] | None,
    stopped: Finding | None,
) -> None:
    """Write metrics.jsonl and summary.json."""
    spec, run, trainer = session.spec, session.run, watcher.trainer
    metrics = run.book / "metrics.jsonl"
    if metrics.is_file():
        write_text(run.path("metrics.jsonl"), metrics.read_text(encoding="utf-8"))
    state = "cancelled" if watcher.cancelled else "stopped" if stopped else "done"
    compute = session.precision.compute or session.precision.weights
    run.write_json(
        "summary.json",
        {
            "state": state,
            "method": spec.method,
            "checkpoint": spec.checkpoint,
            "dense": session.dense_name,
            **result.summary(),
            "measured_at_step": watcher.after[0] if watcher.after else 0,
            "kept_step": steps if state != "stopped" else kept_step,
            "steps": steps,
            "settings": asdict(session.settings),
            "loss_last_step": watcher.last_loss,
            "trainable_parameters": trainable,
            "parameters": session.info.parameters,
            "tokens": trainer.tokens,
            "training_s": watcher.training_s,
            "tokens_per_s": trainer.tokens / watcher.training_s if watcher.training_s else None,
            "seconds": time.time() - session.started,
            "peak_memory_mib": peak,
            "device": str(session.device),
            "dtype": dtype_name(session.precision.weights),
            "compute_dtype": dtype_name(compute),
            "seed": spec.seed,
            "data": {
                **session.rows.data,
                "kind": session.rows.kind,
                "rows": len(session.rows.train),
                "cut": session.rows.cut,
                "dropped": session.rows.dropped,
                "sequences": len(session.sequences),
            },
            "heldout": {
                **session.rows.heldout_data,
                "rows": len(session.rows.heldout),
                "tokens": sum(row.items for row in session.rows.heldout),
            },
            "merged": merged,
            "findings": [finding.to_dict() for finding in session.findings],
        },
    )
