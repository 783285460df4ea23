"""Finding of a study: choosing among answers is kept, but writing them is lost.

Pruning blocks costs generated text more than multiple choice (arXiv 2602.01997), and a mean over
multiple-choice tasks does not show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.compare import answers
from core.compare.answers import Answers
from core.compare.verdict import Contender, Verdict
from core.findings.finding import Finding

KEPT = 0.9
"""Share of the dense model's right choices from which on they count as kept."""
LOST = 0.75
"""Share of the dense model's right written answers below which they count as lost."""
CERTAIN = 2.0
"""Standard errors by which the loss must exceed chance."""


def generation_lost(found: Verdict) -> Finding | None:
    """Return a finding if a variant keeps its mean over tasks but not what it writes.

    Of several, the one that the verdict takes, else the one that lost most.
    """
    lost = [one for one in found.found[1:] if _is_lost(one)]
    if not lost:
        return None
    take = found.take
    worst = take if take in lost else min(lost, key=_share)
    assert worst is not None
    right, before = answers.mean(worst.answers) or (0.0, 0.0)
    now, then = answers.mean(worst.written) or (0.0, 0.0)
    others = len(lost) - 1
    also = f" {'One other variant does' if others == 1 else f'{others} other variants do'} too."
    return Finding(
        "generation-lost",
        f"{worst.label} keeps its choices but not its own words: it answers "
        f"{answers.in_words(worst.answers)}, but writes the answer to "
        f"{answers.in_words(worst.written)}.{also if others else ''}",
        {
            "right choices": round(right, 4),
            "right choices, dense": round(before, 4),
            "right written answers": round(now, 4),
            "right written answers, dense": round(then, 4),
            "variants": [one.label for one in lost],
        },
        "Retrain it on text that the dense model wrote, or on its distributions (KL), and look at "
        "the generated answers on Evaluate; remove less if that does not help.",
    )


def _share(one: Contender) -> float:
    now, then = answers.mean(one.written) or (0.0, 1.0)
    return now / then if then else 1.0


def _is_lost(one: Contender) -> bool:
    kept, written = answers.mean(one.answers), answers.mean(one.written)
    if not kept or not written or one.candidate.is_plan or not written[1]:
        return False
    fell = written[1] - written[0]
    return (
        kept[0] >= KEPT * kept[1]
        and written[0] < LOST * written[1]
        and fell > CERTAIN * _error(one.written)
    )


def _error(found: Sequence[Answers]) -> float:
    """Return the standard error of the difference of two mean shares, as if unpaired."""
    parts = [(a.right * (1 - a.right) + a.before * (1 - a.before)) / max(1, a.count) for a in found]
    return math.sqrt(math.fsum(parts)) / len(parts)
