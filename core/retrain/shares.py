"""Shares of what pruning cost that a retraining brought back, on each text it measured. No torch.

The loss also falls because a model adapts to the training text; KL(dense || model) does not. So
both measures are stated together, and a gain by the loss alone is called adaptation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.retrain.recovery import Held, Recovery, is_adaptation
from core.retrain.results import Measure, Summary
from core.words import listed, percent

HELD_OUT = "held out"
"""Name of the held-out rows in evaluation.csv."""


@dataclass(frozen=True)
class Share:
    """What came back on one text; None for what is not reported."""

    source: str
    """SOURCE of the text; of the held-out rows, what they were taken from."""
    by_loss: float | None = None
    """Share of the loss gap to the dense model that was closed."""
    by_kl: float | None = None
    """Share of KL(dense || model) that was closed."""
    is_held_out: bool = False
    """Whether the text is rows of the training data, held out."""

    @property
    def is_adaptation(self) -> bool:
        """Whether far more of the loss came back than of the KL."""
        if self.by_loss is None or self.by_kl is None:
            return False
        return is_adaptation(self.by_loss, self.by_kl)

    @property
    def text(self) -> str:
        """What it was measured on."""
        name = self.source
        if not name.startswith("hub:"):
            name = name.rstrip("/").rsplit("/", 1)[-1] or name
        if not self.is_held_out:
            return name
        return f"held-out rows of {name}" if name else "held-out rows"

    @property
    def words(self) -> str:
        """Both shares and the text, for the middle of a sentence."""
        said = [] if self.by_loss is None else [f"{percent(self.by_loss)} of the loss gap"]
        if self.by_kl is not None:
            said.append(f"{percent(self.by_kl)} of the KL to the dense model")
        return f"{listed(said)} on {self.text}"


def shares(summary: Summary, measures: Iterable[Measure] = ()) -> tuple[Share, ...]:
    """Return what came back on the held-out rows, then on every other text of evaluation.csv.

    Texts without a share by either measure are left out.
    """
    table = {(row.source, row.measure): row for row in measures}
    held = Share(summary.heldout.source, summary.recovered, summary.recovered_kl, is_held_out=True)
    if held.by_kl is None:
        held = Share(held.source, held.by_loss, _by_kl(table.get((HELD_OUT, "kl"))), True)
    found = [held]
    for source in dict.fromkeys(source for source, _ in table if source != HELD_OUT):
        loss, kl = table.get((source, "loss")), table.get((source, "kl"))
        found.append(Share(source, _by_loss(loss), _by_kl(kl)))
    return tuple(one for one in found if (one.by_loss, one.by_kl) != (None, None))


def between(source: str, dense: float, before: float, after: float) -> Share | None:
    """Return the share by loss between three losses in nats per token; None if not reported."""
    share = Recovery(dense, Held(before), Held(after)).recovered
    return None if share is None else Share(source, share)


def sentence(found: Sequence[Share]) -> str:
    """Return what retraining recovered on all texts, and whether it is adaptation; or nothing."""
    if not found:
        return ""
    told = f"Retraining recovered {'; '.join(one.words for one in found)}."
    adapted = [one.text for one in found if one.is_adaptation]
    if not adapted:
        return told
    where = "" if len(adapted) == len(found) else f" on {listed(adapted)}"
    return (
        f"{told} The KL closed less than the loss{where}: part of the gain is adaptation to the "
        "training text, not the dense model's behaviour."
    )


def _by_loss(row: Measure | None) -> float | None:
    if row is None or row.dense is None or row.before is None or row.after is None:
        return None
    return Recovery(row.dense, Held(row.before), Held(row.after)).recovered


def _by_kl(row: Measure | None) -> float | None:
    if row is None or row.before is None or row.after is None:
        return None
    return Recovery(None, Held(0.0, row.before), Held(0.0, row.after)).recovered_kl
