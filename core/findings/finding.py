"""What a finding is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Something that a run or a study shows and that its reader should know."""

    key: str
    """verdict, large-drop, generation-lost, adaptation, criteria-disagree, calibration-small,
    memory, noise, methods-alike, methods-differ, text-matters or attention-lost."""
    sentence: str
    """What was found, in plain words, with the figures."""
    evidence: Mapping[str, Any]
    """The figures behind the sentence: what -> number or text."""
    try_next: str
    """What to do about it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain JSON values."""
        return {
            "key": self.key,
            "sentence": self.sentence,
            "evidence": dict(self.evidence),
            "try_next": self.try_next,
        }
