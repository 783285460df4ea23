"""What quantizing a checkpoint would do, from its shapes alone: no torch here.

The weights of the blocks' linear layers are quantized; embedding, head and norms stay as they are.
In a group, neighbouring input weights of one output channel share a scale, so the group must
divide the input width of every quantized matrix.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from core.checkpoint import quantized
from core.checkpoint.headers import CheckpointInfo
from core.errors import OptionError
from core.runs.footprint import FILES, PROCESS_BYTES, Footprint

BITS = (8, 4)
GROUPS = (256, 128, 64, 32, 16, 8)
"""Groups that are offered, those that the field uses and smaller ones."""
DEFAULT_GROUP = 128
"""Of 4 bits; the largest smaller one that fits is taken if it does not."""
_GROUP_BYTES = 4 + 1
"""A float32 scale and an 8-bit zero point."""
SCHEMES = {
    8: "symmetric, rounded to the nearest value",
    4: "asymmetric, rounded to the nearest value",
}
LAYOUTS = quantized.LAYOUTS
"""torchao's tensor class by bits."""


@dataclass(frozen=True)
class Matrix:
    """One weight to quantize."""

    name: str
    rows: int
    """Output channels."""
    columns: int
    """Input width."""


@dataclass(frozen=True)
class Misfit:
    """A width that a group does not divide."""

    width: int
    tensor: str
    """The first weight that is as wide."""
    tensors: int
    """Number of weights that are as wide."""


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is going to be quantized."""

    bits: int
    group: int | None
    """Weights that share a scale; None: one scale per output channel."""
    matrices: tuple[Matrix, ...]
    bytes_before: int
    """All weights as they are stored now."""
    bytes_after: int
    """All weights as they will be stored."""
    note: str = ""
    """What a user should know of the group that was taken; may be empty."""

    @property
    def parameters(self) -> int:
        """Elements of the quantized weights."""
        return sum(m.rows * m.columns for m in self.matrices)

    @property
    def quantized_bytes(self) -> int:
        """The quantized weights in memory, with their scales."""
        scales = sum(m.rows * (m.columns // self.group if self.group else 1) for m in self.matrices)
        return self.parameters + _GROUP_BYTES * scales

    @property
    def nf4_bytes(self) -> int:
        """The same weights in bitsandbytes' NF4: a scale byte for 64, 4 bytes for 256 scales."""
        return sum(
            -(-size // 2) + -(-size // 64) + 4 * -(-size // (64 * 256))
            for size in (m.rows * m.columns for m in self.matrices)
        )


@dataclass(frozen=True)
class Possible:
    """Whether a checkpoint can be quantized to some bits, for a form."""

    bits: int
    groups: tuple[int, ...]
    """Groups that divide all widths, the largest first."""
    group: int | None
    """What is taken unless another is given; None: one scale per output channel."""
    reason: str = ""
    """Why it cannot be quantized; empty if it can."""

    @property
    def ok(self) -> bool:
        """Whether it can be quantized."""
        return not self.reason


def matrices(info: CheckpointInfo) -> Iterator[Matrix]:
    """Yield the weights that are quantized, block by block."""
    for block in range(info.blocks):
        for module, (rows, columns) in info.projections(block).items():
            part = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            yield Matrix(f"model.layers.{block}.{part}.{module}.weight", rows, columns)


def left(info: CheckpointInfo) -> tuple[str, ...]:
    """Return what is left in the checkpoint's own format."""
    head = "embedding, which is also the head" if info.tied else "embedding and head"
    return (head, "norms")


def fitting(info: CheckpointInfo) -> tuple[int, ...]:
    """Return the `GROUPS` that divide the input widths of all matrices, the largest first."""
    common = math.gcd(*(m.columns for m in matrices(info)))
    return tuple(group for group in GROUPS if common % group == 0)


def misfits(info: CheckpointInfo, group: int) -> tuple[Misfit, ...]:
    """Return the widths that ``group`` does not divide, the most frequent first."""
    wide = [m for m in matrices(info) if m.columns % group]
    counts = Counter(m.columns for m in wide)
    first = {m.columns: m.name for m in reversed(wide)}
    return tuple(Misfit(width, first[width], n) for width, n in counts.most_common())


def possible(info: CheckpointInfo) -> tuple[Possible, ...]:
    """Return for 8 and 4 bits whether the checkpoint can be quantized, with which groups."""
    groups = fitting(info)
    if info.quantization:
        why = f"It is quantized already ({info.quantization.label}); quantize the original instead."
        return tuple(Possible(bits, groups, None, why) for bits in BITS)
    usual = next((g for g in groups if g <= DEFAULT_GROUP), None)
    why = "" if usual else _no_group(info)
    return Possible(8, groups, None), Possible(4, groups, usual, why)


def make(info: CheckpointInfo, bits: int, group: int | None) -> Plan:
    """Return the plan; raises `OptionError` for a group that does not divide every width.

    Without a group, 8 bits take one scale per output channel, and 4 bits `DEFAULT_GROUP` or the
    largest smaller group that fits.
    """
    offered = next((p for p in possible(info) if p.bits == bits), None)
    if offered is None:
        raise OptionError(f"--bits {bits} is not available.", "Use --bits 8 or --bits 4.")
    note = ""
    if group is None:
        group = offered.group
        if bits == 4 and group is None:
            raise OptionError(offered.reason, "Use --bits 8.")
        if bits == 4 and group != DEFAULT_GROUP:
            note = f"{_described(misfits(info, DEFAULT_GROUP), DEFAULT_GROUP)}; {group} is used."
    elif wrong := misfits(info, group):
        raise OptionError(f"--group {_described(wrong, group)}.", _way_out(info, bits))
    found = tuple(matrices(info))
    before = info.stored_bytes
    count = sum(m.rows * m.columns for m in found)
    width = (before / info.parameters) if info.parameters else 0
    plan = Plan(bits, group, found, before, 0, note)
    return replace(plan, bytes_after=round(before - count * width) + plan.quantized_bytes)


SHARD_BYTES = 5 * 10**9
"""Of a weight file, if there is only config.json: as large as those of LLaMA 3.1 on the Hub."""


def footprint(info: CheckpointInfo, plan: Plan) -> Footprint:
    """Return what quantizing takes: files are mapped, and written whole from two copies."""
    files = [int(shard["bytes"]) for shard in info.shards] or [SHARD_BYTES]
    largest = min(max(files), plan.bytes_before or max(files))
    smaller = plan.bytes_after / plan.bytes_before if plan.bytes_before else 1.0
    return Footprint(
        memory_bytes=PROCESS_BYTES["cpu"] + round(largest * (1 + 2 * smaller)),
        way=FILES,
        read_bytes=plan.bytes_before,
        written_bytes=plan.bytes_after,
        converted=plan.parameters,
    )


def _described(wrong: tuple[Misfit, ...], group: int) -> str:
    first = wrong[0]
    others = f" and {first.tensors - 1:,} more" if first.tensors > 1 else ""
    widths = f"; also {', '.join(str(m.width) for m in wrong[1:4])}" if wrong[1:] else ""
    more = ", ..." if wrong[4:] else ""
    return (
        f"{group} does not divide {first.width}, the input width of {first.tensor}{others}"
        f"{widths}{more}"
    )


def _way_out(info: CheckpointInfo, bits: int) -> str:
    groups = fitting(info)
    if groups:
        listed = ", ".join(map(str, groups))
        return f"Groups that fit all widths: {listed}." + (
            " Without --group, every output channel has one scale." if bits == 8 else ""
        )
    return (
        "No usual group fits all widths. "
        + ("Leave out --group: every output channel then has one scale." if bits == 8 else "")
        + ("Use --bits 8." if bits == 4 else "")
    )


def _no_group(info: CheckpointInfo) -> str:
    smallest = GROUPS[-1]
    return (
        "4 bits need groups of weights that share a scale, and even "
        f"{_described(misfits(info, smallest), smallest)}."
    )
