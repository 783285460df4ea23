"""Whether a computation over blocks fits in memory, reads the weights as it goes, or cannot run.

The limit is that of the process on a CPU, and of the device's memory on a GPU. A computation that
does not fit with all weights in memory reads them block by block (`core.model.streaming`). If the
hidden states of all rows do not fit beside that, the rows go through the model in groups, each of
which reads every weight once, or the states are kept on the disk. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core.checkpoint.headers import CheckpointInfo
from core.errors import OptionError
from core.prune import staging
from core.runs import devices, footprint, processes, workspace
from core.runs.devices import GIB, MIB
from core.runs.dtypes import BYTES, Formats, computable, for_gradients
from core.runs.footprint import Footprint, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from core.model.blocks import BlockView
    from core.model.loading import Prepared

CPU_TOKENS = 640
"""Tokens that go through a block together on a CPU: five of the usual rows of 128.

A sweep over 16 rows and 4 blocks of width 768 took 5.5 s on one core of a Zen 4 with 128 tokens,
4.8 s with 256 and with 640, 4.7 s with 1,280 and 4.5 s with 2,048. From 256 on little is gained,
and a small chunk answers a cancel request sooner and needs less memory.
"""
GPU_TOKENS = 16384
"""The same on a GPU. Chosen, not measured: large products, and under 2 GiB of scratch memory for a
block of LLaMA-7B in 16 bits."""
HEAD_TOKENS = 16384
"""Tokens that go through the final norm and the head together: their copies, in float32 too, take
a few hundred MiB at a width of 4,096, however many states a sweep holds. Chosen, not measured."""
LOGITS_BYTES = {"cpu": 2 * 2**26, "gpu": 2 * 2**30}
"""Logits held at once for a gradient, with a copy: see core.importance.taylor.TAYLOR_LOGITS."""
MARGIN = 0.1
"""Share of the free memory that is left alone without --memory-limit."""


@dataclass(frozen=True)
class Demand:
    """What one pass over the weights holds at a time."""

    name: str
    states: int
    """Hidden states of every row."""
    splits: bool = True
    """Whether rows can go through the model in groups."""
    gradients: bool = False
    """Whether a block's gradients and activations are held too."""
    prepared: bool = True
    """Whether a copy of the block's weights is made for computing."""
    resident_states: int | None = None
    """States of every row if the weights are in memory; None: as many."""
    tokens: int | None = None
    """Tokens that go through a block together; None: `CPU_TOKENS` or `GPU_TOKENS`."""
    rows: int | None = None
    """Rows that it takes; None: all."""
    length: int | None = None
    """Tokens of a row; None: as in the other passes."""
    extra: int = 0
    """Bytes that are held beside, whatever the rows."""
    streamed_extra: int | None = None
    """The same if the weights are read block by block; None: as many."""
    streams: bool = True
    """Whether blocks are read; False: all that is needed of them is in ``streamed_extra``."""
    disk_states: float | None = None
    """States of every row on the disk if memory has no room for ``states``, which then are those of
    a chunk of rows that goes through a block; None: they have to be in memory."""


@dataclass(frozen=True)
class Capacity:
    """How a computation runs within its limit."""

    way: str
    """fits, streams or cannot."""
    limit_bytes: int | None
    """None if the free memory is not known; then it is taken to fit."""
    in_memory_bytes: int
    """Needed with all weights in memory."""
    streamed_bytes: int
    """Needed if the weights are read block by block, with the rows in these groups."""
    least_bytes: int
    """The least that streaming can do with, one row at a time where rows can be split."""
    rows: int
    """Rows whose states are held at once."""
    groups: int
    """Passes over the weights, for each thing that is computed."""
    disk_bytes: int = 0
    """Hidden states that are kept on the disk; 0: all are in memory."""

    @property
    def streams(self) -> bool:
        """Whether the weights are read block by block."""
        return self.way == "streams"

    @property
    def group(self) -> int:
        """Rows held at once, 0 if those are all: as `core.importance.branches.Batch` has it."""
        return self.rows if self.groups > 1 else 0

    @property
    def used_bytes(self) -> int:
        """What is needed the way it runs."""
        return self.streamed_bytes if self.streams else self.in_memory_bytes

    def states(self, most: int, size: int, dtype: str, beside: int = 0) -> int:
        """Return how many states of ``size`` numbers fit, at least 2 and at most ``most``.

        Two are part of what is needed anyway; ``beside`` bytes are held for something else.
        """
        if self.limit_bytes is None:
            return most
        state = size * BYTES[computable(dtype)]
        return max(2, min(most, 2 + (self.limit_bytes - self.used_bytes - beside) // state))

    def footprint(
        self,
        info: CheckpointInfo,
        flops: float,
        often: float = 1.0,
        *,
        float64: float = 0.0,
        written: int = 0,
        moved: float = 0.0,
        processes: int = 1,
    ) -> Footprint:
        """Return what a run takes that passes over the weights ``often`` times.

        For each group of rows, that is; weights that fit are read from the disk once. ``moved``:
        bytes of hidden states that are read and written if these are on the disk. The other
        arguments are those of `Footprint`.
        """
        groups = 1 if self.way == "cannot" else self.groups
        fits, states = self.way == "fits", moved if self.disk_bytes else 0.0
        return Footprint(
            memory_bytes=self.in_memory_bytes if fits else self.streamed_bytes,
            way=self.way,
            flops=flops,
            float64_flops=float64,
            passes=math.ceil(often) * groups,
            read_bytes=round(info.stored_bytes * (1 if fits else often * groups) + states),
            written_bytes=written,
            processes=processes,
        )

    def facts(self) -> dict[str, Any]:
        """Return what a dry run says."""
        return {
            "way": self.way,
            "memory_limit_mib": _mib(self.limit_bytes),
            "in_memory_mib": _mib(self.in_memory_bytes),
            "streamed_mib": _mib(self.streamed_bytes if self.way != "cannot" else self.least_bytes),
            "states_on_disk_mib": _mib(self.disk_bytes),
            "rows_at_once": self.rows,
            "passes": self.groups,
        }

    def needs(self) -> dict[str, Any]:
        """Return the same of a computation whose rows are not split, and that passes often."""
        return {k: v for k, v in self.facts().items() if k not in ("rows_at_once", "passes")}

    def folder_of_states(self, folder: Path) -> Path | None:
        """Return where states on the disk are, a run's ``folder``; None: they are in memory.

        Raises `OutputError` if the disk has no room for them.
        """
        if not self.disk_bytes:
            return None
        what = "The hidden states of the calibration rows need"
        staging.check_space(folder / workspace.BOOKKEEPING, self.disk_bytes, what)
        return folder

    def check(self) -> None:
        """Raise `OptionError` if it cannot run."""
        if self.way == "cannot":
            limit = (self.limit_bytes or 0) / GIB
            raise OptionError(
                f"--memory-limit: {limit:.2f} GiB are too little; even block by block this needs "
                f"{self.least_bytes / GIB:.2f} GiB.",
                "Raise the limit, or use fewer samples, shorter rows or fewer metrics.",
            )

    def sentence(self) -> str:
        """Return what happens, for the log."""
        limit = "" if self.limit_bytes is None else f" of {self.limit_bytes / GIB:.2f} GiB"
        disk = ""
        if self.disk_bytes:
            disk = f" Hidden states, {self.disk_bytes / GIB:.2f} GiB, are kept on the disk."
        if not self.streams and self.groups == 1:
            return f"About {self.in_memory_bytes / GIB:.2f} GiB{limit} are needed.{disk}"
        how = "The weights are read block by block" if self.streams else "The weights fit"
        rows = f", for {self.rows} rows at a time" if self.groups > 1 else ""
        return f"{how}{rows}: about {self.used_bytes / GIB:.2f} GiB{limit}.{disk}"


def _mib(value: int | None) -> float | None:
    return None if value is None else round(value / MIB, 1)


def limit_of(device: str, memory_limit: float | None, sharing: int = 1) -> int | None:
    """Return the limit in bytes: as given in GiB, else what is free less a margin, if known.

    On a CPU the memory that this process has already counts as free, and processes that are
    ``sharing`` a run each get an equal part; on GPUs each has its own.
    """
    parts = sharing if devices.meant(device) == "cpu" else 1
    if memory_limit is not None:
        return int(memory_limit * GIB / parts)
    name, free = devices.free_bytes(device)
    if free is None:
        return None
    own = processes.memory_mib() * MIB if name == "cpu" else 0
    return int((free / parts + own) * (1 - MARGIN))


def decide(
    info: CheckpointInfo,
    formats: Formats,
    device: str,
    limit: int | None,
    rows: int,
    tokens: int,
    demands: Sequence[Demand],
) -> Capacity:
    """Return how a computation runs.

    Args:
        info: The checkpoint.
        formats: What weights are held in and computed in.
        device: As ``--device`` has it.
        limit: Bytes, or None for no limit.
        rows: Calibration rows.
        tokens: Tokens of a row.
        demands: The passes, one after another; the largest decides.
    """
    sizes = _Sizes(info, formats, device, tokens)
    needs = demands or (Demand("", 0, prepared=False),)
    found = _decided(sizes, limit, rows, needs)
    if found.way != "cannot" or all(d.disk_states is None for d in needs):
        return found
    found = _decided(sizes, limit, rows, [sizes.of_a_chunk(d, rows) for d in needs])
    return replace(found, disk_bytes=max(sizes.on_disk(d, rows) for d in needs))


def _decided(sizes: _Sizes, limit: int | None, rows: int, needs: Sequence[Demand]) -> Capacity:
    """Return how it runs if no states are on the disk."""
    in_memory = max(sizes.in_memory(d, rows) for d in needs)
    if limit is None or in_memory <= limit:
        streamed = max(sizes.streamed(d, rows) for d in needs)
        return Capacity("fits", limit, in_memory, streamed, streamed, rows, 1)
    least = max(sizes.streamed(d, 1 if d.splits else rows) for d in needs)
    whole = max(sizes.in_memory(d, 1 if d.splits else rows) for d in needs)
    # with the weights in memory, and their states in few groups, nothing is read twice
    held = _most(rows, sizes.chunk, lambda r: _largest(sizes.in_memory, needs, r, rows) <= limit)
    if whole <= limit and held * 4 >= rows:
        groups = math.ceil(rows / held)
        now = _largest(sizes.in_memory, needs, held, rows)
        return Capacity("fits", limit, now, least, least, held, groups)
    if least > limit:
        return Capacity("cannot", limit, in_memory, least, least, 1, rows)
    most = _most(rows, sizes.chunk, lambda r: _largest(sizes.streamed, needs, r, rows) <= limit)
    now = _largest(sizes.streamed, needs, most, rows)
    return Capacity("streams", limit, in_memory, now, least, most, math.ceil(rows / most))


def _largest(
    size: Callable[[Demand, int], int], demands: Sequence[Demand], rows: int, total: int
) -> int:
    return max(size(d, rows if d.splits else total) for d in demands)


def _most(rows: int, chunk: int, fits: Callable[[int], bool]) -> int:
    """Return the most rows that fit: all, whole chunks that go through a block, or fewer; or 1."""
    if fits(rows):
        return rows
    low, high = 0, rows // chunk
    while low < high:  # the most chunks that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * chunk) else (low, middle - 1)
    if low:
        return low * chunk
    return next((r for r in range(min(chunk, rows) - 1, 1, -1) if fits(r)), 1)


class _Sizes:
    """Bytes of the parts of a computation."""

    def __init__(self, info: CheckpointInfo, formats: Formats, device: str, tokens: int) -> None:
        kind = kind_of(device)
        stored = BYTES.get(info.dtype, 4)
        held = BYTES[computable(formats.weights)]
        self.width = BYTES[computable(formats.arithmetic)]
        self.slope = BYTES[for_gradients(computable(formats.arithmetic))]
        self.tokens, self.hidden = tokens, info.hidden
        self.together = CPU_TOKENS if kind == "cpu" else GPU_TOKENS
        self.chunk = max(1, round(self.together / tokens))
        largest = max(info.block_parameters, default=0)
        convert = stored if stored != held else 0
        self.base = footprint.PROCESS_BYTES[kind]
        self.weights = info.parameters * held
        # the block, the next as it is stored, and the one as it is converted
        self.blocks = largest * (held + stored + convert)
        self.prepared = largest * self.width
        self.upcast = largest * self.slope if self.slope != held else 0
        self.gradient = largest * (4 + self.slope)
        head = info.vocab * info.hidden
        self.head = head * (held + convert)
        self.head_upcast = head * self.slope if self.slope != held else 0
        self.logits = LOGITS_BYTES[kind]
        widest = max((s["intermediate"] for s in info.block_shapes), default=0)
        heads = max((s["heads"] for s in info.block_shapes), default=0) * info.head_dim
        channels = 3 * widest + 6 * heads + 3 * info.hidden
        self.channels = channels * self.width
        """Of one token's activations in a block."""

    def of_a_chunk(self, demand: Demand, rows: int) -> Demand:
        """Return a demand with its states on the disk, if they may be there."""
        if demand.disk_states is None:
            return demand
        own = rows if demand.rows is None else demand.rows
        chunk = max(1, round(self.together / (demand.length or self.tokens)))
        return replace(demand, rows=min(own, chunk), splits=False)

    def on_disk(self, demand: Demand, rows: int) -> int:
        """Return the bytes of the states that may be on the disk."""
        own = rows if demand.rows is None else demand.rows
        state = own * (demand.length or self.tokens) * self.hidden * self.width
        return math.ceil((demand.disk_states or 0) * state)

    def _work(self, demand: Demand, rows: int, held: int) -> tuple[int, int]:
        """Return what is held while a block, and while the head computes, apart from weights.

        ``held``: states of every row.
        """
        width = self.slope if demand.gradients else self.width
        rows = rows if demand.rows is None else demand.rows
        tokens = demand.length or self.tokens
        states = held * rows * tokens * self.hidden * width
        seen = min(HEAD_TOKENS, max(1, demand.states) * rows * tokens)
        head = 3 * seen * self.hidden * 4
        lines = rows if demand.gradients else rows * max(1, demand.states)
        together = demand.tokens // tokens if demand.tokens else round(self.together / tokens)
        scratch = min(max(1, together), lines) * tokens * self.channels
        block = scratch + (self.prepared if demand.prepared else 0)
        if demand.gradients:
            block = 4 * scratch + self.upcast + self.gradient
            head += self.logits + self.head_upcast
        return states + block, states + (head if demand.states else 0)

    def in_memory(self, demand: Demand, rows: int) -> int:
        """Return the bytes needed with all weights in memory."""
        own = demand.resident_states
        held = demand.states if own is None else own
        return self.base + self.weights + demand.extra + max(self._work(demand, rows, held))

    def streamed(self, demand: Demand, rows: int) -> int:
        """Return the bytes needed if blocks are read one after another."""
        block, head = self._work(demand, rows, demand.states)
        own = demand.streamed_extra
        extra = self.base + (demand.extra if own is None else own)
        if not demand.streams:
            return extra + max(block, head)
        return extra + max(block + self.blocks, head + self.head)


def view_of(prepared: Prepared, found: Capacity, log: Callable[[str], None]) -> BlockView:
    """Return the model as blocks: in memory, or read block by block.

    Raises what `Capacity.check` and `core.model.loading.load_model` raise.
    """
    from core.model.blocks import BlockView
    from core.model.precision import dtype_name
    from core.model.streaming import StreamedView

    found.check()
    if found.streams or found.groups > 1 or found.disk_bytes:
        log(found.sentence())
    if not found.streams:
        return BlockView(prepared.load(log))
    log(f"Reading {prepared.name} for {prepared.device} as {dtype_name(prepared.dtype)}.")
    return StreamedView(prepared.folder, prepared.dtype, prepared.device, log)
