"""Candidates: the checkpoints of a study, and plans whose perplexity is known.

A candidate has a perplexity by one protocol. A checkpoint that was not evaluated by it takes the
perplexity of a plan, or of another checkpoint, that leaves out the same blocks: the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from core.benchmark.analytic import Shapes, without
from core.checkpoint.headers import CheckpointInfo
from core.study import Protocol, Quality, Study, Variant, criterion_label, info_of
from core.study.keeping import kept

NEAR = 0.05
"""Maximum difference of ratios for a series of nothing but plans to be shown with checkpoints."""


@dataclass(frozen=True)
class Candidate(Variant):
    """One point of the comparison: a variant, or a plan for one, with its perplexity.

    The id of a plan is ``plan:CRITERION:3,5``.
    """

    ppl: float | None = None
    """By the chosen protocol; None if it was not measured."""
    is_plan: bool = False
    """Whether its checkpoint has not been written yet."""


@kept
def candidates(study: Study, protocol: Protocol | None) -> tuple[Candidate, ...]:
    """Return the study's checkpoints, dense first, then the plans that were not written."""
    plans = study.plans(protocol) if protocol else ()
    by_blocks = {frozenset(q.drop): q for q in sorted(plans, key=lambda q: q.started)}
    found = [_of_variant(study, v, protocol, by_blocks) for v in study.variants]
    cut = {frozenset(c.dropped): c.ppl for c in found if is_plain_cut(c) and c.ppl}
    found = [
        replace(c, ppl=cut.get(frozenset(c.dropped))) if is_plain_cut(c) and not c.ppl else c
        for c in found
    ]
    made = {frozenset(c.dropped) for c in found if is_plain_cut(c)}
    taken: set[str] = set()
    for plan in sorted(plans, key=lambda q: -q.started):
        candidate = _of_plan(plan, study.dense.id)
        if frozenset(plan.drop) not in made and candidate.id not in taken:
            taken.add(candidate.id)
            found.append(candidate)
    return tuple(found)


def is_plain_cut(candidate: Candidate) -> bool:
    """Whether blocks were removed and nothing else was done: a plan for it is the same model."""
    changed = candidate.retrained or candidate.quantized or candidate.healed
    return candidate.kind == "depth" and not changed and not candidate.removal.partial


def _of_variant(
    study: Study,
    variant: Variant,
    protocol: Protocol | None,
    plans: dict[frozenset[int], Quality],
) -> Candidate:
    measured = study.perplexity(variant.id, protocol) if protocol else None
    shared = {f.name: getattr(variant, f.name) for f in fields(variant)}
    found = Candidate(**shared, ppl=measured.ppl if measured else None)
    same = plans.get(frozenset(variant.dropped)) if is_plain_cut(found) else None
    return replace(found, ppl=same.ppl) if same and not measured else found


def _of_plan(plan: Quality, dense: str) -> Candidate:
    label = criterion_label(plan.criterion, plan.protected)
    blocks = ",".join(map(str, plan.drop))
    return Candidate(
        id=f"plan:{plan.criterion}:{blocks}",
        label=f"{label} {plan.ratio:.0%}, planned" if plan.ratio else f"{label}, planned",
        kind="depth",
        method=plan.criterion,
        method_label=label,
        dropped=plan.drop,
        cut_in=plan.cut_in,
        parameters=plan.parameters,
        ratio=plan.ratio,
        parent=dense,
        ppl=plan.ppl,
        is_plan=True,
    )


def shapes_of(candidate: Candidate, dense: CheckpointInfo | None) -> Shapes | None:
    """Return the shapes to estimate from: a checkpoint's headers; for a plan they are computed."""
    if not candidate.is_plan:
        return info_of(candidate)
    return without(dense, candidate.dropped) if dense else None


def series_points(found: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Return the pruned and quantized candidates of each series, by ratio."""
    lines: dict[str, list[Candidate]] = {}
    for candidate in found:
        if candidate.is_made and candidate.ratio is not None:
            lines.setdefault(candidate.series, []).append(candidate)
    return {name: sorted(line, key=lambda c: c.ratio or 0.0) for name, line in lines.items()}


def nearest(found: Sequence[Candidate], ratio: float) -> list[Candidate]:
    """Return dense and others, and of every other series the candidate nearest to ``ratio``.

    At equal distance a checkpoint comes before a plan, then the smaller cut. A series is left out
    if it has only plans that differ by more than `NEAR` (e.g. one block of an importance run).
    """
    chosen = [c for c in found if c.kind in ("dense", "other") and not c.quantized]
    for line in series_points(found).values():
        best = min(line, key=lambda c: (round(abs((c.ratio or 0) - ratio), 4), c.is_plan))
        near = abs((best.ratio or 0) - ratio) <= NEAR
        if near or not all(c.is_plan for c in line):
            chosen.append(best)
    return chosen
