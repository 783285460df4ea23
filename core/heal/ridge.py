"""Weighted ridge regression from sums over tokens, so that no token has to be kept."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHAS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Strengths of the ridge to choose from, as multiples of the mean of the Gram matrix's diagonal."""


def wide(device: torch.device) -> torch.dtype:
    """Return the widest floating-point format that ``device`` has: float64, but float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


class Normal:
    """Normal equations of ``x D = r``: sums over tokens of x'x and x'r.

    They are held in float64: on the device itself, or on the CPU if it has no float64 (MPS), where
    each chunk's product is then taken in float32.
    Memory: 8 bytes times features squared, and as much again while solving.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        """Start without tokens."""
        place = torch.device("cpu") if device.type == "mps" else device
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=place)
        self.cross = torch.zeros(features, outputs, dtype=torch.float64, device=place)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor) -> None:
        """Add ``x`` [tokens, features], ``residual`` [tokens, outputs] and ``weight`` [tokens]."""
        weighted = (x * weight[:, None]).t()
        if self.gram.device == x.device:
            self.gram.addmm_(weighted, x)
            self.cross.addmm_(weighted, residual)
        else:
            self.gram += (weighted @ x).to(self.gram)
            self.cross += (weighted @ residual).to(self.cross)

    def is_finite(self) -> bool:
        """Whether no token had NaN or infinity."""
        return bool(self.gram.isfinite().all() and self.cross.isfinite().all())

    def solve(self, alpha: float) -> Tensor | None:
        """Return D [features, outputs], float64, of least ``|x D - r|^2 + ridge |D|^2``.

        The ridge is ``alpha`` times the mean of the diagonal of x'x. None if the system is
        singular, as for inputs that are all zero.
        """
        ridge = alpha * self.gram.diagonal().mean()
        system = self.gram.clone()
        system.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            return None
        return torch.cholesky_solve(self.cross, factor)
