"""Findings: what the figures of a run or a study mean, in plain words, and what to try next.

Pure functions from tables to `Finding`: nothing is measured again or loaded, and no torch.

of_run(folder)            an importance run: criteria that disagree, too few calibration rows
of_search(folder)         a search: whether its methods differ on held-out text beyond noise
of_texts(folder, others)  a search: whether the calibration text decides more than the method
of_plan(removal, blocks)  a plan: it takes as many attentions as cost more on other text
of_study(study, ...)      the verdict; variants: large drop in quality, generation lost while the
                          mean is kept, retraining that adapted to its text, too much memory,
                          gains below noise
"""

from __future__ import annotations

from pathlib import Path

from core.compare.measured import Cell
from core.compare.verdict import protocol_of, verdict_of
from core.findings.adaptation import adaptation
from core.findings.cost import CELL, gain_below_noise, memory_too_large
from core.findings.decision import decision
from core.findings.finding import Finding
from core.findings.generation import generation_lost
from core.findings.plans import of_plan
from core.findings.quality import large_drop
from core.findings.scores import of_run
from core.findings.sets import of_search, of_texts
from core.study import Benchmark, Protocol, Study
from core.study.settings import Settings, defaults

__all__ = ["Finding", "of_plan", "of_run", "of_search", "of_study", "of_texts"]


def of_study(
    study: Study,
    protocol: Protocol | None = None,
    bench: Benchmark | None = None,
    *,
    settings: Settings | None = None,
    cell: Cell | None = None,
    budget_mib: float | None = None,
    where: str = "the budget",
) -> list[Finding]:
    """Return what a study shows.

    Args:
        study: What is known about a dense checkpoint and its variants.
        protocol: The perplexity to compare. Default: the one that the verdict is on.
        bench: The benchmark run to use. Default: the newest.
        settings: The study's settings. Default: those of a new study.
        cell: The point of its grid. Default: the smallest batch.
        budget_mib: Available memory; without it there is no finding about memory.
        where: What has that memory, e.g. ``cuda:0``.
    """
    settings = settings or defaults(study.dense.folder or Path(study.dense.id))
    bench = bench or next(iter(study.benchmarks), None)
    protocol = protocol or protocol_of(study, settings.evaluation)
    verdict = verdict_of(study, settings)
    found = (
        decision(study, settings),
        large_drop(study, protocol),
        generation_lost(verdict),
        adaptation(verdict),
        memory_too_large(study, budget_mib, where, cell or CELL) if budget_mib else None,
        gain_below_noise(study, bench, cell) if bench else None,
    )
    return [f for f in found if f]
