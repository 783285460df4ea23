"""One retraining from spec to results: measure, train, and write the results."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import Cancelled, NotFiniteError, OutOfMemoryError, RunError
from core.model.loading import load_model
from core.model.memory import free_memory, is_out_of_memory, peak_memory_mib, reset_peak_memory
from core.model.precision import dtype_name
from core.model.quantized_weights import free, is_quantized
from core.prune.results import Pruning
from core.retrain import batches, diagnostics, model_card, sharded, tracking, weights
from core.retrain.diagnostics import Finding
from core.retrain.estimate import with_micro_batch
from core.retrain.loss import heldout_loss
from core.retrain.recovery import Held, Recovery
from core.retrain.results import Data, Heldout, Measure, Merged, Saved, Settings, Summary
from core.retrain.session import Session, trim_metrics
from core.retrain.spec import RetrainSpec
from core.retrain.trainer import (
    MicroBatches,
    RetrainTrainer,
    StepWatcher,
    Stopped,
    arguments,
    complete_checkpoints,
)
from core.runs.workspace import write_text

if TYPE_CHECKING:
    from core.runs.run import Run


def retrain(spec: RetrainSpec, run: Run) -> None:
    """Carry out one retraining and write its results to the run directory.

    Raises:
        InputError: options, data or checkpoints are not usable; nothing has started yet.
        Cancelled: the run was cancelled; the adapter is saved.
        NotFiniteError, RunError: training did not converge; the last good state is saved.
        OutOfMemoryError: the message names the largest micro-batch that fits.
    """
    earlier = run.ranks.first(Summary.read(run.dir))
    if spec.resume and earlier and earlier.state == "done":
        if run.ranks.is_first:
            finished(spec, run, earlier)
        return
    session = Session(spec, run)
    resume = run.ranks.first(session.resume_from() if run.ranks.is_first else None)
    session.measure_dense()
    while True:
        reset_peak_memory(session.device)
        model = session.load()
        note_gap(session, again=resume is not None)
        watcher = make_watcher(session, model)
        stopped = train(session, model, watcher, resume)
        if stopped is None or stopped.kind != "out-of-memory":
            break
        micro = session.settings.micro_batch
        if run.ranks.size > 1:  # the others cannot begin again
            raise OutOfMemoryError(
                f"Out of memory with a micro-batch of {micro}.",
                "Use a smaller --micro-batch; one process alone finds the largest that fits.",
            )
        finding = explain_memory(session, model)
        del model, watcher
        free_memory(session.device)
        if not spec.retry or session.settings.micro_batch == micro:
            session.note(finding)
            raise OutOfMemoryError(finding.message, finding.hint)
        done = complete_checkpoints(session.checkpoints)
        resume = done[-1][1] if done else None
        trim_metrics(run.book / "metrics.jsonl", done[-1][0] if done else -1)
        session.note(finding)
        session.progress.log(f"Continuing with a micro-batch of {session.settings.micro_batch}.")
    if session.is_split or run.ranks.is_first:
        finish(session, model, watcher, stopped)


def finished(spec: RetrainSpec, run: Run, earlier: Summary) -> None:
    """Merge the adapter of a finished run if that is asked for; nothing else is left to do."""
    adapter = run.path("adapter")
    if not spec.merge or spec.method != "lora" or not adapter.is_dir():
        run.progress.log("This run has finished; there is nothing to resume.")
        return
    plain = replace(
        spec, loss="ce", distil=False, retention=False, also=(), questions=0, processes=1
    )
    session = Session(plain, run)
    session.check_same(spec)
    wanted = dtype_name(weights.merged_dtype(spec, session.info.dtype))
    there = (run.path("merged") / "config.json").is_file()
    if there and earlier.merged and earlier.merged.dtype == wanted:
        run.progress.log(f"merged/ exists already, in {wanted}.")
        return
    run.progress.step(0, 1, "merging the adapter")
    model = adapted(session, adapter)
    merged = write_merged(session, model, earlier.steps or 0)
    replace(earlier, merged=merged).write(run)
    run.progress.step(1, 1, "merged")


def adapted(session: Session, adapter: Path) -> Any:
    """Return the pruned model in its own precision with the adapters in a folder."""
    model = load_model(session.folder, session.device, session.precision.weights)
    model = weights.with_adapters(model, session.spec)
    weights.load_trained(model, adapter)
    return model


def note_gap(session: Session, *, again: bool) -> None:
    """Report a gap that is too large; ``again``: the metrics already contain the finding."""
    gap = Recovery(session.yardstick.loss, session.before, session.before).gap
    finding = diagnostics.pruned_too_hard(session.spec.method, gap)
    if finding and finding not in session.findings:
        session.note(finding, metric=not again)


def make_watcher(session: Session, model: Any) -> StepWatcher:
    """Return the callback that reports, evaluates and saves."""
    return StepWatcher(
        session.settings,
        session.progress,
        lambda: session.measure(model),
        dense=session.yardstick.loss,
        before=session.before,
        clip=session.spec.clip,
        memory=lambda: peak_memory_mib(session.device),
        computed=dtype_name(session.precision.arithmetic),
        # of the written model, and of the trained one on further text
        evaluations_after=(session.spec.merge or session.spec.method != "lora")
        + 2 * bool(session.evaluation),
        evaluation_s=session.evaluation_s,
        ranks=session.run.ranks,
    )


def train(
    session: Session, model: Any, watcher: StepWatcher, resume: Path | None
) -> Finding | None:
    """Train until the end, a cancellation or a finding that stops; return that finding."""
    lengths = [batches.length(sequence) for sequence in session.sequences]
    settings = session.settings
    plan = batches.StepPlan(lengths, settings.batch, settings.accumulation, session.spec.seed)
    micro_batches = MicroBatches(
        session.sequences, plan, settings.steps, session.kept, session.below, session.run.ranks
    )
    trackers = session.spec.report_to if session.run.ranks.is_first else ()
    tracking.prepare(trackers, Path(session.spec.out))
    ranks = session.run.ranks
    args = arguments(session.spec, settings, session.checkpoints, session.device, ranks)
    with tracking.explained(trackers):
        trainer = RetrainTrainer(model, args, micro_batches, session.objective(), ranks)
    watcher.trainer = trainer
    trainer.add_callback(watcher)
    if resume is None:
        watcher.evaluate(0)
    else:
        saved = Saved.read(resume)
        assert saved  # only complete checkpoints are resumed from
        watcher.best = (saved.best_step, Held(saved.best_loss, saved.best_kl))
        known = saved.heldout_loss is not None
        held = Held(saved.heldout_loss or 0.0, saved.heldout_kl) if known else session.before
        watcher.after = (saved.step, held)
        watcher.training_s = saved.training_s
        trainer.tokens = saved.tokens
        if saved.step >= settings.steps:  # the run ended while writing its results
            weights.load_trained(model, resume)
            trainer.state.global_step = saved.step
            return None
    try:
        with tracking.explained(trackers):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except Stopped as stop:
        return stop.finding
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The caller looks for what fits: here the traceback still keeps the activations in memory.
        return diagnostics.out_of_memory(settings.micro_batch, session.spec.cutoff, 0)
    return next((f for f in watcher.findings if f.stop), None)


def explain_memory(session: Session, model: Any) -> Finding:
    """Find the largest micro-batch that fits, and set it for the next attempt."""
    model.zero_grad(set_to_none=True)
    free_memory(session.device)
    micro = session.settings.micro_batch
    fitting = session.largest_micro_batch(model, micro)
    if fitting:
        session.settings = with_micro_batch(session.settings, fitting, session.spec.processes)
    return diagnostics.out_of_memory(micro, session.spec.cutoff, fitting)


def finish(session: Session, model: Any, watcher: StepWatcher, stopped: Finding | None) -> None:
    """Write adapter, merged checkpoint, metrics and summary; then raise if it did not finish.

    The processes of a split model do it together; the first one writes, and raises.
    """
    spec, run = session.spec, session.run
    kept_step = watcher.after[0] if watcher.after else 0
    if stopped:
        kept_step = keep_last_good(session, model, watcher)
    session.findings += watcher.findings
    after = watcher.after[1] if watcher.after else session.before
    result = Recovery(session.yardstick.loss, session.before, after)
    if not stopped and not watcher.cancelled and result.recovered is not None:
        for finding in (
            diagnostics.pruned_too_hard(
                spec.method,
                result.gap,
                result.recovered,
                falling=watcher.watch.is_falling(),
                steps=watcher.trainer.state.global_step,
            ),
            diagnostics.beyond_dense(result.gap, result.recovered),
            diagnostics.adapted(result.recovered, result.recovered_kl),
        ):
            if finding:
                session.note(finding)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = watcher.trainer.state.global_step
    if spec.method == "lora":
        weights.save_adapter(model, run.path("adapter"))
    peak = peak_memory_mib(session.device)
    merged = None
    # A cancelled run writes only what is quick to write; resuming it writes the rest.
    if not watcher.cancelled:
        sharded.free(session.teacher)
        session.teacher = None
        watcher.trainer.model = watcher.trainer.model_wrapped = None
        watcher.trainer.optimizer = watcher.trainer.callback_handler.optimizer = None
        model.zero_grad(set_to_none=True)
        free_memory(session.device)
        evaluate_after(session, model)
    if (spec.merge or spec.method != "lora") and not watcher.cancelled:
        try:
            at, held = watcher.after or (0, session.before)
            known = held.loss if at == steps and not stopped else None
            merged = write_merged(session, model, steps, known)
        except Cancelled:
            raise
        except Exception as error:
            if spec.method != "lora":
                raise
            session.note(diagnostics.not_merged(error))  # the adapter is whole
    if not run.ranks.is_first:
        return
    write_results(session, watcher, result, steps, kept_step, trainable, peak, merged, stopped)
    if watcher.cancelled:
        raise Cancelled("Cancelled.", "Continue with --resume.")
    if stopped:
        kind = NotFiniteError if stopped.kind == "nan" else RunError
        raise kind(stopped.message, f"The state of step {kept_step} was saved. {stopped.hint}")
    shutil.rmtree(session.checkpoints, ignore_errors=True)


def write_merged(
    session: Session, model: Any, steps: int, trained_loss: float | None = None
) -> Merged:
    """Write merged/ and return how it differs from the trained ``model``, which is freed.

    ``trained_loss`` is its held-out loss, if it was measured just now.
    """
    spec, logits = session.spec, None
    if any(map(is_quantized, model.parameters())):
        rows, how = session.rows.heldout, (session.device, session.precision.compute)
        if trained_loss is None:
            trained_loss = heldout_loss(model, rows, *how)
        logits = weights.logits_of(model.eval(), rows, session.device)
        free(model)
        free_memory(session.device)
        model = adapted(session, session.run.path("adapter"))
        session.progress.log(
            f"The adapters were trained on an {spec.quantized_base} base; they are merged into the "
            "weights as they were before it was quantized."
        )
    merged = weights.merge_and_save(
        model,
        session.folder,
        session.run.path("merged"),
        dtype=weights.merged_dtype(spec, session.info.dtype),
        rows=session.rows.heldout,
        device=session.device,
        compute=session.precision.compute,
        trained_loss=trained_loss,
        trained_logits=logits,
        ranks=session.together,
        card=lambda config, custom: model_card.merged_card(
            spec,
            config,
            steps=steps,
            pruning=Pruning.read(session.folder),
            custom_code=custom,
            imported=session.info.imported,
        ),
    )
    session.progress.log(
        f"merged/ is {merged.dtype}; its logits differ by at most "
        f"{merged.max_logit_difference:.2g} from the trained model's."
    )
    return merged


def evaluate_after(session: Session, model: Any) -> None:
    """Run the further evaluation of the trained model, if requested, and write its table."""
    if not session.evaluation:
        return
    dense = session.load_dense()[0] if session.dense else None
    session.evaluation.measure(
        "after", model, session.precision.compute, dense, ranks=session.together
    )
    sharded.free(dense)
    Measure.write(session.run, session.evaluation.rows())


def keep_last_good(session: Session, model: Any, watcher: StepWatcher) -> int:
    """Restore the best evaluated state (the start, if nothing was better); return its step."""
    ranks = session.together
    step, best = ranks.first(watcher.best)
    folder = session.checkpoints / f"checkpoint-{step}"
    if step and ranks.first(Saved.read(folder) is not None):
        weights.load_trained(model, folder)
    else:
        step, best = 0, session.before
        weights.reset(model, session.folder)
    watcher.after = (step, best)
    return step


def write_results(
    session: Session,
    watcher: StepWatcher,
    result: Recovery,
    steps: int,
    kept_step: int,
    trainable: int,
    peak: float,
    merged: Merged | None,
    stopped: Finding | None,
) -> None:
    """Write metrics.jsonl and summary.json."""
    spec, run, trainer = session.spec, session.run, watcher.trainer
    metrics = run.book / "metrics.jsonl"
    if metrics.is_file():
        write_text(run.path("metrics.jsonl"), metrics.read_text(encoding="utf-8"))
    state = "cancelled" if watcher.cancelled else "stopped" if stopped else "done"
    compute = session.precision.arithmetic
    rows = session.rows
    Summary(
        state=state,
        method=spec.method,
        checkpoint=spec.checkpoint,
        dense=session.dense_name,
        **result.summary(),
        measured_at_step=watcher.after[0] if watcher.after else 0,
        kept_step=steps if state != "stopped" else kept_step,
        steps=steps,
        settings=Settings(**asdict(session.settings)),
        loss_last_step=watcher.last_loss,
        trainable_parameters=trainable,
        parameters=session.info.parameters,
        quantized_base=spec.quantized_base,
        fused=session.fused_layers > 0,
        not_fused_because=session.why_stock,
        recomputed=session.recomputation.on,
        recomputed_because=session.recomputation.why,
        micro_batch_because=session.micro_batch_why,
        tokens=trainer.tokens,
        training_s=watcher.training_s,
        tokens_per_s=trainer.tokens / watcher.training_s if watcher.training_s else None,
        seconds=time.monotonic() - session.started,
        peak_memory_mib=peak,
        processes=spec.processes,
        sharding=spec.sharding if session.sharding else None,
        sharding_because=session.sharding.why if session.sharding else None,
        device=str(session.device),
        dtype=dtype_name(session.precision.weights),
        compute_dtype=dtype_name(compute),
        seed=spec.seed,
        data=Data(
            **rows.data,
            kind=rows.kind,
            template=rows.template,
            rows=len(rows.train),
            cut=rows.cut,
            dropped=rows.dropped,
            sequences=len(session.sequences),
        ),
        heldout=Heldout(
            **rows.heldout_data,
            rows=len(rows.heldout),
            tokens=sum(row.items for row in rows.heldout),
        ),
        merged=merged,
        findings=tuple(session.findings),
    ).write(run)
