"""Load times of the pages and response time of a click: ``python -m bench.pages``.

Runs a real dashboard on its own workspace and a headless Chromium on the same machine. For every
page: the browser's first contentful paint, and the time until the page's heading appears, both from
the start of the navigation, in a fresh browser session each time. For clicks: from the press until
the page shows the click's effect, measured inside the page.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import Any

from bench.dashboard import ROOT, chromium, fill, serve, settled, workspace

RESULT = ROOT / "docs" / "results" / "pages_bench.md"
PAGES = ("", "checkpoint", "importance", "prune", "retrain", "evaluate", "compare", "jobs")
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def opened(url: str, path: str) -> tuple[float, float, float]:
    """Return seconds to first paint, to the heading, and until the page is complete."""
    with chromium(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        began = time.perf_counter()
        page.goto(f"{url}/{path}?model=demo", wait_until="commit")
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


def clicks(url: str, count: int) -> list[float]:
    """Return the response times of ``count`` clicks on the Prune page's blocks."""
    with chromium(viewport={"width": 1280, "height": 1400}) as context:
        page = context.new_page()
        page.goto(f"{url}/prune?model=demo")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clicks", type=int, default=12)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    with workspace() as folder:
        fill(folder)
        with serve() as url:
            opened(url, "")  # the first visit pays for the imports
            rows = ["| what | median s | worst s | aim s |", "| --- | ---: | ---: | ---: |"]
            for path in PAGES:
                times = list(
                    zip(*(opened(url, path) for _ in range(arguments.repeat)), strict=True)
                )
                name = path or "home"
                rows.append(row(f"{name}: first paint", list(times[0]), "1.5"))
                rows.append(row(f"{name}: heading", list(times[1]), ""))
                rows.append(row(f"{name}: complete", list(times[2]), ""))
                print("\n".join(rows[-3:]), flush=True)
            rows.append(row("a block dropped or kept", clicks(url, arguments.clicks), "0.3"))
            print(rows[-1])
    load = os.getloadavg()[0]
    text = "\n".join(
        [
            "# Pages: load and response times",
            "",
            f"`python -m bench.pages --repeat {arguments.repeat}`: browser and dashboard on one "
            f"machine with {os.cpu_count()} cores ({platform.machine()}), load {load:.1f} at the "
            "end; seconds from the start of the navigation, in a fresh browser session each time, "
            "and from a press until the chart shows its effect.",
            "",
            *rows,
            "",
        ]
    )
    if arguments.save:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
