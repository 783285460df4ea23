"""Devices that estimates are made for: data sheets, and the shares that are reached; no torch."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
MATMUL_SHARE = 0.4
"""Share of a device's peak that large matrix products reach here: the aim of docs/results/gpu_h200.
A chosen figure, not a measured one for every card."""
BANDWIDTH_SHARE = 0.7
"""Share of the memory bandwidth that reading weights reaches. Published: 69 % (gpt-fast, A100)."""
DEVICE = "cuda:4096"
"""--device of the commands that are estimated: no GPU here has this number, so that this machine's
own are not asked what they can do."""
DISK_BYTES_PER_S = 3 * GB
"""A local NVMe disk."""


@dataclass(frozen=True)
class Machine:
    """A device, by its data sheet."""

    name: str
    label: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    matmul_flops_per_s: float
    """Dense products in bfloat16."""
    float64_flops_per_s: float
    """Products in float64, in which healing solves its regressions."""


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h100", "NVIDIA H100 SXM, 80 GB", 80 * GB, 3.35e12, 989e12, 67e12),
        Machine("h200", "NVIDIA H200, 141 GB", 141 * GB, 4.8e12, 989e12, 67e12),
        Machine("a100", "NVIDIA A100, 80 GB", 80 * GB, 2.04e12, 312e12, 19.5e12),
        Machine("l40s", "NVIDIA L40S, 48 GB", 48 * GB, 0.864e12, 362e12, 1.4e12),
        Machine("rtx4090", "NVIDIA GeForce RTX 4090, 24 GB", 24 * GB, 1.008e12, 165e12, 1.3e12),
    )
}
NAMES = tuple(MACHINES)
