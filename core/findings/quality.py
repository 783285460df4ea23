"""Finding of a study: a variant whose quality degraded substantially."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.compare.candidates import Candidate, candidates
from core.compare.verdict import LARGE
from core.findings.finding import Finding
from core.prune.plan import default_protection
from core.study import Protocol, Study
from core.words import rounded

BETTER = 0.95
"""Another variant of the same size counts as better below this share of the perplexity."""
NEAR = 0.02
"""Ratios this close are the same size."""


@dataclass(frozen=True)
class Loss:
    """One checkpoint, with its perplexity relative to the dense model."""

    candidate: Candidate
    times: float
    ppl: float


def large_drop(study: Study, protocol: Protocol | None = None) -> Finding | None:
    """Return a finding if a pruned checkpoint has a far higher perplexity than the dense model.

    A checkpoint that retraining brought back below the limit is left out. ``protocol``: which
    perplexity to compare; by default the study's first one.
    """
    protocol = protocol or next(iter(study.protocols), None)
    found = candidates(study, protocol) if protocol else ()
    dense = next((c.ppl for c in found if c.kind == "dense"), None)
    if not dense or protocol is None:
        return None
    lost = [
        Loss(c, c.ppl / dense, c.ppl)
        for c in found
        if c.kind in ("depth", "width") and c.ppl and not c.is_plan
    ]
    recovered = {x.candidate.parent for x in lost if x.candidate.retrained and x.times < LARGE}
    large = [x for x in lost if x.times >= LARGE and x.candidate.id not in recovered]
    if not large:
        return None
    worst = max(large, key=lambda x: x.times)
    others = len(large) - 1
    also = f" {'One other variant' if others == 1 else f'{others} other variants'} did too."
    ratio = worst.candidate.ratio
    size = f" with {ratio:.0%} of the parameters removed" if ratio else ""
    return Finding(
        "large-drop",
        f"{worst.candidate.label} degraded substantially: perplexity {rounded(worst.ppl)}, "
        f"{worst.times:.2f} times that of the dense model ({rounded(dense)}){size}."
        f"{also if others else ''}",
        {f"{x.candidate.label}, times dense": round(x.times, 3) for x in large}
        | {"measured by": protocol.label},
        " ".join(_advice(worst, found, study)),
    )


def _advice(worst: Loss, found: Sequence[Candidate], study: Study) -> list[str]:
    """Advise what may help: another criterion, more protection, fewer blocks, retraining."""
    mine = worst.candidate
    advice = []
    same_size = [
        c
        for c in found
        if c.ppl
        and c.kind in ("depth", "width")
        and abs((c.ratio or 0) - (mine.ratio or 0)) <= NEAR
        and c.ppl < BETTER * worst.ppl
    ]
    if same_size:
        best = min(same_size, key=lambda c: c.ppl or 0)
        advice.append(f"Use {best.label} instead: same size, perplexity {rounded(best.ppl)}.")
    elif mine.kind == "depth":
        advice.append("Compare criteria: the curve shows which order of blocks costs least.")
    exposed = _exposed(mine, study)
    if exposed:
        blocks = "Block" if len(exposed) == 1 else "Blocks"
        names = ", ".join(map(str, exposed))
        verb = "is" if len(exposed) == 1 else "are"
        advice.append(f"{blocks} {names} {verb} usually protected; protect more blocks.")
    if mine.quantized:
        advice.append("Use more bits or a smaller group, or remove less before quantizing.")
    elif not mine.retrained:
        advice.append("Retrain it, or remove less.")
    else:
        advice.append("Train it longer, use continued pretraining, or remove less.")
    return advice


def _exposed(candidate: Candidate, study: Study) -> list[int]:
    """Return the dropped blocks that the default protection would have kept."""
    blocks = _blocks(study)
    if candidate.kind != "depth" or not blocks:
        return []
    first, last = default_protection(blocks)
    return sorted(b for b in candidate.dropped if b < first or b >= blocks - last)


def _blocks(study: Study) -> int | None:
    from core.study import info_of

    info = info_of(study.dense)
    return info.blocks if info else None
