"""The report as a web page, composed from a study's material."""

from __future__ import annotations

import time

from core import __version__, words
from core.compare import answers
from core.compare.speed import NOISY
from core.compare.verdict import MIB, SEEN, Contender, Figure, Verdict
from core.findings import Finding, of_run, of_study
from core.report import html, sections
from core.report.material import Material
from core.words import rounded


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
    if one.speed and (one.speed.noise or 0.0) > NOISY:
        found["Speed"] = ("unclear", f"{one.speed.how}, with a noise of {one.speed.noise:.0%}")
    elif one.speed:
        noise = f" ± {one.speed.noise:.0%}" if (one.speed.noise or 0.0) >= SEEN else ""
        found["Speed"] = (f"{one.speed.value:.2f} x", f"the dense speed, {one.speed.how}{noise}")
    if one.memory and one.memory.times:
        found["Memory"] = (f"{one.memory.times:.0%}", f"of the dense model's, {one.memory.how}")
    if one.ppl and one.ppl.times:
        found["Perplexity"] = (
            f"{one.ppl.times:.2f} x",
            "the dense model's, measured; lower is better",
        )
    if one.accuracy is not None:
        before = (answers.mean(one.answers) or (0.0, 0.0))[1]
        found["Right answers"] = (f"{one.accuracy:.0%}", f"{before:.0%} before, measured")
    if share := answers.mean(one.written):
        found["Written answers"] = (f"{share[0]:.0%}", f"right; {share[1]:.0%} before, measured")
    return found


def beside(found: Verdict, one: Contender) -> list[dict[str, str]]:
    """Return the table of a variant beside the dense model and the others of its size.

    Before retraining, the best depth and the best width variant. An estimate says so. What none of
    them was measured for has no column.
    """
    kinds = {"depth": "the best depth variant", "width": "the best width variant"}
    named: list[tuple[Contender, str]] = [(found.dense, "before pruning"), (one, "this variant")]
    before = found.before(one)
    named += [(before, "before retraining")] if before else []
    named += [(other, why) for kind, why in kinds.items() if (other := found.best(kind))]
    rows: dict[str, dict[str, str]] = {}
    for variant, why in named:
        if variant.id not in rows:
            rows[variant.id] = {"": variant.label, "what it is": why} | _cells(variant)
    known = {name for row in rows.values() for name, cell in row.items() if cell != UNKNOWN}
    return [{name: cell for name, cell in row.items() if name in known} for row in rows.values()]


def _cells(one: Contender) -> dict[str, str]:
    def marked(text: str, figure: Figure) -> str:
        return f"{text}, estimated" if figure.how == "estimated" else text

    is_dense = one.candidate.kind == "dense" and not one.ratio
    ppl = UNKNOWN
    if one.ppl:
        ppl = rounded(one.ppl.value) + ("" if is_dense else f" ({one.ppl.times or 0:.2f} x)")
    speed = "1.00 x" if is_dense else UNKNOWN
    if one.speed and not is_dense:
        noise = f" ± {one.speed.noise:.0%}" if (one.speed.noise or 0.0) >= SEEN else ""
        speed = marked(f"{one.speed.value:.2f} x{noise}", one.speed)
    memory = marked(words.size(one.memory.value * MIB), one.memory) if one.memory else UNKNOWN
    right = f"{one.accuracy:.0%}" if one.accuracy is not None else UNKNOWN
    written = answers.mean(one.written)
    return {
        "parameters removed": words.percent(one.ratio),
        "perplexity": ppl,
        "speed": speed,
        "memory": memory,
        "right answers": right,
        "written answers": f"{written[0]:.0%}" if written else UNKNOWN,
    }


UNKNOWN = "not measured"
PERPLEXITY = (
    "Perplexity is the number of words that the model hesitates between at every step, on "
    "average: lower is better, and twice the dense model's means twice as unsure."
)
"""What perplexity means, in a sentence."""


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
        table = beside(found, found.take)
        lead += html.table(table, "Beside the dense model, and others of its size")
        lead.append(html.Paragraph(f"{found.measured_on} {PERPLEXITY}", note=True))
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
