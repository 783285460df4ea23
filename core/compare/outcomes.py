"""A candidate's quality and cost at one cell of the benchmark's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.compare.candidates import Candidate
from core.words import block_ranges


@dataclass(frozen=True)
class Outcome:
    """A candidate with its quality, and its cost at one cell; None for what is unknown."""

    candidate: Candidate
    ppl_over_dense: float | None = None
    latency_s: float | None = None
    first_token_ms: float | None = None
    per_token_ms: float | None = None
    tokens_per_s: float | None = None
    speedup: float | None = None
    """Latency of the dense model over that of this one."""
    memory_mib: float | None = None
    reserved_mib: float | None = None
    process_mib: float | None = None
    kind_of_cost: str = "unknown"
    """measured, estimated, did not fit, or unknown."""

    @property
    def key(self) -> str:
        """Id of the candidate."""
        return self.candidate.id

    @property
    def ppl(self) -> float | None:
        """Perplexity by the protocol of the comparison."""
        return self.candidate.ppl

    @property
    def parameters(self) -> int | None:
        """Parameters of the candidate."""
        return self.candidate.parameters

    def figure(self, column: str) -> float | None:
        """Return a number by its column's name, e.g. ``per_token_ms``, ``ppl``, ``parameters``."""
        found: float | None = getattr(self, column)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return a row for tables and CSV files; ``cut_in`` as in 2-5,8."""
        candidate = self.candidate
        return {
            "key": candidate.id,
            "label": candidate.label,
            "series": candidate.series,
            "kind": candidate.kind,
            "retrained": candidate.retrained,
            "quantized": candidate.quantized,
            "parent": candidate.parent,
            "dropped": candidate.dropped,
            "cut_in": block_ranges(candidate.cut_in),
            "parameters": candidate.parameters,
            "ratio": candidate.ratio,
            "ppl": candidate.ppl,
            "ppl_over_dense": self.ppl_over_dense,
            "latency_s": self.latency_s,
            "first_token_ms": self.first_token_ms,
            "per_token_ms": self.per_token_ms,
            "tokens_per_s": self.tokens_per_s,
            "speedup": self.speedup,
            "memory_mib": self.memory_mib,
            "reserved_mib": self.reserved_mib,
            "process_mib": self.process_mib,
            "kind_of_cost": self.kind_of_cost,
            "is_plan": candidate.is_plan,
        }
