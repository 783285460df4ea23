"""The state of one retraining: data, settings, precision, the dense and the pruned model."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.checkpoint import locate
from core.errors import (
    CheckpointError,
    InputError,
    OptionError,
    OutputError,
)
from core.model.loading import load_model, load_tokenizer
from core.model.memory import free_memory, is_out_of_memory
from core.model.precision import Precision, decide, dtype_name, resolve_device
from core.quantize import plan as quantize_plan
from core.retrain import (
    batches,
    caches,
    diagnostics,
    estimate,
    fused,
    layers,
    partial,
    results,
    row_cache,
    rows,
    sharded,
    split_files,
    states,
    teacher,
    weights,
)
from core.retrain.diagnostics import Finding
from core.retrain.encoders import ModelTokenizer, config_eos
from core.retrain.evaluation import EvaluationTable
from core.retrain.loss import moved
from core.retrain.recovery import Held
from core.retrain.spec import NF4, RetrainSpec, base_bits, goal_of, layout_of, settings_of
from core.retrain.trainer import (
    Objective,
    complete_checkpoints,
    with_kept,
)
from core.runs import devices
from core.runs.devices import MIB
from core.runs.dtypes import Purpose
from core.runs.ranks import ALONE, Ranks
from core.runs.workspace import read_json, write_json, write_text

if TYPE_CHECKING:
    from core.runs.run import Run


MARKER = "training.json"
"""File of the options and data that a run began with."""


class Session:
    """Everything that the phases of one retraining share."""

    def __init__(self, spec: RetrainSpec, run: Run) -> None:
        """Check the spec and read the data; no model is loaded yet."""
        self.spec, self.run, self.progress = spec, run, run.progress
        self.ranks = run.ranks if spec.processes > 1 else ALONE
        """The processes that share the training."""
        self.started = time.monotonic()
        self.device = resolve_device(spec.device)
        checkpoint = locate.open(spec.checkpoint, run.progress)
        self.checkpoint, self.folder, self.info = checkpoint, checkpoint.folder, checkpoint.info
        self.precision = self.decide(self.info.dtype)
        self.dense_name, self.dense = self._find_dense()
        encoder = ModelTokenizer(load_tokenizer(self.folder), config_eos(self.folder))
        self.rows = rows.prepare(spec, encoder, vocab=self.info.vocab, context=self.info.context)
        self.sequences = batches.sequences(self.rows.train, layout_of(spec), spec.cutoff, spec.seed)
        self.settings = settings_of(spec, len(self.sequences), self.info.parameters)
        self.trained: tuple[int, ...] = ()
        """The blocks that partial fine-tuning trains."""
        if spec.method == "partial":
            self.trained = partial.trained_blocks(spec, self.info.blocks, self.folder)
        how = self._fit(checkpoint.config)
        self.settings, self.micro_batch_why = how.settings, how.why
        self.recomputation = how.recomputation
        """Whether activations are recomputed; decided once, before any model is loaded."""
        self.sharding = how.sharding
        """Whether weights, gradients and optimiser states are split; None in a single process."""
        spec = replace(spec, gradient_checkpointing=self.recomputation.option)
        if self.sharding:
            spec = replace(spec, sharding=self.sharding.option)
            run.progress.log(self.sharding.sentence)
        self.spec = spec
        self.why_stock = layers.why_stock(spec, self.info.parameters, checkpoint.config)
        """Why the hand-written layers are not used, None if they are."""
        self.fused_layers = 0
        self.findings: list[Finding] = []
        self.yardstick = teacher.Yardstick(self.rows.heldout)
        self.goal = goal_of(spec)
        self.teacher: Any = None
        self.kept: row_cache.Cache | None = None
        """The dense model's distributions on the training rows, if they are read from disk."""
        self.below: states.Below | None = None
        """What enters the first trained block, if it is read from disk."""
        self.evaluation = EvaluationTable(spec, self.rows, encoder, self.device)
        self.before = Held(0.0)
        self.evaluation_s = 0.0
        """What measuring the pruned model took."""
        self.checkpoints = run.book / "checkpoints"
        self._log_data()

    def _fit(self, config: Mapping[str, Any]) -> estimate.Fit:
        """Return how it runs within the memory: as the run began, else by what fits."""
        spec, settings = self.spec, self.settings
        blocks = partial.blocks_of(spec, self.info.blocks, self.folder)
        device, free = devices.free_bytes(spec.device)
        known = [one for one in self.ranks.gather(free) if one is not None]
        free = min(known) if len(known) == self.ranks.size else None
        count = estimate.trainable_parameters(spec, self.info, blocks)
        longest = max(batches.length(sequence) for sequence in self.sequences)
        case = estimate.Case(self.info, config, count, device, free, longest, blocks[0])
        found = estimate.fit(spec, settings, case)
        before = read_json(self.run.book / MARKER) if spec.resume else None
        return self.ranks.first(found if before is None else self._as_before(found, before))

    def _as_before(self, found: estimate.Fit, before: Mapping[str, Any]) -> estimate.Fit:
        """Return how it runs, as an earlier attempt ran."""
        spec, settings = self.spec, self.settings
        same = "the run began so"
        known, micro = before.get("recomputed"), before.get("micro_batch_taken")
        if isinstance(known, bool) and spec.gradient_checkpointing == "auto":
            found = replace(found, recomputation=estimate.Recomputation(known, same))
        if spec.micro_batch is None and type(micro) is int and 1 <= micro <= settings.batch:
            taken = estimate.with_micro_batch(settings, micro, spec.processes)
            found = replace(found, settings=taken, why=same)
        return found

    def decide(self, declared: str) -> Precision:
        """Return the precision of a model of this training whose checkpoint is in ``declared``."""
        purpose: Purpose = "adapters" if self.spec.method == "lora" else "training"
        return decide(self.spec.dtype, self.device, declared, purpose)

    def _find_dense(self) -> tuple[str | None, locate.Checkpoint | None]:
        """Return the name and the checkpoint of the dense model, None if it no longer exists.

        Raises `InputError` only if it was given explicitly or is needed for distillation.
        """
        name = self.spec.dense or weights.dense_of(self.folder)
        if name is None:
            found = None
        else:
            try:
                found = locate.open(name, self.progress, need_tokenizer=False)
            except InputError:
                if self.spec.dense:
                    raise
                self.progress.log(f"Dense model {name} not found; recovery will not be reported.")
                found = None
        if found is None:
            if goal_of(self.spec).kl_weight:
                what = "--distil" if self.spec.distil else f"--loss {self.spec.loss}"
                raise OptionError(f"{what} needs the dense model.", "Give it with --dense.")
            return None, None
        vocab = found.info.vocab
        if vocab != self.info.vocab:
            raise CheckpointError(
                f"The dense model has a vocabulary of {vocab:,}, but the pruned one has "
                f"{self.info.vocab:,}.",
                "Give the model from which the pruned one was made with --dense.",
            )
        return name, found

    def _log_data(self) -> None:
        data, settings = self.rows, self.settings
        if data.refused:
            self.progress.log(data.refused)
        self.progress.log(
            f"{len(data.train)} rows to train on ({data.kind}; {data.cut} cut at "
            f"{self.spec.cutoff} tokens, {data.dropped} skipped), {len(data.heldout)} held out; "
            f"{settings.steps} steps of {settings.batch} sequences ({settings.layout}), "
            f"{settings.micro_batch} at once."
        )

    def note(self, finding: Finding, *, metric: bool = True) -> None:
        """Store a finding for the summary, log it, and add it to the metrics."""
        self.findings.append(finding)
        self.progress.log(str(finding))
        if metric:
            results.report(self.progress, results.notice(finding))

    # --- resuming ---

    def fingerprint(self, of: RetrainSpec | None = None) -> dict[str, Any]:
        """Return the options (of the spec ``of``) and data that stay when a run is resumed."""
        spec = asdict(of or self.spec)
        changeable = (
            "out", "resume", "dry_run", "device", "dtype", "micro_batch", "retry", "merge",
            "merge_dtype", "checkpoint", "dense", "data", "holdout_data", "gradient_checkpointing",
            "retention", "also", "questions", "fused", "keep_states", "processes", "sharding",
        )  # fmt: skip
        same = {k: v for k, v in spec.items() if k not in changeable}
        content = {
            "weights": self.info.key,
            "rows": self.rows.data,
            "heldout": len(self.rows.heldout),
        }
        return json.loads(json.dumps({**same, **content}))

    def resume_from(self) -> Path | None:
        """Return the checkpoint to continue from, after checking that it belongs to the same run.

        Without --resume, the checkpoints of an earlier attempt are deleted.
        """
        marker = self.run.book / MARKER
        if not self.spec.resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            write_json(marker, self._began())
            return None
        known = complete_checkpoints(self.checkpoints)
        if not self.check_same() and known:
            raise OutputError(
                f"{marker} is missing or damaged, so the existing checkpoints cannot be verified.",
                "Start over with a different --out.",
            )
        write_json(marker, self._began())
        if not known:
            self.progress.log("No checkpoint to resume from; starting from the beginning.")
            return None
        step, folder = known[-1]
        trim_metrics(self.run.book / "metrics.jsonl", step)
        self.progress.log(f"Continuing after step {step}.")
        return folder

    def _began(self) -> dict[str, Any]:
        """Return what is stored at the start, for a resumption to go by."""
        return {
            **self.fingerprint(),
            "recomputed": self.recomputation.on,
            "micro_batch_taken": self.settings.micro_batch,
        }

    def check_same(self, spec: RetrainSpec | None = None) -> bool:
        """Raise `OptionError` if the run here began with other options or data.

        Returns whether that is known: whether the run left a readable record of them.
        """
        before = read_json(self.run.book / MARKER)
        # an option that an earlier version did not have had its default
        usual = json.loads(json.dumps({f.name: f.default for f in fields(self.spec)}, default=str))
        for name, value in self.fingerprint(spec).items() if before is not None else ():
            if before is not None and before.get(name, usual.get(name)) != value:
                raise OptionError(
                    f"--resume: {name} was {before.get(name)}, but is now {value}.",
                    "Resume with the same options, or start over with a different --out.",
                )
        return before is not None

    # --- models ---

    def measure_dense(self) -> None:
        """Measure the dense model; keep it as teacher, or until the pruned one is evaluated."""
        if self.dense is None:
            return
        model, held = self.load_dense()
        self.yardstick = teacher.yardstick(
            model, self.rows.heldout, self.device, held.compute, self.progress, self.ranks
        )
        self.progress.log(f"Dense model: held-out loss {self.yardstick.loss:.4f}.")
        if self.evaluation:
            how = held.compute, None, self.progress, self.ranks
            self.evaluation.measure("dense", model, *how)
        if self.goal.is_kept:
            self.kept = self._keep(model, held)
        sharded.release(model)
        if self.goal.is_live or self.evaluation:
            self.teacher = model
        else:
            sharded.free(model)

    def _keep(self, model: Any, held: Precision) -> row_cache.Cache:
        """Return the dense model's distributions on the training rows; computed unless known."""
        assert self.dense
        about = self.taken_rows(), self.goal.top_k
        folder = caches.root() / teacher.key_of(self.dense, *about, dtype_name(held.arithmetic))
        found = teacher.find(folder, about[0])
        if self.ranks.first(found is not None):
            self.progress.log("The dense model's distributions on these rows are known.")
        else:
            how = self.device, held.compute
            found = teacher.write(folder, model, *about, how, self.progress, self.ranks)
            self.ranks.first(None)  # written
        found = found or teacher.find(folder, about[0])
        if found is None:
            raise OutputError(f"{folder} has gone.", "Start the run again.")
        return found

    def taken_rows(self) -> list[rows.Row]:
        """Return the training rows that the steps take; all of them if these are half or more."""
        settings, lengths = self.settings, [batches.length(pack) for pack in self.sequences]
        if not batches.takes_few(settings.steps, settings.batch, len(lengths)):
            return self.rows.train
        plan = batches.StepPlan(lengths, settings.batch, settings.accumulation, self.spec.seed)
        taken = {i for step in range(settings.steps) for i in plan.indices(step)}
        return [row for i in sorted(taken) for row in self.sequences[i]]

    def _states(self, model: Any) -> states.Below | None:
        """Return what enters the first trained block, computed unless known; None if not kept."""
        first = self.trained[0] if self.trained else 0
        kinds = set(getattr(model.config, "layer_types", None) or ())
        if not first or self.spec.keep_states == "off" or len(kinds) > 1:
            return None
        held = self.precision
        read = [*self.taken_rows(), *self.rows.heldout]
        about = dtype_name(held.weights), dtype_name(held.arithmetic), str(self.fused_layers > 0)
        folder = caches.root() / states.key_of(self.checkpoint, read, first, about)
        found = states.find(folder, read, first)
        if found:
            self.progress.log("The states below the first trained block are known.")
            return found
        settings = self.settings
        tokens = sum(len(row.ids) for row in dict.fromkeys(read))
        need = tokens * self.info.hidden * held.weights.itemsize
        once = settings.steps * settings.batch <= len(self.sequences)
        if once or not caches.has_room(need):
            return None
        how = self.device, held.compute
        return states.write(folder, model, read, first, need, how, self.progress)

    def _shared_states(self, model: Any) -> states.Below | None:
        """Return the states below the first trained block, which the first process writes."""
        ranks = self.run.ranks
        if ranks.is_first:
            found = self._states(model)
            ranks.first(found is not None)
            return found
        return self._states(model) if ranks.first(False) else None

    def load_dense(self) -> tuple[Any, Precision]:
        """Load the dense model; a teacher is stored in the precision that it computes in."""
        assert self.dense
        held = self.decide(self.dense.info.dtype)
        # Loaded in that format, not cast to it: a cast would round the rotary frequencies as well.
        dtype = held.arithmetic if self.goal.is_live else held.weights
        return self._loaded(self.dense.folder, dtype), held

    def _loaded(self, folder: Path, dtype: torch.dtype, *, trained: bool = False) -> Any:
        """Return a checkpoint's model, split among the processes if the training is."""
        if self.is_split:
            return split_files.load(folder, self.ranks, self.device, dtype, trained=trained)
        return load_model(folder, self.device, dtype)

    def load(self) -> Any:
        """Load the pruned model, measure it, and prepare it for training."""
        self.below = None
        model = self._loaded(self.folder, self.precision.weights, trained=True)
        if self.is_split:
            free_memory(self.device)
            part, whole = sharded.held_bytes(model.parameters()), self.info.parameters
            whole *= self.precision.weights.itemsize
            self.progress.log(
                f"The first process holds {part / MIB:,.1f} of {whole / MIB:,.1f} MiB of weights."
            )
        began = time.monotonic()
        self.before = self.measure(model)
        self.evaluation_s = time.monotonic() - began
        kl = "" if self.before.kl is None else f", KL to the dense model {self.before.kl:.4f}"
        self.progress.log(f"Pruned model: held-out loss {self.before.loss:.4f}{kl}.")
        if self.evaluation and not self.evaluation.has("before"):
            how = self.precision.compute, self.teacher, self.progress, self.ranks
            self.evaluation.measure("before", model, *how)
        if not self.goal.is_live:
            sharded.free(self.teacher)
            self.teacher = None
        if bits := base_bits(self.spec):
            plan = quantize_plan.make(self.info, bits, None)
            weights.quantize_base(model, plan, nf4=self.spec.quantized_base == NF4)
        torch.manual_seed(self.spec.seed)
        if self.spec.method == "lora":
            model = weights.with_adapters(model, self.spec)
        elif self.spec.method == "partial":
            weights.train_part(model, self.trained)
        else:
            model.requires_grad_(True)
        if self.recomputation.on:
            self.progress.log(f"Activations are recomputed: {self.recomputation.why}.")
            layers.enable_recomputation(model)
        if self.why_stock is None:
            self.fused_layers = fused.install(model, keep=not self.is_split)
        else:
            self.progress.log(f"Using the decoder layers of transformers: {self.why_stock}.")
        self.below = self._shared_states(model)
        return model

    @property
    def is_split(self) -> bool:
        """Whether each process holds a part of weights, gradients and optimiser states."""
        return self.sharding is not None and self.sharding.on

    @property
    def together(self) -> Ranks:
        """The processes that finish the training: all if it is split, otherwise the first alone."""
        return self.ranks if self.is_split else ALONE

    def measure(self, model: Any) -> Held:
        """Return loss and divergence of a model in training on the held-out rows.

        All processes share the rows, and notice a cancel request at the same place.
        """
        how = self.device, self.precision.compute, sharded.Together(self.progress, self.ranks)
        try:
            return self.yardstick.measure(model, *how, self.below, self.ranks)
        finally:
            sharded.release(model)

    def objective(self) -> Objective:
        """Return the training objective."""
        return Objective(self.device, self.precision.compute, self.teacher, self.goal)

    # --- memory ---

    def largest_micro_batch(self, model: Any, below: int) -> int:
        """Return the largest micro-batch that fits, found by trying the longest sequences."""
        longest = sorted(self.sequences, key=batches.length)[-below:]
        objective = self.objective()

        def fits(count: int) -> bool:
            batch = moved(with_kept(longest[-count:], self.kept, self.below), self.device)
            items = sum(row.items for rows_ in longest[-count:] for row in rows_)
            try:
                model.train()
                objective(model, batch | {"items": items})[0].backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return False
            finally:
                model.zero_grad(set_to_none=True)
                free_memory(self.device)
            return True

        return diagnostics.largest_that_fits(below, fits)


def trim_metrics(path: Path, step: int) -> None:
    """Delete the lines after ``step``; a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = results.metric(line)
        if found and (found.step or 0) <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
