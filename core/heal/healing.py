"""Repairs of a depth-pruned model in closed form, without training.

A seam is a run of removed blocks. Its target is the dense stream that enters the block after it.
Three repairs, each fitted on the stream that the model with the lower seams healed puts out:

- ``refit``: the whole down projection of the block before the seam, against its own input, by
  weighted ridge regression towards the old weights. If parts of blocks go, the output projection of
  the part before them: a down projection, or that of an attention whose MLP goes. An MLP that keeps
  some of its neurons is a seam of its own: its down projection is refitted on them, towards
  the dense stream behind the block, or behind what goes right after it.
- ``linear``: a linear map of that block's MLP output, folded into its down projection (ReplaceMe,
  arXiv 2505.02819), with a ridge towards the identity.
- ``scale``: the stream grows with depth, so after a cut it is too small. Every output projection
  above the seam is divided by the ratio; as RMSNorm does not see a common factor, that equals
  multiplying the embedding and every output projection below (Prune&Comp), epsilon aside.

The ridge is chosen by the error on held-out rows. A repair is kept only if it lowers KL(dense ||
healed) there: an error in the stream may fall while the model gets worse, as when the first token,
which others attend to, is fitted badly.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import neurons
from core.checkpoint.drop import Removal
from core.errors import CheckpointError, NotFiniteError
from core.heal.divergence import Apart, apart
from core.heal.ridge import ALPHAS, Normal, wide
from core.heal.seams import (
    Seam,
    check_seams,
    check_tokens,
    is_held_out,
    methods_for,
    missing_parts,
    parts_of,
    seams_between,
)
from core.importance.branches import Batch
from core.importance.forward import Channels, FastBlock, Scratch, is_plain
from core.importance.streams import Files, InMemory, Stream, embedded
from core.model.blocks import BlockView
from core.model.precision import arithmetic_of, not_finite_hint
from core.prune.results import HealedSeam, Healing
from core.runs.progress import SILENT, Progress

Change = Callable[[Tensor], Tensor]
"""Makes a replaced tensor, in the format it is stored in, of the one before."""
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
FIELDS = ("o", "down")
"""The same of a `FastBlock`."""
NEVER = Apart(math.inf, math.inf)
"""What a repair that could not be made counts as."""


@dataclass(frozen=True)
class Repair:
    """What healing found; blocks by their numbers in the model before the cut."""

    method: str
    """refit, linear or scale; none if nothing lowered the KL."""
    kl_before: float
    """KL(dense || pruned) on the held-out tokens, in nats per token."""
    kl_after: float
    """The same with the repairs that were kept, after rounding to the stored format."""
    nll_dense: float
    """Negative log-likelihood of the held-out tokens by the dense model, in nats per prediction."""
    nll_before: float
    nll_after: float
    seams: tuple[HealedSeam, ...]
    """From the bottom up, those whose repair was refused included."""
    tokens: int
    """Tokens that were fitted on."""
    heldout_tokens: int
    tensors: Mapping[str, Change]
    """How tensors change, by their names before the cut."""
    tried: Mapping[str, float]
    """KL after each method that was tried."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Columns of the dense model's weights that ``tensors`` of narrower parts have, by name."""

    def record(self, asked: str) -> Healing:
        """Return it as pruning.json has it, without text and device; ``asked`` is the method."""
        return Healing(
            asked=asked,
            method=self.method,
            kl_before=self.kl_before,
            kl_after=self.kl_after,
            nll_dense=self.nll_dense,
            nll_before=self.nll_before,
            nll_after=self.nll_after,
            tried=dict(self.tried),
            tokens=self.tokens,
            heldout_tokens=self.heldout_tokens,
            seams=self.seams,
        )


def heal(
    view: BlockView,
    drop: Removal | Iterable[int],
    batch: Batch,
    method: str,
    progress: Progress = SILENT,
    *,
    stored: Mapping[str, torch.dtype] | None = None,
    kept: Kept | None = None,
    folder: Path | None = None,
) -> Repair:
    """Return the repair of ``view`` without the blocks ``drop``; the model is not changed.

    Args:
        view: The dense model.
        drop: Blocks that go, or with refit and auto parts of blocks and neurons of MLPs too.
        batch: Calibration rows; every fourth row is held out from the fit.
        method: refit, linear, scale, or auto: each of them is tried, and the best by KL kept (of
            parts, refit alone).
        progress: Updated after every block.
        stored: Formats that tensors are stored in, by name. Default: that of the model.
        kept: The dense streams of this batch, if several cuts are healed on it: the numbers are the
            same, and only what is above the first seam is computed.
        folder: Keeps the streams on its disk; the numbers are the same. Default: in memory.

    Memory: two streams [rows, tokens, hidden] and those of the held-out rows, or a chunk of each if
    they are on disk, one block's prepared weights, and the regression's matrix
    [intermediate, intermediate] (`Normal`); see `core.heal.demand`. The view may read its blocks
    one by one (`core.model.streaming`).

    Raises:
        PlanError: Blocks cannot be left out, or the method cannot heal this cut.
        DataError: There are too few tokens.
        CheckpointError: A block is not a plain decoder layer.
        NotFiniteError: The model's states are NaN or infinite.
        RunError: The streams do not fit on the disk.
    """
    removal = view.check_skip(drop)
    missing, methods = missing_parts(view.sizes()), methods_for(method, removal)
    seams = check_seams(method, removal, missing)
    width = neurons.kept(removal, [size["intermediate"] for size in view.sizes()])
    cut = _Cut(
        parts_of(removal),
        {block: Channels(torch.tensor(numbers)) for block, numbers in width.items()},
        seams,
        [seam.removed if removal.partial else "" for seam in seams],
        removal.partial,
        missing,
    )
    with _files(view, folder) as files:
        rows = _Rows.split(batch, None if kept else files)
        return _best_of(view, cut, rows, methods, progress, stored, kept)


def heal_narrower(
    view: BlockView,
    thin: Mapping[int, Channels],
    batch: Batch,
    progress: Progress = SILENT,
    *,
    stored: Mapping[str, torch.dtype] | None = None,
    keep: Callable[[Tensor], Change] | None = None,
    folder: Path | None = None,
) -> Repair:
    """Return the repair of ``view`` with narrower blocks; the model is not changed.

    From the bottom up, the down projection of each is refitted on the neurons that it keeps,
    towards the dense stream behind the block: it makes up for lost heads too. Of a block without an
    MLP, the attention's output projection is.

    Args:
        view: The dense model.
        thin: What narrower blocks keep.
        batch: Calibration rows; every fourth row is held out from the fit.
        progress: Updated after every block.
        stored: Formats that tensors are stored in, by name. Default: that of the model.
        keep: Keeps a new tensor until it is written, e.g. on disk. Default: in memory.
        folder: Keeps the streams on its disk; the numbers are the same. Default: in memory.

    Memory and errors are those of `heal`; what a narrower block keeps is held next to the block.
    """
    blocks = sorted(thin)
    last = {2 * block + view.has(block, "mlp") for block in blocks}
    missing = missing_parts(view.sizes())
    seams = seams_between((), last, missing)
    names = [f"narrower block {block}" for block in blocks]
    cut = _Cut(frozenset(), thin, seams, names, True, missing)
    with _files(view, folder) as files:
        rows = _Rows.split(batch, files)
        return _best_of(view, cut, rows, ("refit",), progress, stored, None, keep)


@contextlib.contextmanager
def _files(view: BlockView, folder: Path | None) -> Iterator[Files | None]:
    """Yield where streams on the disk of ``folder`` have their files; None: in memory."""
    if folder is None:
        yield None
        return
    with contextlib.closing(Files(folder, view.device)) as files:
        yield files


def _best_of(
    view: BlockView,
    cut: _Cut,
    rows: _Rows,
    methods: Sequence[str],
    progress: Progress,
    stored: Mapping[str, torch.dtype] | None,
    kept: Kept | None,
    keep: Callable[[Tensor], Change] | None = None,
) -> Repair:
    """Heal by each of ``methods``; return the repair with the least KL."""
    check_tokens(view.hidden_size, len(rows.all.ids), int(rows.all.lengths.sum()))
    for block, layer in enumerate(view.blocks):
        if not is_plain(layer):
            raise CheckpointError(
                f"Block {block} is not a plain decoder layer, so the cut cannot be healed.",
                "Use --heal none.",
            )
    with torch.no_grad():
        start = _Reference.of(view, cut, rows, kept, progress)
        found = [
            _Walk(view, cut, rows, start, stored or {}, name, progress, kept, keep).heal()
            for name in methods
        ]
    best = min(found, key=lambda repair: repair.kl_after)
    repaired = any(seam.kept for seam in best.seams)
    tried = {repair.method: repair.kl_after for repair in found}
    return replace(best, method=best.method if repaired else "none", tried=tried)


def applied(view: BlockView, repair: Repair) -> AbstractContextManager[None]:
    """Compute with the repaired weights until the context ends; blocks are not removed.

    Of a narrower MLP, the columns that it keeps get them.
    """
    changes = dict(repair.tensors)
    for name, columns in repair.columns.items():
        changes[name] = _into(changes[name], columns)
    return view.replacing(changes)


def _into(change: Change, columns: Tensor) -> Change:
    """Return a change of these columns alone."""

    def changed(old: Tensor) -> Tensor:
        new = old.clone()
        new[:, columns.to(new.device)] = change(old).to(new)
        return new

    return changed


@dataclass(frozen=True)
class _Rows:
    """Calibration rows, those that are fitted on first."""

    all: Batch
    fitted: int
    files: Files | None = None
    """Where their streams are; None: in memory."""

    @staticmethod
    def split(batch: Batch, files: Files | None = None) -> _Rows:
        at = torch.arange(len(batch.ids))
        held = is_held_out(at)
        order = torch.cat([at[~held], at[held]]).to(batch.ids.device)
        return _Rows(Batch(batch.ids[order], batch.lengths[order]), int((~held).sum()), files)

    @property
    def held_out(self) -> Batch:
        return Batch(self.all.ids[self.fitted :], self.all.lengths[self.fitted :])

    def stream(self, view: BlockView, first: int = 0) -> Stream:
        """Return the stream that enters block 0, of the rows from ``first`` on."""
        dtype = arithmetic_of(view.dtype, view.device)
        return embedded(view, self.all.ids[first:], dtype, self.files)


@dataclass(frozen=True)
class _Cut:
    """What a cut takes, in parts of blocks."""

    gone: frozenset[int]
    thin: Mapping[int, Channels]
    """What narrower blocks keep."""
    seams: tuple[Seam, ...]
    names: Sequence[str]
    """What goes at each seam, in words; empty for whole blocks."""
    partial: bool
    """Whether parts of blocks go, or channels."""
    missing: frozenset[int] = frozenset()
    """Parts that the model lacks before the cut."""

    def left(self, blocks: int, low: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Yield (block, its parts) of what stays from part ``low`` on."""
        return _by_block(part for part in range(low, 2 * blocks) if part not in self.gone)

    @property
    def start(self) -> int:
        """The first part that the cut model computes otherwise; 0 if there is none."""
        thin = (2 * b + (k.queries is None and k.o_bias is None) for b, k in self.thin.items())
        return min((*self.gone, *thin), default=0)

    def of(self, function: FastBlock) -> FastBlock:
        """Return ``function`` with what its block keeps."""
        kept = self.thin.get(function.block)
        return function if kept is None else function.thinned(kept)


@dataclass(frozen=True)
class _Reference:
    """The dense model on the held-out rows, and how far the pruned one is from it."""

    dense: Stream
    rows: Batch
    nll: float
    """Of the dense model."""
    pruned: Apart

    @staticmethod
    def of(
        view: BlockView, cut: _Cut, all_rows: _Rows, kept: Kept | None, progress: Progress
    ) -> _Reference:
        rows, fitted, check = all_rows.held_out, all_rows.fitted, progress.check_cancel
        if kept:
            dense: Stream = InMemory(kept.states[-1][fitted:])
            low = min((seam.low - seam.narrow for seam in cut.seams), default=2 * len(view))
            pruned: Stream = InMemory(kept.before(low, progress)[fitted:].clone())
            for block, parts in cut.left(len(view), low):
                function = FastBlock(view, block, dense.dtype, kept.scratch)
                _run(cut.of(function), parts, pruned, progress)
            nll = kept.nll
        else:
            dense, pruned = _both(view, cut, all_rows, progress)
            nll = apart(view, dense, dense, rows, check).nll
        found = apart(view, dense, pruned, rows, check)
        pruned.close()
        return _Reference(dense, rows, nll, _finite(found, dense.dtype))


def _both(view: BlockView, cut: _Cut, rows: _Rows, progress: Progress) -> tuple[Stream, Stream]:
    """Return the last streams of the dense and the pruned model on the held-out rows.

    Below the cut they are one.
    """
    dense, scratch = rows.stream(view, rows.fitted), Scratch()
    pruned, left = dense, dict(cut.left(len(view)))
    for block in range(len(view)):
        function = FastBlock(view, block, dense.dtype, scratch)
        first = 0
        if block == cut.start // 2:
            first = cut.start % 2
            _run(function, range(first), dense, progress)
            pruned = dense.copy()
        _run(function, range(first, 2), dense, progress)
        if pruned is not dense:
            parts = [part for part in left.get(block, ()) if part >= first]
            _run(cut.of(function), parts, pruned, progress)
        del function  # before the next block's copy is made
        progress.step(block + 1, len(view), f"Before healing, block {block + 1} of {len(view)}")
    return dense, pruned


def _finite(found: Apart, dtype: torch.dtype) -> Apart:
    if not math.isfinite(found.kl):
        raise NotFiniteError("The model's predictions are NaN or infinite.", not_finite_hint(dtype))
    return found


class Kept:
    """The dense model's streams before every block, kept so that many cuts can be healed.

    Memory: one stream [rows, tokens, hidden] for every block.
    """

    def __init__(self, view: BlockView, batch: Batch, progress: Progress = SILENT) -> None:
        """Run ``view`` on ``batch``."""
        self.view, self.scratch = view, Scratch()
        rows = _Rows.split(batch)
        with torch.no_grad():
            hidden = view.embed(rows.all.ids).to(arithmetic_of(view.dtype, view.device))
            stream = InMemory(hidden)
            self.states = [hidden.clone()]
            """Before every block, and after the last; rows that are fitted on first."""
            for block in range(len(view)):
                function = FastBlock(view, block, hidden.dtype, self.scratch)
                _run(function, (0, 1), stream, progress)
                del function  # before the next block's copy is made
                self.states.append(hidden.clone())
            last = InMemory(hidden[rows.fitted :])
            self.nll = apart(view, last, last, rows.held_out, progress.check_cancel).nll
            """Of the held-out tokens, in nats per prediction."""

    def before(self, part: int, progress: Progress) -> Tensor:
        """Return the stream before a part of a block; it must not be changed."""
        block, odd = divmod(part, 2)
        if not odd:
            return self.states[block]
        hidden = self.states[block].clone()
        function = FastBlock(self.view, block, hidden.dtype, self.scratch)
        _run(function, (0,), InMemory(hidden), progress)
        return hidden


def _run(function: FastBlock, parts: Sequence[int], stream: Stream, progress: Progress) -> None:
    """Apply the attention (0), the MLP (1) or both to ``stream``, in place."""

    def apply(chunk: Tensor) -> None:
        progress.check_cancel()
        for part in parts:
            (function.mlp_ if part else function.attention_)(chunk)

    if parts:
        stream.apply(apply)


class _Walk:
    """One pass over the weights that heals the seams from the bottom up, by one method."""

    def __init__(
        self,
        view: BlockView,
        cut: _Cut,
        rows: _Rows,
        reference: _Reference,
        stored: Mapping[str, torch.dtype],
        method: str,
        progress: Progress,
        kept: Kept | None = None,
        keep: Callable[[Tensor], Change] | None = None,
    ) -> None:
        self.kept, self.keep = kept, keep or _constant
        self.view, self.rows, self.reference = view, rows, reference
        self.cut = cut
        self.stored, self.method, self.progress = stored, method, progress
        self.dtype, self.scratch = arithmetic_of(view.dtype, view.device), Scratch()
        self.valid = rows.all.valid
        self.dense: Stream = InMemory(kept.states[0]) if kept else rows.stream(view)
        self.healed = self.dense.copy()
        self.now = reference.pruned
        """With the repairs kept so far."""
        self.factor = 1.0
        """What output projections above the current seam are divided by."""
        self.found: list[HealedSeam] = []
        self.tensors: dict[str, Change] = {}
        self.columns: dict[str, Tensor] = {}

    def heal(self) -> Repair:
        at, seams = 0, self.cut.seams
        if self.kept and seams:
            at = max(0, seams[0].low - (self.method != "scale"))
            self.healed = InMemory(self.kept.before(at, self.progress).clone())
        for seam in seams:
            if self.method == "scale":
                self._advance(at, seam.low)
                self._to_target(seam)
                self._rescale(seam)
            else:
                self._advance(at, seam.low - 1)
                self._fit(seam)
            at = seam.high
        for stream in (self.dense, self.healed):
            stream.close()
        fitted = int(self.valid[: self.rows.fitted].sum())
        return Repair(
            self.method,
            self.reference.pruned.kl,
            self.now.kl,
            self.reference.nll,
            self.reference.pruned.nll,
            self.now.nll,
            tuple(self.found),
            fitted,
            int(self.valid.sum()) - fitted,
            self.tensors,
            {},
            self.columns,
        )

    # running parts of blocks: 2 b is the attention of block b, 2 b + 1 its MLP

    def _advance(self, low: int, high: int) -> None:
        """Run kept parts on both streams."""
        for block, parts in _by_block(range(low, high)):
            function = self._prepared(block)
            if not self.kept:
                self._run(function, parts, self.dense)
            self._run(self._healed(function), parts, self.healed)
            del function  # before the next block's copy is made
            self._tell(block)

    def _to_target(self, seam: Seam) -> None:
        """Run the removed parts on the dense stream."""
        if self.kept:
            self.dense = InMemory(self.kept.before(seam.high, self.progress))
            return
        for block, parts in _by_block(range(seam.low, seam.high)):
            self._run(self._prepared(block), parts, self.dense)
            self._tell(block)

    def _apart_above(self, seam: Seam, held: Stream) -> Apart:
        """Compare the stream ``held`` with the dense one, with the seams above still open.

        Afterwards it is closed.
        """
        for block, parts in self.cut.left(len(self.view), seam.high):
            self._run(self._healed(self._prepared(block)), parts, held)
        reference, check = self.reference, self.progress.check_cancel
        found = apart(self.view, reference.dense, held, reference.rows, check)
        held.close()
        return found

    def _prepared(self, block: int) -> FastBlock:
        return FastBlock(self.view, block, self.dtype, self.scratch)

    def _healed(self, function: FastBlock) -> FastBlock:
        """Return ``function`` as the pruned model has it: output projections are divided too."""
        function = self.cut.of(function)
        if self.factor != 1.0:
            for part, path in enumerate(OUTPUTS):
                if 2 * function.block + part not in self.cut.missing:
                    setattr(function, FIELDS[part], self._divided_pair(function.block, path))
        return function

    def _divided_pair(self, block: int, path: str) -> tuple[Tensor, Tensor | None]:
        (name, weight), (bias_name, bias) = self._named(block, path)
        new_bias = None
        if bias is not None:
            new_bias = self._divided(bias_name)(bias).to(self.dtype)
        return self._divided(name)(weight).to(self.dtype), new_bias

    def _named(self, block: int, path: str) -> tuple[tuple[str, Tensor], tuple[str, Tensor | None]]:
        """Return names and values of the weight and the bias of one of a block's projections."""
        module: Any = self.view.layer(block).get_submodule(path)
        prefix = f"model.layers.{block}.{path}"
        return (f"{prefix}.weight", module.weight), (f"{prefix}.bias", module.bias)

    def _run(self, function: FastBlock, parts: Sequence[int], stream: Stream) -> None:
        _run(function, parts, stream, self.progress)

    def _tell(self, block: int) -> None:
        total = len(self.view)
        self.progress.step(block + 1, total, f"Healing ({self.method}), block {block + 1}")

    def _format(self, name: str) -> torch.dtype:
        return self.stored.get(name, self.view.dtype)

    # scale

    def _divided(self, name: str) -> Change:
        kind, factor = self._format(name), self.factor  # nothing that keeps the streams
        return lambda old: (old.detach().float() / factor).to(kind)

    def _rescale(self, seam: Seam) -> None:
        """Find the factor above a seam, and keep it if the KL falls."""
        kind, fitted = wide(self.view.device), self.rows.fitted
        sums = [torch.zeros(self.view.hidden_size, dtype=torch.float64) for _ in range(2)]
        valid = self.valid[:fitted]
        for total, stream in zip(sums, (self.healed, self.dense), strict=True):
            at = 0
            for piece in stream.chunks(0, fitted):
                self.progress.check_cancel()
                mask = valid[at : at + len(piece)]
                at += len(piece)
                total += piece[mask].to(kind).abs().sum(0).cpu().double()
        alive = sums[0] > 0
        before, self.factor = self.factor, float((sums[1] / sums[0])[alive].mean())
        after = NEVER
        if math.isfinite(self.factor) and self.factor > 0:
            after = self._apart_above(seam, self.healed.copy(fitted))
        kept = self._note(seam, after, scale=self.factor)
        if not kept:
            self.factor = before
            return
        for block in range(seam.end, len(self.view)):
            for part, path in enumerate(OUTPUTS):
                if 2 * block + part in self.cut.gone | self.cut.missing:
                    continue
                module: Any = self.view.blocks[block].get_submodule(path)  # its weights may be away
                for name, _ in module.named_parameters():
                    full = f"model.layers.{block}.{path}.{name}"
                    self.tensors[full] = self._divided(full)

    def _note(
        self,
        seam: Seam,
        after: Apart,
        *,
        alpha: float | None = None,
        scale: float | None = None,
    ) -> bool:
        """Record a repair; return whether it is kept, as it is if the KL falls."""
        before, kept = self.now.kl, after.kl < self.now.kl
        kl = after.kl if math.isfinite(after.kl) else None
        self.found.append(
            HealedSeam(
                seam.first,
                seam.end - 1,
                kept,
                before,
                kl,
                alpha=alpha,
                scale=scale,
                removed=self.cut.names[len(self.found)],
            )
        )
        if kept:
            self.now = after
        return kept

    # refit and linear

    def _fit(self, seam: Seam) -> None:
        """Fit the repair of the part before a seam, and keep it if the KL falls."""
        (block, part), fitted = divmod(seam.low - 1, 2), self.rows.fitted
        if not self.kept:
            self._run(self._prepared(block), [part], self.dense)
        self._tell(block)
        self._to_target(seam)
        alpha, made = self._solved(seam, block, part)
        if not made:
            self._note(seam, NEVER)
        else:
            held = self.healed.copy(fitted)
            self._run(self._repaired(block, part, made), [part], held)
            if self._note(seam, self._apart_above(seam, held), alpha=alpha):
                self.tensors |= {key: self.keep(tensor) for key, tensor in made.items()}
                kept = self.cut.thin[block].inputs(part) if seam.narrow else None
                name = f"model.layers.{block}.{OUTPUTS[part]}.weight"
                self.columns |= {} if kept is None else {name: kept}
            else:
                made = {}
        self._run(self._repaired(block, part, made), [part], self.healed)

    def _solved(self, seam: Seam, block: int, part: int) -> tuple[float | None, dict[str, Tensor]]:
        """Return the ridge and the new tensors, as they are stored; none if there is no solution.

        `healed` and `dense` hold the streams before the part and after the seam.
        """
        function, fitted = self.cut.of(self._prepared(block)), self.rows.fitted
        system = self._system(function, part)
        for x, residual, share in self._tokens(function, part, 0, fitted):
            system.add(x, residual, share)
        if not system.is_finite():
            raise NotFiniteError(
                f"NaN or infinity in the stream around blocks {seam.first} to {seam.end - 1}.",
                not_finite_hint(self.dtype),
            )
        alpha, change = self._best(function, part, system)
        if change is None:
            return None, {}
        (name, _), (bias_name, _) = self._named(block, OUTPUTS[part])
        weight, bias = getattr(function, FIELDS[part])
        made = self._new_weights((name, weight), (bias_name, bias), change)
        return alpha, {key: t.detach().to(self._format(key)) for key, t in made.items()}

    def _repaired(self, block: int, part: int, made: Mapping[str, Tensor]) -> FastBlock:
        """Return a block with the tensors ``made`` for one of its projections, if any."""
        function = self.cut.of(self._prepared(block))
        if made:
            (name, _), (bias_name, _) = self._named(block, OUTPUTS[part])
            bias = made.get(bias_name, getattr(function, FIELDS[part])[1])
            new_bias = None if bias is None else bias.to(self.dtype)
            setattr(function, FIELDS[part], (made[name].to(self.dtype), new_bias))
        return function

    def _new_weights(
        self, named: tuple[str, Tensor], named_bias: tuple[str, Tensor | None], change: Tensor
    ) -> dict[str, Tensor]:
        """Return the part's output projection with the solution of the regression in it."""
        (name, weight), (bias_name, bias), kind = named, named_bias, change.dtype
        if self.method == "refit":
            return {name: weight.to(kind) + change.t()}
        turn = change.t() + torch.eye(len(change), dtype=kind, device=change.device)
        made = {name: turn @ weight.to(kind)}
        return made if bias is None else made | {bias_name: turn @ bias.to(kind)}

    def _system(self, function: FastBlock, part: int) -> Normal:
        hidden, inner = getattr(function, FIELDS[part])[0].shape
        return Normal(inner if self.method == "refit" else hidden, hidden, self.view.device)

    def _tokens(
        self, function: FastBlock, part: int, first: int, last: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield features, what the repair should add to the stream, and weights, chunk by chunk.

        `healed` holds the stream before the part that is repaired: the attention or the MLP of
        ``function``.
        """
        kind = wide(self.view.device)
        weight, bias = getattr(function, FIELDS[part])
        weight = weight.to(kind)
        seen: list[Tensor] = []
        function.observe = lambda name, value: seen.append(value.to(kind, copy=True))
        middles, targets = (each.chunks(first, last) for each in (self.healed, self.dense))
        at = first
        for middle, target in zip(middles, targets, strict=True):
            self.progress.check_cancel()
            mask = self.valid[at : at + len(middle)]
            at += len(middle)
            seen.clear()
            (function.mlp_ if part else function.attention_)(middle.clone())
            inner = seen[0][mask.flatten()]
            output = inner @ weight.t()
            if bias is not None:
                output += bias.to(kind)
            wanted = target[mask].to(kind)
            residual = wanted - middle[mask].to(kind) - output
            if self.method == "refit":
                size = wanted.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
                yield inner, residual, size.reciprocal()
            else:
                yield output, residual, torch.ones_like(wanted[:, 0])
        function.observe = None

    def _best(
        self, function: FastBlock, part: int, system: Normal
    ) -> tuple[float | None, Tensor | None]:
        """Return the ridge with the least weighted error on the held-out rows, and its solution."""
        solved = {alpha: system.solve(alpha) for alpha in ALPHAS}
        device, kind = self.view.device, wide(self.view.device)
        changes = {a: d.to(device=device, dtype=kind) for a, d in solved.items() if d is not None}
        errors = dict.fromkeys(changes, 0.0)
        held = self.rows.fitted, len(self.healed)
        for x, residual, share in self._tokens(function, part, *held):
            for alpha, change in changes.items():
                missed = (residual - x @ change).square().mean(-1)
                errors[alpha] += float((share * missed).sum())
        if not errors:
            return None, None
        alpha = min(errors, key=lambda a: errors[a])
        return alpha, changes[alpha]


def _by_block(parts: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield (block, its parts) of rising numbers of parts."""
    for block, some in itertools.groupby(parts, lambda part: part // 2):
        yield block, [part % 2 for part in some]


def _constant(tensor: Tensor) -> Change:
    return lambda _: tensor
