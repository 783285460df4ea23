"""Memory, bytes read and time of every command at its defaults, by roofline; no torch.

Time is the largest of three: operations at a share of the device's peak, weights and states through
its memory, and the checkpoint from the disk. If the weights fit they are read from the disk once,
before the computation; if not, each pass reads them while it computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.budget import demand as versions
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.estimate.machines import (
    BANDWIDTH_SHARE,
    DISK_BYTES_PER_S,
    MATMUL_SHARE,
    Machine,
)
from core.heal import demand as healing
from core.heal import seams
from core.importance import capacity, passes
from core.importance import estimate as work
from core.importance.capacity import Capacity, Demand
from core.prune.plan import default_protection
from core.prune.version_results import VERSIONS
from core.quantize import plan as quantizing
from core.runs.dtypes import BYTES, Formats, choose, computable, native_formats
from core.search.rehearsal import STATES_BYTES
from core.width.command import HEAL_LENGTH, HEAL_SAMPLES, HEAL_TOKENS

TEXT_TOKENS = 300_000
"""Tokens that perplexity is measured on: about WikiText-2's test set."""
STEPS, BATCH, CUTOFF = 1000, 64, 256
"""Of a training: 16 M tokens."""
GPUS = 8
"""Of the training that several processes share."""
PLANS = 10
"""Solved plans that a budget run measures whole."""
SEARCHED = 10
"""Rows of a search at least."""
ADAM_BYTES = 16
"""Of a trained weight: float32 with its gradient and two moments."""


@dataclass(frozen=True)
class Row:
    """What one computation takes."""

    command: str
    what: str
    way: str
    """fits, streams or cannot; whole: it needs all weights, which fit; no memory: they do not."""
    memory_bytes: int
    """In the way that it runs; if it cannot, what it would need."""
    limit_bytes: int
    flops: float
    read_bytes: int
    """From the disk; states that are kept there count when they are written too."""
    passes: int
    """How often the weights pass through the device."""
    compute_s: float
    """At a share of the device's peak."""
    device_s: float
    """Of the weights through the device's memory."""
    disk_s: float
    seconds: float | None
    """None if it cannot run."""


class Table:
    """The rows for one model on one machine."""

    def __init__(
        self,
        info: CheckpointInfo,
        machine: Machine,
        *,
        limit: int | None = None,
        disk: float = DISK_BYTES_PER_S,
    ) -> None:
        """Estimate for ``info``; ``limit`` is in bytes, by default nine tenths of the device."""
        self.info, self.machine, self.disk = info, machine, disk
        self.limit = limit or int(machine.memory_bytes * (1 - capacity.MARGIN))
        native = native_formats("cuda")
        found = choose("auto", info.dtype, "cuda", native, "blocks")
        self.formats: Formats = found
        self.width = BYTES[computable(found.weights)]
        self.stored = info.parameters * BYTES.get(info.dtype, 4)

    def rows(self) -> list[Row]:
        """Return every command at its defaults."""
        info, blocks = self.info, self.info.blocks
        ten, tokens = 10, 128
        once = self.forward_flops(ten, tokens)
        rounds = min(blocks // 2, max(0, blocks - 2))
        pairs = [frozenset(), *(frozenset({i}) for i in range(blocks))]
        pairs += [frozenset({i, j}) for i in range(blocks) for j in range(i + 1, blocks)]
        pair_passes, states = passes.shared(range(blocks), pairs)
        block = work.block_flops(info, 0, ten, tokens) if blocks else 0.0
        head = work.head_flops(info, ten, tokens)
        found = [
            self.row("importance", "perplexity and KL without each block, 10 x 128 tokens",
                     work.sweep_flops(info, ten, tokens), 1, ten, tokens,
                     Demand("sweep", blocks + 3)),
            self.row("importance", "Taylor, 10 x 128 tokens",
                     work.taylor_flops(info, ten, tokens), 2, ten, tokens,
                     Demand("taylor", blocks + 3, splits=False, gradients=True)),
            self.row("importance", "Block Influence, angular distance, 10 x 128 tokens",
                     once, 1, ten, tokens, Demand("sweep", 2)),
            self.row("importance", "perplexity without each part of a block, 10 x 128 tokens",
                     2 * work.sweep_flops(info, ten, tokens), 1, ten, tokens,
                     Demand("sublayers", 2 * blocks)),
            self.row("importance", f"greedy removal (SLEB) of {rounds} blocks, 10 x 128 tokens",
                     work.greedy_flops(info, ten, tokens, None), rounds, ten, tokens,
                     Demand("sleb", blocks)),
            self.pairs(pair_passes * block + states * head, states, ten, tokens),
            self.row("width", "LLM-Pruner, 10 x 64 tokens", work.taylor_flops(info, 10, 64), 2,
                     10, 64, Demand("gradients", blocks + 3, splits=False, gradients=True)),
            self.row("width", "FLAP, 1,024 x 128 tokens", self.forward_flops(1024, 128), 1, 1024,
                     128, Demand("statistics", 1)),
            self.row("width", "Wanda-sp, 128 x 128 tokens", 2 * self.forward_flops(128, 128), 1,
                     128, 128, Demand("statistics", 2, splits=False)),
            self.row("evaluate", f"perplexity of {TEXT_TOKENS:,} tokens in windows of 128",
                     self.forward_flops(TEXT_TOKENS // 128, 128), 1, TEXT_TOKENS // 128, 128,
                     Demand("windows", 2, prepared=False, resident_states=0, tokens=65536)),
            self.budget(ten, tokens),
            self.cut(),
            self.healed_cut(),
            self.healed_width(),
            self.healed_search(ten, tokens),
            self.training("LoRA", adapters=True),
            self.training(f"LoRA with {GPUS} processes, a GPU each", adapters=True, gpus=GPUS),
            *([self.training("LoRA on a base in 4 bits (NF4)", adapters=True, small=True)]
              if all(one.ok for one in quantizing.possible(info)) else []),
            self.training("full", adapters=False),
            self.decoding(),
        ]  # fmt: skip
        return found

    def forward_flops(self, rows: int, tokens: int) -> float:
        """Return the operations of one pass over the model."""
        blocks = sum(work.block_flops(self.info, b, rows, tokens) for b in range(self.info.blocks))
        return blocks + work.head_flops(self.info, rows, tokens)

    def room(self, rows: int, tokens: int, *demands: Demand) -> Capacity:
        """Return how it runs within the memory."""
        return capacity.decide(self.info, self.formats, "cuda", self.limit, rows, tokens, demands)

    def row(
        self, command: str, what: str, flops: float, often: float, rows: int, tokens: int,
        *demands: Demand, exact: float = 0.0, through: float = 0.0,
    ) -> Row:  # fmt: skip
        """Return the row of a computation that passes over the weights ``often`` times.

        ``exact``: operations in float64. ``through``: how often the states of the last demand's
        rows go through a block, which reads and writes them if they are on the disk.
        """
        room = self.room(rows, tokens, *demands)
        groups = room.groups if room.way != "cannot" else 1
        streams = room.way != "fits"
        read = round(self.stored * often * groups) if streams else self.stored
        if room.disk_bytes:
            read += round(2 * through * room.disk_bytes / (demands[-1].disk_states or 1))
        times = math.ceil(often) * groups
        return self.timed(
            command,
            what,
            room.way,
            room.in_memory_bytes if not streams else room.streamed_bytes,
            flops,
            read,
            times,
            overlapped=streams,
            exact=exact,
        )

    def timed(
        self, command: str, what: str, way: str, memory: int, flops: float, read: int,
        times: int, *, overlapped: bool, exact: float = 0.0,
    ) -> Row:  # fmt: skip
        """Return a row with its times; ``overlapped``: the disk is read while it computes."""
        compute = flops / (self.machine.matmul_flops_per_s * MATMUL_SHARE)
        compute += exact / (self.machine.float64_flops_per_s * MATMUL_SHARE)
        flops += exact
        through = times * self.info.parameters * self.width
        device = through / (self.machine.bandwidth_bytes_per_s * BANDWIDTH_SHARE)
        disk = read / self.disk
        busy = max(compute, device)
        total = max(busy, disk) if overlapped else busy + disk
        return Row(
            command, what, way, memory, self.limit, flops, read, times, compute, device, disk,
            None if way in ("cannot", "no memory") else total,
        )  # fmt: skip

    def pairs(self, flops: float, states: int, rows: int, tokens: int) -> Row:
        """Return the row of all pairs: sets in groups that fit, each group one pass."""
        least = self.room(rows, tokens, Demand("sets", 4, splits=False))
        width = BYTES[computable(self.formats.arithmetic)]
        state = rows * tokens * self.info.hidden * width
        used = least.streamed_bytes if least.streams else least.in_memory_bytes
        most = max(2, 2 + (self.limit - used) // state)
        groups = math.ceil(states / most)
        memory = used + (min(most, states) - 4) * state
        read = self.stored * (groups if least.way != "fits" else 1)
        what = f"all pairs of {self.info.blocks} blocks, 10 x 128 tokens"
        return self.timed(
            "search", what, least.way, memory, flops, read, groups,
            overlapped=least.way != "fits",
        )  # fmt: skip

    def cut(self) -> Row:
        """Return the row of dropping a quarter of the blocks: bytes are copied, no device."""
        quarter = sum(self.info.block_parameters[: self.info.blocks // 4])
        left = self.stored - quarter * BYTES.get(self.info.dtype, 4)
        row = self.timed("prune", "a quarter of the blocks, copying bytes", "fits", 0, 0.0,
                         2 * left, 0, overlapped=True)  # fmt: skip
        return row

    def spaced(self, count: int) -> Removal:
        """Return ``count`` blocks that go, evenly spaced: each leaves a seam."""
        first, last = default_protection(self.info.blocks)
        free = self.info.blocks - first - last
        return Removal(tuple(first + at * free // count for at in range(min(count, free))))

    def healing(
        self, found: Sequence[seams.Seam], through: float, rows: int, tokens: int
    ) -> tuple[float, float]:
        """Return the operations of refitting at ``found``, and those in float64.

        ``through``: passes through a block on all rows.
        """
        info, held = self.info, -(-rows // seams.HELD_OUT)
        block = work.block_flops(info, 0, rows, tokens) if info.blocks else 0.0
        flops = through * block + 2 * (2 + len(found)) * work.head_flops(info, held, tokens)
        inner = info.block_shapes[0]["intermediate"] if info.blocks else 0
        fit = 2.0 * (rows - held) * tokens * inner * (inner + info.hidden)
        return flops, len(found) * fit

    def healed_cut(self) -> Row:
        """Return the row of dropping a quarter of the blocks and refitting before each seam."""
        info, tokens = self.info, 512
        rows = max(128, self.needed(tokens))
        removal = self.spaced(info.blocks // 4)
        through = seams.passes("refit", removal, info.blocks)
        found = seams.seams_of(removal)
        flops, exact = self.healing(found, through, rows, tokens)
        need = healing.of_cut(info, "refit", removal, rows, tokens, "cuda", self.formats)
        what = f"a quarter of the blocks, healed by refit on {rows:,} x {tokens} tokens"
        often = seams.reads(found, info.blocks)
        return self.row(
            "prune", what, flops, often, rows, tokens, need, exact=exact, through=through
        )

    def healed_width(self) -> Row:
        """Return the row of FLAP and a refit of every block."""
        info, blocks = self.info, self.info.blocks
        rows = max(HEAL_SAMPLES, -(-HEAL_TOKENS * info.hidden // HEAL_LENGTH))
        found = seams.seams_between((), {2 * block + 1 for block in range(blocks)})
        above = blocks * (blocks - 1) / 2
        through = 3 * blocks + (2 * blocks + above) / seams.HELD_OUT
        flops, exact = self.healing(found, through, rows, HEAL_LENGTH)
        need = healing.of_narrower(info, rows, HEAL_LENGTH, "cuda", self.formats)
        scored = Demand("statistics", 1)
        return self.row(
            "width", f"FLAP, healed by refit on {rows:,} x {HEAL_LENGTH} tokens",
            flops + self.forward_flops(1024, 128), 1 + seams.reads(found, blocks), 1024, 128,
            scored, need, exact=exact, through=through,
        )  # fmt: skip

    def healed_search(self, ten: int, tokens: int) -> Row:
        """Return the row of greedy search whose best set of each count is healed."""
        info, most = self.info, max(1, self.info.blocks // 4)
        rows = max(SEARCHED, self.needed(tokens))
        flops = work.greedy_flops(info, ten, tokens, most)
        often, exact, through = float(most), 0.0, 0.0
        for count in range(1, most + 1):
            removal = self.spaced(count)
            found = seams.seams_of(removal)
            passes_of = seams.passes("refit", removal, info.blocks)
            more, through = self.healing(found, passes_of, rows, tokens), through + passes_of
            flops, exact = flops + more[0], exact + more[1]
            often += seams.reads(found, info.blocks)
        need = healing.demand(info, ("refit",), most, rows, tokens, "cuda", self.formats)
        sets = Demand("sets", 4, splits=False, rows=ten)
        what = f"greedy removal of up to {most} blocks by KL, the best set of each count healed by "
        what += f"refit on {rows:,} x {tokens} tokens"
        return self.row(
            "search", what, flops, often, rows, tokens, sets, need, exact=exact, through=through
        )

    def needed(self, tokens: int) -> int:
        """Return the rows that healing needs at least, a multiple of four."""
        rows = math.ceil(seams.TOKENS_PER_DIMENSION * self.info.hidden / tokens)
        return seams.HELD_OUT * math.ceil(rows / seams.HELD_OUT)

    def budget(self, rows: int, tokens: int) -> Row:
        """Return the row of every version of every block by KL, without the timings.

        A set that changes block b alone shares what is below it with the dense model. The neurons
        are ranked in one more pass, and the solved plans measured in another.
        """
        info, blocks, kinds = self.info, self.info.blocks, len(VERSIONS)
        width = BYTES[computable(self.formats.arithmetic)]
        at_once = max(2, STATES_BYTES // max(1, rows * tokens * info.hidden * width))
        groups = math.ceil(kinds * blocks / max(1, at_once - 1))
        # beside the blocks above: half a block without the attention, and for each narrower MLP
        through = kinds * blocks * (blocks - 1) / 2 + 2 * blocks + groups * blocks
        block = work.block_flops(info, 0, rows, tokens) if blocks else 0.0
        heads = kinds * blocks + 1 + PLANS
        flops = (through + (1 + PLANS) * blocks) * block
        flops += heads * work.head_flops(info, rows, tokens)
        timed = computable(self.formats.weights)
        needs = versions.demands(info, tuple(VERSIONS), self.formats, timed, 1, 512)
        what = f"KL of {kinds} versions of every block and of {PLANS} plans, {rows} x {tokens} "
        what += "tokens; without the timings"
        return self.row("budget", what, flops, groups + 2, rows, tokens, *needs)

    def training(self, name: str, *, adapters: bool, gpus: int = 1, small: bool = False) -> Row:
        """Return the row of a training of the default size, with recomputed activations.

        ``gpus`` share every step, each with all weights; memory and reading are of one of them.
        ``small``: the frozen weights are in 4 bits.
        """
        info, tokens = self.info, STEPS * BATCH * CUTOFF
        per_weight = 6 if adapters else 8
        flops = per_weight * (info.parameters - info.vocab * info.hidden) * float(tokens)
        states = 4 * CUTOFF * info.hidden * (info.blocks + 1) * self.width
        logits = 4 * CUTOFF * info.vocab * 8
        held = info.parameters * (self.width if adapters else ADAM_BYTES)
        if small:
            plan = quantizing.make(info, 4, None)
            held += plan.nf4_bytes - plan.parameters * self.width
        memory = held + states + logits + capacity.PROCESS_BYTES["gpu"]
        way = "whole" if memory <= self.limit else "no memory"
        what = f"{name}, {STEPS:,} steps of {BATCH} x {CUTOFF} tokens"
        times = 3 * STEPS * BATCH // 4 // gpus
        return self.timed("retrain", what, way, memory, flops / gpus, self.stored, times,
                          overlapped=False)  # fmt: skip

    def decoding(self) -> Row:
        """Return the row of generating 128 tokens for one prompt: the weights pass once a token."""
        info = self.info
        read = info.parameters - (0 if info.tied else info.vocab * info.hidden)
        memory = info.parameters * self.width + capacity.PROCESS_BYTES["gpu"]
        way = "whole" if memory <= self.limit else "no memory"
        flops = 2.0 * read * 128
        row = self.timed("benchmark", "128 tokens for one prompt", way, memory, flops,
                         self.stored, 128, overlapped=False)  # fmt: skip
        return row


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain values."""
    return [asdict(row) for row in rows]


def tokens_per_s(info: CheckpointInfo, machine: Machine, width: int = 2) -> float:
    """Return the most tokens per second that one sequence can be generated with.

    The embedding is looked up, not read, unless it is the output matrix too.
    """
    read = info.parameters - (0 if info.tied else info.vocab * info.hidden)
    return machine.bandwidth_bytes_per_s / (read * width)
