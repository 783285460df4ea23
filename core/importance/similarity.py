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
        """Prepare for the rows of ``batch``."""
        self._valid = batch.valid
        self._last = batch.lengths - 1
        self._ends: list[Tensor] = []
        self.block_influence: list[float] = []
        """1 - mean cosine of a block's input and output, per block (ShortGPT, eq. 1)."""
        self.relative_update: list[float] = []
        """Mean of norm(output - input) / norm(output), per block."""

    def observe(self, block: int, before: Tensor, after: Tensor) -> None:
        """Add a block's dense input and output, [rows, tokens, hidden].

        The last block's output is the state before the final norm.
        """
        cosines, updates = [], []
        step = max(1, HEAD_TOKENS // before.shape[1])  # the float32 copies stay small
        for rows in range(0, before.shape[0], step):
            part = slice(rows, rows + step)
            valid = self._valid[part]
            x, y = before[part][valid].float(), after[part][valid].float()
            if not bool(torch.isfinite(y).all()):
                raise NotFiniteError(
                    f"NaN or infinity in the hidden states after block {block}.",
                    not_finite_hint(after.dtype),
                )
            size = y.norm(dim=-1)
            cosines.append((x * y).sum(-1) / (x.norm(dim=-1) * size).clamp_min(1e-30))
            updates.append((y - x).norm(dim=-1) / size.clamp_min(1e-30))
        self.block_influence.append(1.0 - float(_mean(torch.cat(cosines))))
        self.relative_update.append(float(_mean(torch.cat(updates))))
        if not self._ends:
            self._ends.append(self._at_last(before))
        self._ends.append(self._at_last(after))

    def _at_last(self, hidden: Tensor) -> Tensor:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows, self._last].cpu().double()

    def angular(self) -> list[tuple[int, int, float]]:
        """Return (start, length, distance): arccos(cos(h_start, h_start+length)) / pi.

        Taken at the last token of each row, averaged over rows; in [0, 1] (Gromov et al., eq. 7).
        """
        states = torch.nn.functional.normalize(torch.stack(self._ends, 1), dim=-1)
        cosine = torch.einsum("rid,rjd->rij", states, states).clamp(-1.0, 1.0)
        distance = (torch.arccos(cosine) / math.pi).mean(0)
        count = len(self._ends) - 1
        return [
            (start, length, float(distance[start, start + length]))
            for length in range(1, count + 1)
            for start in range(count + 1 - length)
        ]


def _mean(values: Tensor) -> Tensor:
    """Return the mean, summed in float64 on the CPU: not every device has float64."""
    return values.cpu().double().mean()
