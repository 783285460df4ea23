"""Perplexity of one text for any set of skipped blocks, sharing computation between the sets.

The hidden state at some depth depends only on what ran before it, so sets that keep the same blocks
and parts of blocks up to that depth share the state. States are cached by what was kept so far, the
dense model's first, so that skipping late blocks costs little more than the head. The text is
processed in chunks of windows, so a partial answer is available at any time, and an abandoned
question leaves its results for later ones.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from core.checkpoint.drop import Removal
from core.errors import NotFiniteError
from core.evaluate.perplexity import head_losses
from core.importance.branches import make_batch
from core.model.blocks import BlockView
from core.model.memory import out_of_memory_explained
from core.model.precision import not_finite_hint

CHUNK_TOKENS = {"cpu": 256, "cuda": 16384, "mps": 4096}
"""Tokens that pass through a block together, and after which a question can give way.

On a CPU 256 take 0.97 times as long a token as 1,024 (products of SmolLM2's sizes on one core of a
Zen 5), need a quarter of the memory, and a first figure of 512 tokens occupies two cores."""
HEAD_TOKENS = 128
"""Tokens whose logits a CPU holds at a time: with a vocabulary of 49,152, 24 MiB in float32."""
NARROW = 1024
"""Up to this hidden size a CPU computes one chunk per core: intra-op threading costs more than it
gains for small matmuls, and many times more on a busy machine."""


@dataclass(frozen=True)
class Answer:
    """A perplexity over the first ``windows`` windows of a text."""

    ppl: float
    windows: int
    predictions: int
    block_passes: int
    """Passes of a chunk through a block computed for this answer; 0 if all was cached."""
    dense_ppl: float | None = None
    """Perplexity of the whole model on the same windows; None if it has not been computed."""
    stderr: float | None = None
    """Standard error of ``log(ppl / dense_ppl)`` over the windows, which both models share; None if
    it is unknown, or with fewer than two windows."""


Unit = int | tuple[int, str]
"""What runs: a whole block, (block, attention or mlp) of one that is skipped in part, or (block,
which neurons) of one with a narrower MLP."""


Layers = Mapping[tuple[int, str], torch.nn.Module]
"""Blocks with a narrower MLP, whose weights are copies, by their units."""


class WhatIf:
    """One text evaluated on one model. Not thread-safe."""

    def __init__(
        self, view: BlockView, windows: Sequence[Sequence[int]], room_bytes: float
    ) -> None:
        """Evaluate ``view`` on equally long ``windows``, caching up to ``room_bytes`` of states.

        Raises `DataError` for token ids outside the vocabulary.
        """
        self._view = view
        ids = make_batch(windows, view).ids
        tokens = ids.shape[1]
        small = view.device.type == "cpu" and view.hidden_size <= NARROW
        self._threads = torch.get_num_threads() if small else 1
        rows = max(1, CHUNK_TOKENS.get(view.device.type, 1024) // tokens)
        rows = min(rows, math.ceil(len(ids) / self._threads))
        self._chunks = ids.split(_sizes(len(ids), rows, self._threads))
        self.windows, self._tokens = ids.shape
        width = torch.finfo(view.dtype).bits // 8
        self._state_bytes = ids.numel() * view.hidden_size * width
        self._losses: dict[tuple[Unit, ...], list[list[float]]] = {}
        self._states: list[OrderedDict[tuple[Unit, ...], Tensor]] = []
        self._plan(int(room_bytes // max(1, self._state_bytes)))

    def _plan(self, most: int) -> None:
        """Decide which states to cache: the dense model's at every n-th block, then others."""
        blocks = len(self._view)
        dense = min(blocks, max(0, most - most // 3))
        self._every = math.ceil(blocks / dense) if dense else 0
        self._others = max(0, min(blocks, most - dense))
        self._states = [OrderedDict() for _ in self._chunks]

    @property
    def state_bytes(self) -> int:
        """Bytes of the states cached now."""
        return sum(s.nbytes for chunk in self._states for s in chunk.values())

    def forget(self) -> None:
        """Drop answers and states."""
        self._losses.clear()
        self.forget_states()

    def forget_states(self) -> None:
        """Free the states; keep the answers."""
        for chunk in self._states:
            chunk.clear()

    def answer(
        self,
        skip: Removal | Iterable[int],
        on_part: Callable[[Answer], None] | None = None,
        check: Callable[[], None] | None = None,
        windows: int | None = None,
    ) -> Answer:
        """Return the perplexity without ``skip``, blocks or parts of them too.

        ``on_part`` gets the partial answer after every chunk; ``check`` is called before each block
        and may raise to give up, in which case finished chunks are kept. ``windows`` limits the
        evaluation to the first windows; a later answer for more of them continues from there.

        Raises:
            PlanError: A block or its part does not exist, or nothing would be left.
            NotFiniteError: A loss is NaN or infinite.
        """
        removal = self._view.check_skip(skip)
        narrow = self._view.narrowed(removal)
        layers = {_narrow(removal, block): layer for block, layer in narrow.items()}
        kept = tuple(self._units(removal))
        losses = self._losses.setdefault(kept, [])
        most = self.windows if windows is None else windows
        ends = itertools.accumulate(map(len, self._chunks))
        numbers = range(len(losses), 1 + next(at for at, end in enumerate(ends) if end >= most))
        passes = 0
        with out_of_memory_explained("measuring perplexity"):
            for found, computed in self._chunk_losses(numbers, kept, check, layers):
                losses.append(found)
                passes += computed
                if on_part:
                    on_part(self._sum(kept, passes, most))
        return self._sum(kept, passes, most)

    def _units(self, removal: Removal) -> Iterator[Unit]:
        """Yield what is left to run, in order."""
        for block in range(len(self._view)):
            if block in removal.attention:
                yield block, "mlp"
            elif block in removal.mlp:
                yield block, "attention"
            elif block in removal.neurons:
                yield _narrow(removal, block)
            elif block not in removal.drop:
                yield block

    def _chunk_losses(
        self,
        numbers: range,
        kept: tuple[Unit, ...],
        check: Callable[[], None] | None,
        layers: Layers,
    ) -> Iterable[tuple[list[float], int]]:
        """Yield, for each chunk in ``numbers``, its losses and the number of blocks run."""

        @torch.inference_mode()
        def losses(number: int) -> tuple[list[float], int]:
            hidden, computed = self._run(number, kept, check, layers)
            return self._head(hidden, self._chunks[number], check), computed

        if self._threads == 1:
            yield from map(losses, numbers)
            return
        with ThreadPoolExecutor(
            self._threads, initializer=lambda: torch.set_num_threads(1)
        ) as pool:
            for at in range(0, len(numbers), self._threads):
                yield from pool.map(losses, numbers[at : at + self._threads])

    def _head(self, hidden: Tensor, ids: Tensor, check: Callable[[], None] | None) -> list[float]:
        """Return the mean loss of every window; on a CPU a few windows' logits at a time."""
        on_cpu = hidden.device.type == "cpu"
        rows = max(1, HEAD_TOKENS // ids.shape[1]) if on_cpu else len(ids)
        losses: list[float] = []
        for states, wanted in zip(hidden.split(rows), ids.split(rows), strict=True):
            if check:
                check()
            losses += head_losses(self._view.model, self._view.final_norm(states), wanted)
        return losses

    def _sum(self, kept: tuple[Unit, ...], passes: int, most: int) -> Answer:
        every = self._windows_of(kept)[:most]
        mean = math.fsum(every) / len(every)
        if not math.isfinite(mean):
            raise NotFiniteError(
                "The loss of a window is NaN or infinite.", not_finite_hint(self._view.dtype)
            )
        dense = self._windows_of(tuple(range(len(self._view))))[: len(every)]
        known = len(dense) == len(every)
        return Answer(
            _exp(mean),
            len(every),
            len(every) * (self._tokens - 1),
            passes,
            _exp(math.fsum(dense) / len(dense)) if known else None,
            _stderr([one - other for one, other in zip(every, dense, strict=True)])
            if known
            else None,
        )

    def _windows_of(self, kept: tuple[Unit, ...]) -> list[float]:
        """Return the losses of all windows computed so far with only ``kept``."""
        return [value for chunk in self._losses.get(kept, []) for value in chunk]

    def _run(
        self,
        number: int,
        kept: tuple[Unit, ...],
        check: Callable[[], None] | None,
        layers: Layers,
    ) -> tuple[Tensor, int]:
        """Return the last block's output for one chunk, and the number of blocks run."""
        states = self._states[number]
        depth = next((d for d in range(len(kept), 0, -1) if kept[:d] in states), 0)
        if depth:
            hidden = states[kept[:depth]]
            states.move_to_end(kept[:depth])
        else:
            hidden = self._view.embed(self._chunks[number])
        for at in range(depth, len(kept)):
            if check:
                check()
            unit = kept[at]
            block, part = unit if isinstance(unit, tuple) else (unit, "")
            layer = layers.get((block, part))
            if layer is not None:
                hidden = self._view.call_layer(layer, block, hidden)
            else:
                hidden = self._view.run_block(block, hidden, part)
            self._keep(states, kept[: at + 1], hidden)
        return hidden, len(kept) - depth

    def _keep(
        self, states: OrderedDict[tuple[Unit, ...], Tensor], prefix: tuple[Unit, ...], state: Tensor
    ) -> None:
        if not self._every or len(prefix) % self._every:
            return
        states[prefix] = state
        others = [p for p in states if not _is_dense(p)]
        for oldest in others[: max(0, len(others) - self._others)]:
            del states[oldest]


def _sizes(windows: int, rows: int, threads: int) -> list[int]:
    """Return the windows of each chunk: ``rows``, but one of each of the first ``threads``.

    So that all cores work on the first figure, which is over few windows.
    """
    first = [1] * min(threads, windows) if threads > 1 and rows > 1 else []
    left = windows - len(first)
    return first + [min(rows, left - at) for at in range(0, left, rows)]


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 709 else math.inf


def _stderr(differences: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None with fewer than two values."""
    if len(differences) < 2:
        return None
    return statistics.stdev(differences) / math.sqrt(len(differences))


def _narrow(removal: Removal, block: int) -> tuple[int, str]:
    """Return the unit of a block whose MLP keeps some neurons: which, by order and number."""
    return block, f"{removal.neurons[block]} of {removal.order}"


def _is_dense(prefix: tuple[Unit, ...]) -> bool:
    """Whether these kept blocks are the model's first ones, with nothing skipped."""
    return prefix == tuple(range(len(prefix)))
