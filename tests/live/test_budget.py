"""The default memory of the live model."""

from __future__ import annotations

import pytest

from core.live.command import budget_mib

GIB = 1024
WEIGHTS_7B = 6.74e9 * 2 / 2**20


@pytest.mark.parametrize(
    ("kind", "free", "total", "budget"),
    [
        ("cuda", 23.5 * GIB, 24 * GIB, 21.1 * GIB),
        ("cuda", 79 * GIB, 80 * GIB, 71 * GIB),
        ("cuda", 8 * GIB, 8 * GIB, 6 * GIB),
        ("cuda", 3 * GIB, 24 * GIB, 1.5 * GIB),  # another process has the rest
        ("mps", 18 * GIB, 24 * GIB, 15.6 * GIB),
        ("cpu", 30 * GIB, 32 * GIB, 16 * GIB),
    ],
)
def test_default_memory(kind, free, total, budget):
    assert budget_mib(kind, free, total) == pytest.approx(budget)


def test_a_7b_in_16_bits_fits_24_gib():
    assert budget_mib("cuda", 23.5 * GIB, 24 * GIB) > WEIGHTS_7B > 24 * GIB / 2
