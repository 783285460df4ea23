"""doctor.json: what was checked, and how each check ended; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from core.runs.results import JsonResult

GOOD, WRONG, FAILED, SKIPPED = "agrees", "disagrees", "failed", "skipped"
"""How a check ends. failed: it raised an error, so there is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What the device does in one format."""

    dtype: str
    native: bool = False
    """Whether the device has instructions for it; else it is emulated or computed in float32."""
    bandwidth_bytes_per_s: float | None = None
    """Reading weights, as in generating for one sequence."""
    matmul_flops_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device that was checked, and the libraries."""

    device: str = ""
    device_name: str = ""
    driver: str = ""
    """Of NVIDIA; empty without it."""
    driver_cuda: str = ""
    """The newest CUDA that the driver supports."""
    capability: str = ""
    """CUDA compute capability."""
    uuid: str = ""
    free_bytes: int | None = None
    total_bytes: int | None = None
    threads: int | None = None
    """Cores that torch uses on a CPU."""
    python: str = ""
    torch: str = ""
    torch_cuda: str = ""
    """What torch was built for; empty for the CPU alone."""
    transformers: str = ""
    missing: tuple[str, ...] = ()
    """Optional libraries that are not installed."""
    rates: tuple[Rate, ...] = ()
    unusable_gpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one check ended."""

    name: str
    title: str = ""
    state: str = SKIPPED
    text: str = ""
    """What was compared and found, or why it did not run."""
    seconds: float = 0.0

    @property
    def is_wrong(self) -> bool:
        """Whether this counts against the machine."""
        return self.state in (WRONG, FAILED)


@dataclass(frozen=True, kw_only=True)
class Diagnosis(JsonResult):
    """The file: the sentence first, then the machine, then the checks in their order."""

    FILE: ClassVar[str] = "doctor.json"

    verdict: str = ""
    agrees: bool = False
    """Whether no check disagreed or failed."""
    compared_with: str = ""
    seconds: float = 0.0
    machine: Machine = Machine()
    checks: tuple[Verdict, ...] = ()
