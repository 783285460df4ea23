"""Finding of a study: the verdict on its variants."""

from __future__ import annotations

from core.compare.verdict import Verdict, verdict_of
from core.findings.finding import Finding
from core.study import Study
from core.study.settings import Settings


def decision(study: Study, settings: Settings) -> Finding | None:
    """Return the verdict on a study as a finding; None if nothing was measured.

    That of `core.compare.verdict`, which every page and the report show.
    """
    found = verdict_of(study, settings)
    take = found.take
    if take is None or take.ppl is None:
        return None
    winners = {"quality": found.quality, "speed": found.speed, "memory": found.memory}
    evidence = {f"best by {name}": f"{c.label}: {found.facts(c)}"
                for name, c in winners.items() if c}  # fmt: skip
    if found.protocol:
        evidence["perplexity"] = found.protocol.label
    return Finding("verdict", found.sentence, evidence, _next(found))


def _next(found: Verdict) -> str:
    take = found.take
    assert take
    if not (take.speed or take.memory):
        return "Benchmark it beside the dense model: its speed and memory are unknown."
    if take.speed is None or take.speed.how == "estimated":
        return f"Benchmark {take.label} beside the dense model: its speed is only estimated."
    if not take.answers:
        return "Evaluate it and the dense model on tasks: perplexity is not the whole of quality."
    if not found.pays:
        return "Remove less, retrain longer, or try another criterion or width pruning."
    return f"Try {take.label} in the Playground, then export it."
