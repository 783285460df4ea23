"""The report as a web page, composed from a study's material."""

from __future__ import annotations

import time

from core import __version__
from core.compare import headline
from core.compare.headline import Stop
from core.compare.speed import NOISY
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
        cell=headline.cell_of(scene),
    )  # fmt: skip


def sentence(stop: Stop) -> str:
    """Return in a few words what a cut gains and what it costs."""
    what = f"{len(stop.dropped)} blocks" if len(stop.dropped) != 1 else "one block"
    text = f"Dropping {what} removes {stop.ratio:.0%} of the parameters."
    gains = []
    if stop.speed:
        gains.append(_pace(stop.speed, stop.noise or 0.0))
    if stop.memory:
        gains.append(f"needs {stop.memory:.0%} of the memory")
    if gains:
        text += f" The model {' and '.join(gains)} ({stop.cost})."
    if stop.ppl:
        text += f" Its perplexity is {stop.ppl:.2f} times that of the dense model (measured)"
        if stop.retrained_ppl:
            text += (
                f", and {stop.retrained_ppl:.2f} times after retraining with {stop.retrained_by}"
            )
        text += "."
    return text


def _pace(speed: float, noise: float) -> str:
    if noise > NOISY:
        return f"was measured with too much noise ({noise:.0%}) to tell whether it is faster"
    if abs(speed - 1) <= noise:
        return f"is as fast as before within the noise of {noise:.0%}"
    return f"generates {speed:.2f} times as fast"


def tiles(stop: Stop) -> dict[str, tuple[str, str]]:
    """Return the large figures of a cut: label -> (figure, its source)."""
    found = {"Removed": (f"{stop.ratio:.0%}", "of the parameters, counted")}
    noise = f", noise {stop.noise:.0%}" if stop.noise is not None else ""
    if stop.speed:
        found["Speed"] = (f"{stop.speed:.2f} x", f"dense, {stop.cost}{noise}")
    if stop.memory:
        found["Memory"] = (f"{stop.memory:.0%}", f"of dense, {stop.cost}")
    if stop.ppl:
        after = (
            f", {stop.retrained_ppl:.2f} x after {stop.retrained_by}" if stop.retrained_ppl else ""
        )
        found["Perplexity"] = (f"{stop.ppl:.2f} x", f"dense, measured{after}")
    return found


def page(material: Material, budget_mib: float | None = None) -> str:
    """Return the whole report as one self-contained HTML page."""
    name = material.study.dense.label
    when = time.strftime("%Y-%m-%d %H:%M")
    lead: list[html.Part] = [
        html.Paragraph(f"{material.study.dense.id}, {len(material.runs)} runs, {when}.", note=True)
    ]
    found = headline.stops(material.scene)
    if found:
        stop = headline.start(found)
        batch, given, made = headline.cell_of(material.scene)
        how = f"{stop.label}. Speed and memory at batch {batch}, {given} tokens in, {made} out; "
        how += "all figures relative to the dense model."
        lead += [html.Paragraph(sentence(stop)), html.Tiles(tiles(stop))]
        lead.append(html.Paragraph(how, note=True))
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
