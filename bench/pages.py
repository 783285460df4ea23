"""Load times of the pages and response time of a click: ``python -m bench.pages [CHECKPOINT]``.

Runs a real dashboard on its own workspace and a headless Chromium on the same machine. For every
page: the browser's first contentful paint, and the time until the page's heading appears, both from
the start of the navigation, in a fresh browser session each time. For clicks: from the press until
the page shows the click's effect, measured inside the page.

The demo's workspace is filled from the command line. For another checkpoint give its workspace:
``python -m bench.walk smollm2 --workspace WS``, then ``python -m bench.pages smollm2 --workspace WS
--save``. Each checkpoint has its own section of docs/results/pages_bench.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import time
from typing import Any

from bench.dashboard import ROOT, chromium, fill, serve, settled, workspace
from core.runs.workspace import Workspace

RESULT = ROOT / "docs" / "results" / "pages_bench.md"
HEAD = "# Pages: load and response times"
PAGES = (
    *("", "checkpoint", "importance", "prune", "retrain", "evaluate", "compare", "playground"),
    *("presentation", "jobs"),
)
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def opened(url: str, path: str, model: str) -> tuple[float, float, float]:
    """Return seconds to first paint, to the heading, and until the page is complete."""
    with chromium(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        began = time.perf_counter()
        page.goto(f"{url}/{path}?model={model}", wait_until="commit")
        page.locator("h1").first.wait_for(timeout=60000)
        heading = time.perf_counter() - began
        settled(page)
        return page.evaluate(PAINT) / 1000, heading, time.perf_counter() - began


def pill(page: Any, block: int) -> float:
    """Return seconds from pressing a block's pill until the chart shows it dropped or kept."""
    return float(
        page.evaluate(
            """block => new Promise(done => {
                const state = () => {
                    const chart = document.querySelector(".js-plotly-plot");
                    const bars = chart && chart.data ? chart.data[0].customdata : [];
                    return (bars.find(b => b[0] === block) || [])[1];
                };
                const before = state();
                const pills = [...document.querySelectorAll('[data-testid=stButtonGroup] button')];
                const began = performance.now();
                pills.find(p => p.innerText.trim() === String(block)).click();
                const look = () => state() && state() !== before
                    ? done((performance.now() - began) / 1000) : requestAnimationFrame(look);
                look();
            })""",
            block,
        )
    )


def clicks(url: str, model: str, count: int) -> list[float]:
    """Return the response times of ``count`` clicks on the Prune page's blocks."""
    with chromium(viewport={"width": 1280, "height": 1400}) as context:
        page = context.new_page()
        page.goto(f"{url}/prune?model={model}")
        page.locator(".js-plotly-plot").first.wait_for(timeout=60000)
        settled(page)
        found = []
        for number in range(count):
            page.wait_for_timeout(700)
            found.append(pill(page, 4 + number % 6))
            settled(page)
        return found


def row(name: str, values: list[float], aim: str) -> str:
    """Return a table row: median and worst."""
    return f"| {name} | {statistics.median(values):.2f} | {max(values):.2f} | {aim} |"


def sections() -> dict[str, str]:
    """Return the sections of the page of results by their checkpoint."""
    text = RESULT.read_text(encoding="utf-8") if RESULT.is_file() else ""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))


def measured(url: str, model: str, repeat: int, presses: int) -> list[str]:
    """Return the table of a checkpoint's pages."""
    opened(url, "", model)  # the first visit pays for the imports
    rows = ["| what | median s | worst s | aim s |", "| --- | ---: | ---: | ---: |"]
    for path in PAGES:
        times = list(zip(*(opened(url, path, model) for _ in range(repeat)), strict=True))
        name = path or "home"
        rows.append(row(f"{name}: first paint", list(times[0]), "1.5"))
        rows.append(row(f"{name}: heading", list(times[1]), ""))
        rows.append(row(f"{name}: complete", list(times[2]), ""))
        print("\n".join(rows[-3:]), flush=True)
    rows.append(row("a block dropped or kept", clicks(url, model, presses), "0.3"))
    print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--workspace", default="", help="with the study of the checkpoint")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clicks", type=int, default=12)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    asked = parser.parse_args()
    if asked.checkpoint != "demo" and not asked.workspace:
        parser.error("give the --workspace that holds the study of this checkpoint")
    with workspace(asked.workspace) as folder:
        if not asked.workspace:
            fill(folder)
        runs = sum(r.state == "done" for r in Workspace(folder).runs())
        with serve() as url:
            rows = measured(url, asked.checkpoint, asked.repeat, asked.clicks)
    more = " --workspace WS" if asked.workspace else ""
    about = (
        f"`python -m bench.pages {asked.checkpoint}{more} --repeat {asked.repeat}`: a workspace "
        f"with {runs} finished runs, browser and dashboard on one machine with {os.cpu_count()} "
        f"cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} at the end; seconds from the "
        "start of the navigation, in a fresh browser session each time, and from a press until the "
        "chart shows its effect."
    )
    if asked.save:
        found = sections() | {asked.checkpoint: "\n".join([about, "", *rows])}
        parts = (f"## {name}\n\n{text}\n" for name, text in found.items())
        RESULT.write_text("\n".join([HEAD, "", *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
