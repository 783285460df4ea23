"""The registry of width-pruning methods: each one's units, calibration rows and module; no torch.

A method's module has ``select(job) -> Selection`` (core.width.selection), which scores the units
and returns those to keep. Cutting is the same for all (core.width.surgery).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from core.errors import OptionError


@dataclass(frozen=True)
class Method:
    """One way of choosing heads and neurons."""

    name: str
    label: str
    module: str
    about: str
    counting: Literal["channels", "units", "adaptive"]
    """What --ratio is a share of, by default; see core.width.ways and core.width.allocation."""
    protects: bool
    """Skips the first and last blocks by default; --layers overrides this."""
    samples: int = 0
    """Calibration rows in the paper; 0 if the scores use the weights alone."""
    length: int = 0
    """Tokens per row in the paper."""
    ranks: bool = False
    """Can rank the units of all blocks together (--ranking global)."""
    biases: bool = False
    """Compensates for the removed units with biases of the output projections."""

    def load(self) -> ModuleType:
        """Import the method's module (and torch)."""
        return importlib.import_module(self.module)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "llm-pruner",
            "LLM-Pruner",
            "core.width.llm_pruner",
            "Gradient times weight (Ma et al., arXiv 2305.11627), heads and neurons of blocks.",
            counting="channels",
            protects=True,
            ranks=True,
            samples=10,
            length=64,
        ),
        Method(
            "flap",
            "FLAP",
            "core.width.flap",
            "Input fluctuation, an adaptive share per block, and bias compensation "
            "(An et al., arXiv 2312.11983).",
            counting="adaptive",
            protects=False,
            samples=1024,
            length=128,
            biases=True,
        ),
        Method(
            "wanda-sp",
            "Wanda-sp",
            "core.width.wanda_sp",
            "Weight times input norm (Sun et al., arXiv 2306.11695), per unit as in FLAP's paper.",
            counting="units",
            protects=False,
            samples=128,
            length=128,
        ),
        Method(
            "magnitude",
            "Magnitude",
            "core.width.controls",
            "L2 norm of the weights, a control; counted as in LLM-Pruner.",
            counting="channels",
            protects=True,
            ranks=True,
        ),
        Method(
            "random",
            "Random",
            "core.width.controls",
            "Random units, a control; counted as in LLM-Pruner.",
            counting="channels",
            protects=True,
            ranks=True,
        ),
    )
}
NAMES = tuple(METHODS)


def get(name: str) -> Method:
    """Return a method by name; raises `OptionError` with the known names."""
    if name not in METHODS:
        raise OptionError(f"--method: unknown value '{name}'.", f"Choose from: {', '.join(NAMES)}.")
    return METHODS[name]
