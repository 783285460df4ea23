"""Losses of a model for many sets of skipped blocks at once, with shared prefixes computed once.

Keep a stack of hidden states. Sets with a common prefix share one hidden state; once they
diverge, the state is forked: the sets that skip the block keep a copy from before it. Each block
is applied to all states that need it, so its weights are read once, in order: METHODS 1,
"One sweep".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from core.errors import CheckpointError, DataError
from core.importance import passes as counting
from core.importance.forward import (
    HEAD_TOKENS,
    FastBlock,
    Head,
    Scratch,
    StockBlock,
    chunk_rows,
    is_plain,
)
from core.model.blocks import BlockView
from core.model.precision import arithmetic_of
from core.model.tokens import check_ids, embedded
from core.runs.progress import SILENT, InParts, Progress
from core.runs.ranks import ALONE, Ranks, check_rows

Narrow = Mapping[tuple[int, str], tuple[int, ...]]
"""(block, name of a version) -> the MLP neurons that it keeps."""


class States(Protocol):
    """States [rows, tokens, hidden] of rows that come in groups: a tensor, or a stream on disk."""

    def split(self, size: int, /) -> Iterable[Tensor]:
        """Return them, ``size`` rows at a time."""


Observer = Callable[[int, Tensor, Tensor], None]
"""Called as (block, before, after) with the dense states [rows, tokens, hidden] of a block."""


@dataclass(frozen=True)
class Batch:
    """Calibration rows as tensors; shorter rows are right-padded, and the padding is ignored."""

    ids: Tensor
    """Token ids [rows, tokens]."""
    lengths: Tensor
    """True length of each row [rows]."""
    group: int = 0
    """Rows whose states are held at once, one pass over the weights for each group; 0: all."""
    ranks: Ranks = ALONE
    """The processes that share the rows; ``ids`` and ``lengths`` are this one's part of them."""
    all_lengths: tuple[int, ...] = ()
    """Lengths of the rows of all processes; empty if there are no others."""

    @property
    def rows(self) -> int:
        """Number of rows, with those of other processes."""
        return len(self.all_lengths) or len(self.lengths)

    @property
    def groups(self) -> list[Batch]:
        """The rows in groups, in order; one if all are held at once."""
        size = self.group or len(self.lengths)
        parts = zip(self.ids.split(size), self.lengths.split(size), strict=True)
        return [Batch(ids, lengths) for ids, lengths in parts]

    @property
    def predictions(self) -> int:
        """Number of next-token predictions over all rows, with those of other processes."""
        if self.all_lengths:
            return sum(self.all_lengths) - len(self.all_lengths)
        return int((self.lengths - 1).sum())

    @property
    def valid(self) -> Tensor:
        """Mask of the positions that hold a token, [rows, tokens] bool."""
        at = torch.arange(self.ids.shape[1], device=self.ids.device)
        return at[None] < self.lengths[:, None]


def make_batch(
    rows: Sequence[Sequence[int]], view: BlockView, group: int = 0, ranks: Ranks = ALONE
) -> Batch:
    """Return ``rows`` of token ids as a `Batch` on the model's device, ``group`` held at once.

    With several processes each gets its part of the rows; all of them make the same call.

    Raises:
        DataError: There are no rows, a row has fewer than two tokens, or a token id is outside the
            model's vocabulary.
    """
    if not rows or min(len(row) for row in rows) < 2:
        raise DataError(
            "Calibration needs at least one row, and at least two tokens in every row.",
            "Use a longer text, or rows with more tokens.",
        )
    check_ids(rows, embedded(view.model))
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(list(row))
    lengths = torch.tensor([len(row) for row in rows])
    if ranks.size > 1:
        check_rows(len(rows), ranks.size)
        own = ranks.share(len(rows))
        every = tuple(lengths.tolist())
        ids, lengths = ids[own].to(view.device), lengths[own].to(view.device)
        return Batch(ids, lengths, group, ranks, every)
    return Batch(ids.to(view.device), lengths.to(view.device), group)


@dataclass(frozen=True)
class Losses:
    """Losses of every set, per row."""

    nll_sum: Tensor
    """Summed negative log-likelihood [sets, rows], float64, on the CPU."""
    counts: Tensor
    """Predictions per row [rows]."""
    kl_sum: Tensor | None = None
    """Summed KL(dense || without the set) [sets, rows], float64, on the CPU; None if not wanted."""
    passes: int = 0
    """Block passes that were computed, shared prefixes once."""
    dense: Tensor | None = None
    """The dense model's last states [rows, tokens, hidden], which later passes can compare with.

    Of this process's rows alone; everything else is of all rows.
    """

    @property
    def nll(self) -> list[float]:
        """Mean negative log-likelihood per set, over all predictions."""
        return (self.nll_sum.sum(1) / self.counts.sum()).tolist()

    @property
    def kl(self) -> list[float]:
        """Mean KL(dense || without the set) per set, over all predictions, in nats."""
        if self.kl_sum is None:
            raise ValueError("The pass did not compute KL.")
        return (self.kl_sum.sum(1) / self.counts.sum()).tolist()

    @property
    def sample_nll(self) -> list[list[float]]:
        """Mean negative log-likelihood per set and row."""
        return (self.nll_sum / self.counts).tolist()

    @property
    def sample_kl(self) -> list[list[float]]:
        """Mean KL(dense || without the set) per set and row, in nats; empty if not wanted."""
        return [] if self.kl_sum is None else (self.kl_sum / self.counts).tolist()

    @property
    def perplexity(self) -> list[float]:
        """Perplexity per set: exp of the mean over all predictions."""
        return (self.nll_sum.sum(1) / self.counts.sum()).exp().tolist()


def losses_without(
    view: BlockView,
    batch: Batch,
    sets: Sequence[frozenset[Any]],
    progress: Progress = SILENT,
    *,
    observe: Observer | None = None,
    sublayers: bool = False,
    want_losses: bool = True,
    want_kl: bool = False,
    dense: States | None = None,
    label: str = "Block",
    narrow: Narrow | None = None,
    keep: Callable[[Tensor], None] | None = None,
) -> Losses | None:
    """Return the losses of the model without each of ``sets`` of blocks, in one pass.

    Args:
        view: The model.
        batch: Calibration rows.
        sets: Units to skip; a unit is a block number, or with ``sublayers`` a pair
            ``(block, "attention" | "mlp")``. Equal sets are computed once.
        progress: Updated after every block; cancellation takes effect between chunks of rows.
        observe: Gets the dense states around every block; the first set must be the empty one.
        sublayers: Units are attention and feed-forward parts.
        want_losses: If False, skip the head and return None.
        want_kl: Also compute KL(dense || without the set); one of the sets must be the empty one.
        dense: The dense model's last states on this batch, from an earlier pass: then none need be.
            Of a batch without groups, a tensor.
        label: Name of a step in progress messages.
        narrow: With ``sublayers``: versions of MLPs with fewer neurons. A set that has the unit
            ``(block, "mlp")`` and one of these, ``(block, name)``, runs that version instead.
        keep: With groups: takes each group's dense last states if they are computed; the result
            lacks them.

    Memory: one state of [rows, tokens, hidden] per distinct set, one block's prepared weights, and
    the head's work on `HEAD_TOKENS` tokens. If the batch has groups, the rows are those of a group.

    If several processes share the batch, all of them call this and get the losses of all rows.
    """
    own = _losses_of(
        view, batch, sets, progress,
        observe=observe, sublayers=sublayers, want_losses=want_losses,
        want_kl=want_kl, dense=dense, label=label, narrow=narrow, keep=keep,
    )  # fmt: skip
    if own is None or batch.ranks.size == 1:
        return own
    kl = own.kl_sum
    parts = batch.ranks.gather((own.nll_sum, own.counts, kl))
    return Losses(
        torch.cat([nll for nll, _, _ in parts], 1),
        torch.cat([counts for _, counts, _ in parts]),
        None if kl is None else torch.cat([part for _, _, part in parts if part is not None], 1),
        own.passes,
        own.dense,
    )


def _losses_of(
    view: BlockView,
    batch: Batch,
    sets: Sequence[frozenset[Any]],
    progress: Progress,
    *,
    observe: Observer | None,
    sublayers: bool,
    want_losses: bool,
    want_kl: bool,
    dense: States | None,
    label: str,
    narrow: Narrow | None,
    keep: Callable[[Tensor], None] | None = None,
) -> Losses | None:
    """Return the losses on the rows of this process."""
    groups = batch.groups
    if len(groups) > 1:
        of_dense = dense.split(batch.group) if dense is not None else [None] * len(groups)
        part = InParts(progress, [1.0] * len(groups))
        found = []
        for number, (own, reference) in enumerate(zip(groups, of_dense, strict=True), start=1):
            part.begin()
            one = _losses_of(
                view, own, sets, part,
                observe=observe, sublayers=sublayers, want_losses=want_losses,
                want_kl=want_kl, dense=reference, narrow=narrow,
                label=f"Rows {number} of {len(groups)}, {label.lower()}",
            )  # fmt: skip
            if one is not None and one.dense is not None and keep:
                if reference is None:
                    keep(one.dense)
                one = replace(one, dense=None)
            if one is not None:
                found.append(one)
        return _joined(found)
    if dense is not None and not isinstance(dense, Tensor):
        raise ValueError("Dense states of a batch without groups are a tensor.")
    with torch.inference_mode():
        walk = _Walk(view, batch, sets, progress, sublayers, narrow)
        for block in range(len(view)):
            walk.run(block, observe, label)
        if not want_losses:
            progress.step(walk.total, walk.total, "Scores")
            return None
        return walk.divergences(dense) if want_kl else walk.losses()


def _joined(parts: Sequence[Losses]) -> Losses | None:
    """Return the losses of all groups of rows; None if there are none."""
    if not parts:
        return None
    with_kl = [part.kl_sum for part in parts if part.kl_sum is not None]
    dense = [part.dense for part in parts if part.dense is not None]
    return Losses(
        torch.cat([part.nll_sum for part in parts], 1),
        torch.cat([part.counts for part in parts]),
        torch.cat(with_kl, 1) if with_kl else None,
        sum(part.passes for part in parts),
        torch.cat(dense) if dense else None,
    )


def states_without(
    view: BlockView,
    batch: Batch,
    sets: Sequence[frozenset[Any]],
    check: Progress = SILENT,
    *,
    sublayers: bool = False,
) -> list[Tensor]:
    """Return the last block's output without each of ``sets``, in one pass.

    Each is [rows, tokens, hidden], before the final norm; equal sets share one tensor. Units are
    those of `losses_without`. If several processes share the batch: of this one's rows.
    """
    with torch.inference_mode():
        walk = _Walk(view, batch, sets, check, sublayers)
        for block in range(len(view)):
            walk.run(block, None, "Block")
    slot_of = {member: slot for slot, members in enumerate(walk.members) for member in members}
    return [walk.states[slot_of[number]] for number in range(len(sets))]


class _Walk:
    """The pass itself: a stack of states, and the sets that each of them represents."""

    def __init__(
        self,
        view: BlockView,
        batch: Batch,
        sets: Sequence[frozenset[Any]],
        progress: Progress,
        sublayers: bool,
        narrow: Narrow | None = None,
    ) -> None:
        self.narrow: Narrow = narrow or {}
        self.view, self.batch, self.sets, self.progress = view, batch, sets, progress
        self.sublayers = sublayers
        self.dtype = arithmetic_of(view.dtype, view.device)
        self.scratch = Scratch()
        rows, tokens = batch.ids.shape
        distinct = len(set(sets))
        self.states = torch.empty(
            distinct, rows, tokens, view.hidden_size, dtype=self.dtype, device=view.device
        )
        self.states[0] = view.embed(batch.ids).to(self.dtype)
        self.members: list[list[int]] = [list(range(len(sets)))]
        self.chunk = chunk_rows(view.device, tokens)
        self.done, self.total = 0, _work(view, sets, sublayers, self.narrow)

    def units(self, block: int) -> list[tuple[Any, Callable[[Tensor], None]]]:
        """Return (unit, in-place function) of the block's parts."""
        if is_plain(self.view.layer(block)):
            fast = FastBlock(self.view, block, self.dtype, self.scratch)
            if self.sublayers:
                found = [((block, "attention"), fast.attention_), ((block, "mlp"), fast.mlp_)]
                return found + [
                    ((block, name), fast.narrowed(kept))
                    for (at, name), kept in self.narrow.items()
                    if at == block and any((at, name) in one for one in self.sets)
                ]

            def both(hidden: Tensor) -> None:
                fast.attention_(hidden)
                fast.mlp_(hidden)

            return [(block, both)]
        if self.sublayers:
            raise CheckpointError(
                f"Block {block} is not a plain decoder layer, so its parts cannot be scored "
                "separately.",
                "Remove sublayers from --metrics.",
            )
        return [(block, StockBlock(self.view, block, self.dtype))]

    def run(self, block: int, observe: Observer | None, label: str) -> None:
        """Apply the block to every state that does not skip it."""
        before = self.states[0].clone() if observe else None
        for unit, function in self.units(block):
            for first, last in self._split(unit):
                flat = self.states[first:last].flatten(0, 1)
                for piece in flat.split(self.chunk):
                    self.progress.check_cancel()
                    function(piece)
                self.done += last - first
        if observe and before is not None:
            observe(block, before, self.states[0])
        self.progress.step(self.done, self.total, f"{label} {block + 1} of {len(self.view)}")

    def _split(self, unit: Any) -> list[tuple[int, int]]:
        """Fork the states of sets that skip ``unit``; return the slot ranges to run it on."""
        run: list[int] = []
        for slot in range(len(self.members)):
            instead = unit in self.narrow  # runs only for the sets that name it
            out = [m for m in self.members[slot] if (unit in self.sets[m]) != instead]
            stay = [m for m in self.members[slot] if (unit in self.sets[m]) == instead]
            if out and stay:
                self.states[len(self.members)].copy_(self.states[slot])
                self.members.append(out)
                self.members[slot] = stay
            if stay:
                run.append(slot)
        ranges: list[tuple[int, int]] = []
        for slot in run:
            if ranges and ranges[-1][1] == slot:
                ranges[-1] = (ranges[-1][0], slot + 1)
            else:
                ranges.append((slot, slot + 1))
        return ranges

    def losses(self) -> Losses:
        """Run the head on all positions that predict a token."""
        batch, slots = self.batch, len(self.members)
        head = Head(self.view, self.dtype, self.scratch)
        rows, tokens = batch.ids.shape
        predicts, targets = batch.valid[:, 1:], batch.ids[:, 1:]
        states = self.states[:slots].flatten(0, 1)  # [slots * rows, tokens, hidden]
        sums = torch.zeros(slots * rows, dtype=torch.float64)
        step = max(1, HEAD_TOKENS // tokens)
        for first in range(0, len(states), step):
            lines = torch.arange(first, min(first + step, len(states)), device=states.device)
            wanted = predicts[lines % rows]
            normed = head.normed_(states[first : first + step, :-1][wanted])
            nll = head.losses(normed, targets[lines % rows][wanted], self.progress.check_cancel)
            line_of = lines[:, None].expand_as(wanted)[wanted]
            sums.index_add_(0, line_of.cpu(), nll.cpu().double())
        return self._result(sums.view(slots, rows))

    def divergences(self, reference: Tensor | None) -> Losses:
        """Run the head on all positions that predict a token: losses, and KL from ``reference``.

        By default that is the state in slot 0, which the empty set never leaves.
        """
        batch, slots = self.batch, len(self.members)
        if reference is None:
            if not any(not self.sets[member] for member in self.members[0]):
                raise ValueError("KL needs the empty set among the sets.")
            reference = self.states[0].clone()
        head = Head(self.view, self.dtype, self.scratch)
        rows, tokens = batch.ids.shape
        predicts, targets = batch.valid[:, 1:], batch.ids[:, 1:]
        nll_sum = torch.zeros(slots, rows, dtype=torch.float64)
        kl_sum = torch.zeros_like(nll_sum)
        step = max(1, min(self.chunk, HEAD_TOKENS // 8 // tokens))
        for first in range(0, rows, step):
            here = slice(first, min(first + step, rows))
            wanted, labels = predicts[here], targets[here][predicts[here]]
            row_of = torch.arange(here.start, here.stop, device=wanted.device)
            row_of = row_of[:, None].expand_as(wanted)[wanted].cpu()
            together = max(1, HEAD_TOKENS // max(1, len(labels)))
            dense = head.normed_(reference[here, :-1][wanted])
            for low in range(0, slots, together):
                some = self.states[low : min(low + together, slots)]
                normed = torch.stack([head.normed_(one[here, :-1][wanted]) for one in some])
                nll, kl = head.divergences(dense, normed, labels, self.progress.check_cancel)
                for sums, values in ((nll_sum, nll), (kl_sum, kl)):
                    sums[low : low + len(some)].index_add_(1, row_of, values.cpu().double())
        return self._result(nll_sum, kl_sum, reference)

    def _result(self, nll: Tensor, kl: Tensor | None = None, dense: Tensor | None = None) -> Losses:
        """Give every set the sums [slots, rows] of its slot."""
        slot_of = torch.empty(len(self.sets), dtype=torch.long)
        for slot, members in enumerate(self.members):
            slot_of[members] = slot
        self.progress.step(self.total, self.total, "Losses")
        counts = (self.batch.lengths - 1).cpu()
        kl = None if kl is None else kl[slot_of]
        return Losses(nll[slot_of], counts, kl, self.done, dense)


def _work(view: BlockView, sets: Sequence[frozenset[Any]], sublayers: bool, narrow: Narrow) -> int:
    """Return the number of unit passes, plus the head's work in the same unit."""
    units: list[Any] = list(range(len(view)))
    if sublayers:
        units = [(b, part) for b in units for part in ("attention", "mlp")]
    passes, states = counting.shared(units, sets)
    passes += sum(unit in narrow for one in set(sets) for unit in one)
    block = sum(p.numel() for p in view.blocks[0].parameters())
    return passes + max(1, round(states * view.head_size / block))
