"""Scores from the dense hidden states alone: how much one or more blocks change them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.errors import NotFiniteError
from core.importance.branches import Batch
from core.importance.forward import HEAD_TOKENS
from core.model.precision import not_finite_hint


class Similarity:
    """Collects Block Influence, relative update and angular distance during a pass.

    Means over tokens count every token that is not padding once; sums are float64.
    """

    def __init__(self, batch: Batch) -> None:
        """Prepare for the rows of ``batch``; its groups, if any, come one after another."""
        self._groups = [(own.valid, own.lengths - 1) for own in batch.groups]
        self._group = -1
        self._ranks = batch.ranks
        self._tokens = int(batch.lengths.sum())
        self._sums: list[tuple[float, float]] = []
        """Per block, the sums over tokens of the cosines and of the updates, in float64."""
        self._ends: list[list[Tensor]] = []
        """Per group, the states at the rows' last tokens: before the first block, after each."""
        self._distances: Tensor | None = None
        """Mean over rows of the distance between two states [blocks + 1, blocks + 1], float64."""

    @property
    def block_influence(self) -> list[float]:
        """1 - mean cosine of a block's input and output, per block (ShortGPT, eq. 1)."""
        return [1.0 - cosines / self._tokens for cosines, _ in self._sums]

    @property
    def relative_update(self) -> list[float]:
        """Mean of norm(output - input) / norm(output), per block."""
        return [updates / self._tokens for _, updates in self._sums]

    def observe(self, block: int, before: Tensor, after: Tensor) -> None:
        """Add a block's dense input and output, [rows, tokens, hidden].

        The last block's output is the state before the final norm. Block 0 begins a group.
        """
        if block == 0:
            self._group += 1
            self._ends.append([self._at_last(before)])
        valid_rows, _ = self._groups[self._group]
        cosines, updates = [], []
        step = max(1, HEAD_TOKENS // before.shape[1])  # the float32 copies stay small
        for rows in range(0, before.shape[0], step):
            part = slice(rows, rows + step)
            valid = valid_rows[part]
            x, y = before[part][valid].float(), after[part][valid].float()
            if not bool(torch.isfinite(y).all()):
                raise NotFiniteError(
                    f"NaN or infinity in the hidden states after block {block}.",
                    not_finite_hint(after.dtype),
                )
            size = y.norm(dim=-1)
            cosines.append((x * y).sum(-1) / (x.norm(dim=-1) * size).clamp_min(1e-30))
            updates.append((y - x).norm(dim=-1) / size.clamp_min(1e-30))
        if len(self._sums) == block:
            self._sums.append((0.0, 0.0))
        of_cosines, of_updates = self._sums[block]
        self._sums[block] = of_cosines + _sum(cosines), of_updates + _sum(updates)
        self._ends[-1].append(self._at_last(after))

    def _at_last(self, hidden: Tensor) -> Tensor:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows, self._groups[self._group][1]].cpu().double()

    def finish(self) -> None:
        """Bring the sums of all rows together, once the pass has ended."""
        ends = torch.cat([torch.stack(group, 1) for group in self._ends])
        states = torch.nn.functional.normalize(ends, dim=-1)
        cosine = torch.einsum("rid,rjd->rij", states, states).clamp(-1.0, 1.0)
        distance = (torch.arccos(cosine) / math.pi).sum(0)
        parts = self._ranks.gather((self._tokens, self._sums, len(ends), distance))
        tokens, sums, rows, distances = zip(*parts, strict=True)
        self._tokens = sum(tokens)
        self._sums = [
            (sum(cosines for cosines, _ in block), sum(updates for _, updates in block))
            for block in zip(*sums, strict=True)
        ]
        self._distances = sum(distances[1:], distances[0]) / sum(rows)

    def angular(self) -> list[tuple[int, int, float]]:
        """Return (start, length, distance): arccos(cos(h_start, h_start+length)) / pi.

        Taken at the last token of each row, averaged over rows; in [0, 1] (Gromov et al., eq. 7).
        """
        distance = self._distances
        assert distance is not None, "finish comes first"
        count = len(distance) - 1
        return [
            (start, length, float(distance[start, start + length]))
            for length in range(1, count + 1)
            for start in range(count + 1 - length)
        ]


def _sum(values: list[Tensor]) -> float:
    """Return the sum in float64, on the CPU: not every device has float64."""
    return float(torch.cat(values).cpu().double().sum())
