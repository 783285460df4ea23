"""Size, memory and known quality of a checkpoint without some of its blocks.

Plain arithmetic on headers and finished runs; nothing is loaded, so a page can update on every
click.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.prune.plan import parameters_after
from core.prune.score_results import Curve, CurveRow, Importance
from core.runs.dtypes import BYTES


@dataclass(frozen=True)
class Line:
    """One criterion's perplexities: ``points`` are (blocks removed, perplexity, which).

    A part of a block counts as half of one.
    """

    name: str
    kind: str
    """measured or estimated."""
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Outlook:
    """Sizes of a checkpoint without the dropped blocks."""

    blocks: int
    parameters: int
    ratio: float
    """Share of the parameters that is removed."""
    weight_bytes: int
    kv_bytes: int
    """Key/value cache of all sequences at full context."""

    @property
    def total_bytes(self) -> int:
        """Weights and cache together; activations are extra."""
        return self.weight_bytes + self.kv_bytes


def outlook(
    info: CheckpointInfo,
    removal: Removal | Sequence[int],
    *,
    batch: int,
    context: int,
    dtype: str,
) -> Outlook:
    """Return the sizes without ``removal`` at ``batch`` sequences of ``context`` tokens.

    It may name all blocks (a page shows that too), but only blocks that exist.
    """
    gone = removal if isinstance(removal, Removal) else Removal(tuple(removal))
    width = BYTES[dtype]
    left = parameters_after(info, gone)
    shapes = enumerate(info.block_shapes)
    heads = sum(s["kv_heads"] for b, s in shapes if not gone.misses(b, "attention"))
    return Outlook(
        blocks=info.blocks - len(set(gone.drop)),
        parameters=left,
        ratio=1 - left / info.parameters,
        weight_bytes=left * width,
        kv_bytes=2 * heads * info.head_dim * width * batch * context,
    )


@dataclass(frozen=True)
class Quality:
    """A perplexity and its origin."""

    ppl: float
    kind: str
    """measured or estimated."""
    source: str
    """The run that measured it, or how it was estimated."""


@dataclass(frozen=True)
class CurvePoint:
    """One row of a curve run's curve.csv, with the blocks it removed."""

    criterion: str
    count: int
    ppl: float
    drop: tuple[int, ...]
    run: str
    parts: tuple[tuple[int, str], ...] = ()
    """(block, attention or mlp) of what was removed of kept blocks."""


def curve_points(folder: Path) -> list[CurvePoint]:
    """Return the rows of a finished curve run; empty if they cannot be read."""
    found = Curve.read(folder) or Curve()
    return [
        CurvePoint(
            row.criterion, row.count, row.ppl, found.drop_of(row.criterion, row.count), folder.name
        )
        for row in CurveRow.read(folder)
        if row.ppl is not None
    ]


def same_text(one: Curve | Importance, other: Curve | Importance) -> bool:
    """Whether two runs measured the same weights on the same text in the same way."""
    return _text(one) == _text(other)


def _text(found: Curve | Importance) -> tuple[object, ...]:
    """Return weights, rows and precision: what two perplexities must share to be compared."""
    rows = (found.calibration, found.samples, found.length, found.seed)
    return (found.checkpoint_key, *rows, found.dtype)


def quality(
    removal: Removal | Sequence[int],
    dense_ppl: float | None,
    without: Sequence[float | None],
    points: Iterable[CurvePoint] = (),
    source: str = "",
    sublayers: Mapping[tuple[int, str], float] | None = None,
) -> Quality | None:
    """Return what is known about the perplexity without ``removal``; None if nothing is.

    ``without``: perplexity without each single block; ``sublayers``: without each part. The dense
    model, single blocks or parts and the sets of ``points`` are measured; anything else is
    estimated by adding the increase in mean negative log-likelihood that each causes alone to the
    dense model's, as if they were independent. The actual perplexity is usually higher.
    """
    gone = removal if isinstance(removal, Removal) else Removal(tuple(removal))
    if gone.width:
        return None  # no run but a budget's has measured narrower MLPs, and that by KL
    wanted, parts = frozenset(gone.drop), frozenset(gone.parts)
    alone = sublayers or {}
    if not gone:
        return Quality(dense_ppl, "measured", source) if dense_ppl else None
    if len(parts) == 1 and not wanted:
        single = alone.get(next(iter(parts)))
        if single is not None and not math.isnan(single):
            return Quality(single, "measured", source)
    if len(wanted) == 1 and not parts:
        (block,) = wanted
        single = without[block] if block < len(without) else None
        if single is not None and not math.isnan(single):
            return Quality(single, "measured", source)
    for point in points:
        same = frozenset(point.drop) == wanted and frozenset(point.parts) == parts
        if same and (parts or point.count == len(wanted)):
            return Quality(point.ppl, "measured", point.run)
    values = [without[b] if b < len(without) else None for b in wanted]
    values += [alone.get(part) for part in parts]
    if not dense_ppl or any(v is None or not v > 0 or math.isinf(v) for v in values):
        return None
    rise = sum(math.log(v) - math.log(dense_ppl) for v in values if v is not None)
    exponent = math.log(dense_ppl) + rise
    if exponent > 700:
        return None
    return Quality(math.exp(exponent), "estimated", "sum of the increases of single blocks")
