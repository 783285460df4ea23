"""One pass over the weights: leave-one-out perplexities and similarity scores of all blocks.

Perplexity: Kim et al., Shortened LLaMA, arXiv 2402.02834. Block Influence: Men et al., ShortGPT.
Angular distance: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from core.importance.branches import Batch, losses_without
from core.importance.similarity import Similarity
from core.model.blocks import BlockView
from core.runs.progress import SILENT, Progress


@dataclass(frozen=True)
class SweepResult:
    """The result of one sweep. Lists have one entry per block unless noted otherwise."""

    ppl: list[float]
    """Perplexity without each block; empty if it was not requested."""
    dense_ppl: float | None
    sample_nll: list[list[float]]
    """Mean negative log-likelihood [1 + blocks][rows]; the first is the dense model."""
    block_influence: list[float]
    relative_update: list[float]
    angular: list[tuple[int, int, float]]
    """(start, length, distance) for every start and length."""
    tokens: int
    """Number of next-token predictions behind every perplexity."""
    kl: list[float] = dataclasses.field(default_factory=list)
    """KL(dense || without the block), in nats; empty if it was not requested."""
    sample_kl: list[list[float]] = dataclasses.field(default_factory=list)
    """The same of every row, [blocks][rows]."""


def sweep(
    view: BlockView,
    batch: Batch,
    progress: Progress = SILENT,
    *,
    perplexity: bool = True,
    kl: bool = False,
) -> SweepResult:
    """Score every block of ``view`` on ``batch`` in one pass over the weights.

    Args:
        view: The model.
        batch: Calibration rows.
        progress: Updated after every block.
        perplexity: Also compute leave-one-out perplexities, the expensive part.
        kl: Also compute the KL divergence from the dense model without each block.

    Raises:
        NotFiniteError: The dense model's hidden states are NaN or infinite after a block.
    """
    similarity = Similarity(batch)
    sets = [frozenset[int]()]
    wanted = perplexity or kl
    if wanted:
        sets += [frozenset({block}) for block in range(len(view))]
    losses = losses_without(
        view, batch, sets, progress,
        observe=similarity.observe, want_losses=wanted, want_kl=kl,
    )  # fmt: skip
    similarity.finish()
    values = losses.perplexity if losses and perplexity else []
    return SweepResult(
        ppl=values[1:],
        dense_ppl=values[0] if values else None,
        sample_nll=losses.sample_nll if losses else [],
        kl=losses.kl[1:] if losses and kl else [],
        sample_kl=losses.sample_kl[1:] if losses and kl else [],
        block_influence=similarity.block_influence,
        relative_update=similarity.relative_update,
        angular=similarity.angular(),
        tokens=batch.predictions,
    )


PARTS = ("attention", "mlp")
"""The two sublayers of a block, in order of computation."""


def sublayer_perplexity(
    view: BlockView, batch: Batch, progress: Progress = SILENT
) -> list[tuple[int, str, float]]:
    """Return (block, part, perplexity without that part) for every sublayer there is, in one pass.

    Memory: one state per sublayer, twice that of the sweep over blocks.
    """
    units = [(b, part) for b in range(len(view)) for part in PARTS if view.has(b, part)]
    sets = [frozenset({unit}) for unit in units]
    losses = losses_without(view, batch, sets, progress, sublayers=True, label="Parts of block")
    assert losses is not None
    return [(*unit, value) for unit, value in zip(units, losses.perplexity, strict=True)]
