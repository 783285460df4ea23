"""pruning.json: what a cut took from a checkpoint; depth and width pruning both leave one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from core.checkpoint.drop import Removal
from core.data.facts import TextFacts
from core.runs import workspace
from core.runs.results import JsonResult, from_dict


@dataclass(frozen=True)
class PlanFile:
    """A plan as ``plan`` prints it, as pruning.json records it, or written by hand."""

    drop: tuple[int, ...] | None = None
    """Blocks to remove, in removal order; None if the file names none."""
    attention: tuple[int, ...] | None = None
    """Blocks that lose their attention."""
    mlp: tuple[int, ...] | None = None
    """Blocks that lose their MLP."""
    mlp_width: dict[str, int] | None = None
    """Block -> neurons that its MLP keeps."""
    neurons: str = ""
    """The budget run that ranked the neurons."""
    criterion: str | None = None
    protected: tuple[int, ...] = ()
    """Blocks that were not offered for removal."""
    blocks: int | None = None
    """Blocks of the checkpoint that was planned for."""
    protect_first: int = 0
    protect_last: int = 0


@dataclass(frozen=True)
class Cut:
    """An earlier cut of the same line."""

    method: str | None = None
    """depth, or the width method."""
    source: str | None = None
    criterion: str | None = None
    dropped: tuple[int, ...] | None = None
    """Blocks, by their numbers in ``source``."""
    attention: tuple[int, ...] = ()
    """Kept blocks that lost their attention."""
    mlp: tuple[int, ...] = ()
    healed: str = ""
    """Method of the repair that was kept; empty if there was none."""


@dataclass(frozen=True)
class Calibration:
    """The rows that a cut or a repair was fitted on."""

    source: str = ""
    content: str = ""
    """Identifies the text: a hash of the file, or how it was made."""
    samples: int = 0
    """Rows."""
    length: int = 0
    """Tokens in a row."""
    seed: int | None = None
    text: TextFacts = TextFacts()
    """How the rows were obtained."""

    @property
    def label(self) -> str:
        """Source, size and seed in words."""
        return f"{self.source}, {self.samples} x {self.length} tokens, seed {self.seed}"


@dataclass(frozen=True)
class HealedSeam:
    """A run of removed blocks, and the repair that was tried there."""

    first: int
    """First removed block, by its number in ``source``."""
    last: int
    kept: bool = False
    kl_before: float | None = None
    """Held-out KL(dense || pruned) with the seams below healed, in nats per token."""
    kl_after: float | None = None
    """The same with this seam healed too; None if there was no finite repair."""
    alpha: float | None = None
    """Strength of the ridge; None for scale."""
    scale: float | None = None
    """What the output projections above are divided by; None for refit and linear."""
    removed: str = ""
    """What goes there, in words, if it is not whole blocks alone."""


def perplexity(nll: float | None) -> float | None:
    """Return the perplexity at a mean negative log-likelihood in nats; None if unknown or huge."""
    return None if nll is None or not nll < 700 else math.exp(nll)


@dataclass(frozen=True, kw_only=True)
class Healing:
    """Closed-form repair of a cut: see `core.heal.healing`."""

    asked: str = ""
    """refit, linear, scale or auto."""
    method: str = "none"
    """The method whose repairs were kept; none if no repair lowered the KL."""
    kl_before: float | None = None
    """KL(dense || pruned) on the held-out tokens, in nats per token."""
    kl_after: float | None = None
    """The same after healing, with weights rounded to the format they are stored in."""
    nll_dense: float | None = None
    """Negative log-likelihood of the held-out tokens by the dense model, in nats per prediction."""
    nll_before: float | None = None
    nll_after: float | None = None
    tried: dict[str, float] = field(default_factory=dict)
    """KL after each method that was tried."""
    tokens: int = 0
    """Tokens that were fitted on."""
    heldout_tokens: int = 0
    """Tokens that chose the ridge and decided which repairs to keep."""
    seams: tuple[HealedSeam, ...] = ()
    """From the bottom up."""
    calibration: Calibration | None = None
    device: str = ""
    dtype: str = ""
    peak_memory_mib: float | None = None

    def perplexity(self, when: str) -> float | None:
        """Perplexity of the held-out tokens: ``dense``, ``before`` or ``after``; None if unknown.

        Runs of versions that did not record it have none.
        """
        nll = {"dense": self.nll_dense, "before": self.nll_before, "after": self.nll_after}
        return perplexity(nll[when])

    @property
    def measured_on(self) -> str:
        """The line under its figures: text, rows, held-out tokens, device and precision."""
        text = self.calibration.label if self.calibration else "text unknown"
        return (
            f"Measured on the held-out quarter ({self.heldout_tokens:,} tokens) of the healing "
            f"text {text}; {self.device}, {self.dtype}."
        )


@dataclass(frozen=True, kw_only=True)
class Pruning(JsonResult):
    """What depth and width pruning have in common; all that depth pruning records."""

    FILE: ClassVar[str] = "pruning.json"

    method: str = ""
    """depth, or the width method."""
    source: str = ""
    """The checkpoint that was cut, as the user named it."""
    base_model: str = ""
    """The first checkpoint of the line."""
    source_key: str = ""
    """Identifies the weights that were cut."""
    criterion: str | None = None
    """What ranked the blocks or units; None if blocks were named by hand."""
    dropped: tuple[int, ...] = ()
    """Blocks in removal order, by their numbers in ``source``."""
    attention: tuple[int, ...] = ()
    """Kept blocks that lost their attention, by their numbers in ``source``."""
    mlp: tuple[int, ...] = ()
    """Kept blocks that lost their MLP."""
    mlp_width: dict[str, int] = field(default_factory=dict)
    """Block -> neurons that its MLP kept, of those that this cut made narrower."""
    neurons: str = ""
    """The budget run that ranked the neurons."""
    without_attention: tuple[int, ...] = ()
    """Kept blocks that have no attention, earlier cuts included, by the base model's numbers."""
    without_mlp: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    dropped_original: tuple[int, ...] = ()
    """``dropped`` by the numbers of the base model."""
    original_blocks: tuple[int, ...] = ()
    """The kept blocks by the numbers of the base model."""
    blocks_before: int | None = None
    blocks_after: int | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None
    ratio: float | None = None
    """Share of the source's parameters that was removed."""
    plan: dict[str, Any] | None = None
    """The plan's file as it was given; see `planned`."""
    lineage: tuple[Cut, ...] = ()
    """Earlier cuts, the oldest first."""
    healing: Healing | None = None
    """None if healing was not asked for."""

    @property
    def healed(self) -> str:
        """Method of the repair that was kept; empty if there was none."""
        return self.healing.method if self.healing and self.healing.method != "none" else ""

    @property
    def removal(self) -> Removal:
        """What this cut took, by the numbers of ``source``."""
        width = tuple((int(b), n) for b, n in self.mlp_width.items() if b.isdecimal())
        return Removal(self.dropped, self.attention, self.mlp, width, self.neurons)

    @property
    def counted(self) -> str:
        """What this cut took, in numbers: ``2 blocks``, or ``2 blocks and 3 parts of blocks``."""
        count, parts = len(self.dropped), len(self.attention) + len(self.mlp)
        narrow = len(self.mlp_width)
        found = [f"{count} block{'s' * (count != 1)}"] if count or not (parts or narrow) else []
        found += [f"{parts} part{'s' * (parts != 1)} of blocks"] if parts else []
        found += [f"some neurons of {narrow} MLP{'s' * (narrow != 1)}"] if narrow else []
        return " and ".join(found)

    @property
    def planned(self) -> PlanFile | None:
        """What the recorded plan says; None without a plan."""
        return from_dict(PlanFile, self.plan) if self.plan else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values behind the schema number."""
        return {"schema": workspace.SCHEMA, **super().to_dict()}

    def to_text(self) -> str:
        """Return the file's text; it is written into a folder that is not published yet."""
        return workspace.to_json(self.to_dict(), indent=2) + "\n"
