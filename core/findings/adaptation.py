"""Finding of a study: a gain of retraining that is adaptation to the training text.

The loss counts it as recovery; KL(dense || model), which only falls if the model gets closer to the
dense one, does not.
"""

from __future__ import annotations

from core.compare.verdict import Contender, Verdict
from core.findings.finding import Finding


def adaptation(found: Verdict) -> Finding | None:
    """Return a finding if retraining brought back far more of the loss than of the KL.

    Of several variants, the one that the verdict takes, else the one where the two differ most.
    """
    adapted = [one for one in found.found[1:] if any(s.is_adaptation for s in one.shares)]
    if not adapted:
        return None
    take = found.take
    worst = take if take in adapted else max(adapted, key=_difference)
    assert worst is not None
    others = len(adapted) - 1
    also = f" So it is for {'one other variant' if others == 1 else f'{others} other variants'}."
    evidence: dict[str, float | list[str]] = {}
    for share in worst.shares:
        if share.by_loss is not None:
            evidence[f"recovered by loss, {share.text}"] = round(share.by_loss, 4)
        if share.by_kl is not None:
            evidence[f"recovered by KL, {share.text}"] = round(share.by_kl, 4)
    return Finding(
        "adaptation",
        f"{worst.label}: {worst.recovery}{also if others else ''}",
        {**evidence, "variants": [one.label for one in adapted]},
        "Evaluate it on a text that it was not trained on. Training on the dense model's "
        "distributions (KL) recovers more of its behaviour.",
    )


def _difference(one: Contender) -> float:
    return max((s.by_loss or 0.0) - (s.by_kl or 0.0) for s in one.shares if s.is_adaptation)
