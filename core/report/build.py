"""The report as a web page, composed from a study's material."""

from __future__ import annotations

import time

from core import __version__, words
from core.compare import answers
from core.compare.verdict import Contender
from core.findings import Finding, of_run, of_study
from core.report import html, sections
from core.report.material import Material


def findings_of(material: Material, budget_mib: float | None = None) -> list[Finding]:
    """Return the findings of the importance run in the report and of the study.

    Memory is compared with the budget, otherwise with the memory of the benchmarked device.
    """
    scene = material.scene
    budget = budget_mib or scene.capacity_mib
    where = "the budget" if budget_mib else "the benchmarked device"
    found = of_run(material.scores.path) if material.scores else []
    bench = scene.runs[0] if scene.runs else None
    return found + of_study(
        material.study, scene.protocol, bench, budget_mib=budget, where=where,
        cell=material.verdict.cell, settings=material.settings,
    )  # fmt: skip


def tiles(one: Contender) -> dict[str, tuple[str, str]]:
    """Return the large figures of a variant: label -> (figure, its source)."""
    found = {"Removed": (words.percent(one.ratio), "of the parameters, counted")}
    if one.speed:
        noise = f", noise {one.speed.noise:.0%}" if one.speed.noise is not None else ""
        found["Speed"] = (f"{one.speed.value:.2f} x", f"dense, {one.speed.how}{noise}")
    if one.memory and one.memory.times:
        found["Memory"] = (f"{one.memory.times:.0%}", f"of dense, {one.memory.how}")
    if one.ppl and one.ppl.times:
        found["Perplexity"] = (f"{one.ppl.times:.2f} x", "dense, measured; lower is better")
    if one.accuracy is not None:
        before = (answers.mean(one.answers) or (0.0, 0.0))[1]
        found["Right answers"] = (f"{one.accuracy:.0%}", f"{before:.0%} before, measured")
    return found


def page(material: Material, budget_mib: float | None = None) -> str:
    """Return the whole report as one self-contained HTML page."""
    name = material.study.dense.label
    when = time.strftime("%Y-%m-%d %H:%M")
    lead: list[html.Part] = [
        html.Paragraph(f"{material.study.dense.id}, {len(material.runs)} runs, {when}.", note=True)
    ]
    found = material.verdict
    if found.take:
        lead += [html.Paragraph(found.sentence), html.Tiles(tiles(found.take))]
        lead.append(html.Paragraph(found.measured_on, note=True))
    chapters = [
        sections.checkpoint(material),
        sections.findings(findings_of(material, budget_mib)),
        sections.importance(material),
        sections.variants(material),
        sections.retraining(material),
        sections.quality(material),
        sections.cost(material),
        sections.others(material),
        *sections.reproduce(material),
    ]
    foot = f"Written by Depthcut {__version__} on {when} from the files of the runs listed above."
    return html.page(f"Depthcut report: {name}", lead, chapters, foot)
