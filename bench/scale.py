"""Pages with many runs, and many sessions at once: ``python -m bench.scale``.

Fills a workspace with invented runs (`bench.many_runs`), starts a real dashboard on it and talks to
it as a browser does, over the WebSocket: a draw counts from the request until the server reports
that the page's script has finished. For every page: the first draw of a server that has just
started, a new session's draw, a redraw (a click), redraws of many sessions at the same moment, and
of many sessions that click now and then (``--pause`` seconds apart on average, at random moments).
Besides the time on the clock, the server's own CPU time is given, which other work on the machine
changes little. With ``--browser``, the first paint and the complete page in headless Chromium too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench import many_runs
from bench.dashboard import ROOT, serve, workspace

RESULT = ROOT / "docs" / "results" / "scale_bench.md"
PAGES = (
    *("", "checkpoint", "importance", "prune", "retrain", "evaluate", "compare", "playground"),
    *("presentation", "jobs"),
)


class Session:
    """One browser session, without a browser: it draws a page and draws it again."""

    def __init__(self, url: str, page: str) -> None:
        self.url = f"{url.replace('http', 'ws', 1)}/_stcore/stream"
        self.page = page
        self.socket: Any = None

    async def draw(self) -> float:
        """Ask for the page and return the seconds until its script has finished.

        Raises `RuntimeError` if the page shows an exception.
        """
        from streamlit.proto.BackMsg_pb2 import BackMsg
        from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
        from websockets.asyncio.client import connect

        began = time.perf_counter()
        if self.socket is None:
            self.socket = await connect(self.url, subprotocols=["streamlit"], max_size=2**28)
        ask = BackMsg()
        ask.rerun_script.query_string = "model=demo"
        ask.rerun_script.page_name = self.page
        await self.socket.send(ask.SerializeToString())
        while True:
            data = await self.socket.recv()
            told = ForwardMsg()
            told.ParseFromString(data)
            if told.HasField("delta") and told.delta.new_element.HasField("exception"):
                raise RuntimeError(told.delta.new_element.exception.message)
            if told.HasField("script_finished"):
                return time.perf_counter() - began

    async def close(self) -> None:
        """End the session."""
        if self.socket is not None:
            await self.socket.close()


@dataclass(frozen=True)
class Timing:
    """Seconds of one page's draws: on the clock, and of the server's CPU."""

    page: str
    cold: float
    cold_cpu: float
    new: float
    new_cpu: float
    again: float
    again_cpu: float
    together: float
    """Median over the sessions that drew at the same moment."""
    slowest: float
    together_cpu: float
    """Of each of these draws."""
    paced: float
    """95th percentile of the draws of sessions that click now and then."""
    paced_cpu: float
    """Of each of these draws."""
    memory_mib: float
    """Resident memory of the server at the end of this page."""

    def row(self) -> str:
        """Return a row of the table."""
        figures = (
            *(self.cold, self.cold_cpu, self.new, self.new_cpu, self.again, self.again_cpu),
            *(self.together, self.slowest, self.together_cpu, self.paced, self.paced_cpu),
        )
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        times = f"{self.together / self.again:.1f} | {self.paced / self.again:.1f}"
        return f"| {self.page or 'home'} | {cells} | {times} | {self.memory_mib:,.0f} |"


def cpu_of(process: psutil.Process) -> float:
    """Return the CPU seconds that a process has used."""
    used = process.cpu_times()
    return float(used.user + used.system)


async def timed(process: psutil.Process, session: Session) -> tuple[float, float]:
    """Return seconds on the clock and of the server's CPU for one draw."""
    before = cpu_of(process)
    seconds = await session.draw()
    return seconds, cpu_of(process) - before


async def paced(crowd: list[Session], pause: float, clicks: int) -> float:
    """Return the 95th percentile of draws, each session clicking at random moments."""
    chance = random.Random(len(crowd))

    async def one(session: Session, pauses: list[float]) -> list[float]:
        times = []
        for wait in pauses:
            await asyncio.sleep(wait)
            times.append(await session.draw())
        return times

    waits = [[chance.expovariate(1 / pause) for _ in range(clicks)] for _ in crowd]
    found = await asyncio.gather(*map(one, crowd, waits))
    return statistics.quantiles([time for times in found for time in times], n=20)[-1]


async def of_page(
    process: psutil.Process, url: str, page: str, arguments: argparse.Namespace
) -> Timing:
    """Measure one page."""
    first = Session(url, page)
    cold = await timed(process, first)
    await first.close()
    new, again = [], []
    for _ in range(arguments.repeat):
        one = Session(url, page)
        new.append(await timed(process, one))
        again.append(await timed(process, one))
        await one.close()
    crowd = [Session(url, page) for _ in range(arguments.sessions)]
    for one in crowd:
        await one.draw()
    before = cpu_of(process)
    times = await asyncio.gather(*(one.draw() for one in crowd))
    together_cpu = (cpu_of(process) - before) / len(crowd)
    before = cpu_of(process)
    now_and_then = await paced(crowd, arguments.pause, arguments.clicks)
    paced_cpu = (cpu_of(process) - before) / (len(crowd) * arguments.clicks)
    memory = process.memory_info().rss / 2**20
    for one in crowd:
        await one.close()
    middle = [statistics.median(x) for x in (*zip(*new, strict=True), *zip(*again, strict=True))]
    return Timing(
        page, *cold, *middle, statistics.median(times), max(times), together_cpu, now_and_then,
        paced_cpu, memory,
    )  # fmt: skip


def server_of(url: str) -> psutil.Process:
    """Return the process that serves ``url``: a child of this one."""
    port = url.rsplit(":", 1)[1]
    return next(p for p in psutil.Process().children() if port in p.cmdline())


def in_browser(url: str, repeat: int) -> list[str]:
    """Return a table of first paint and complete page, in seconds."""
    from bench.pages import opened

    rows = ["| page | first paint s | heading s | complete s |", "| --- | ---: | ---: | ---: |"]
    for page in PAGES:
        times = zip(*(opened(url, page, "demo") for _ in range(repeat)), strict=True)
        cells = " | ".join(f"{statistics.median(figures):.2f}" for figures in times)
        rows.append(f"| {page or 'home'} | {cells} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5.0, help="s between a session's clicks")
    parser.add_argument("--clicks", type=int, default=6, help="clicks of each such session")
    parser.add_argument("--pages", default=",".join(PAGES), help="separated by commas")
    parser.add_argument("--browser", action="store_true", help="also in headless Chromium")
    parser.add_argument("--keep", default="", help="a workspace filled earlier")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    head = [
        "| page | first draw s | its CPU | new session s | its CPU | redraw s | its CPU "
        f"| {arguments.sessions} at the same moment, median s | slowest s | CPU of each "
        f"| {arguments.sessions} now and then, p95 s | CPU of each "
        "| median at the same moment, x one redraw | p95 now and then, x one redraw | memory MiB |",
        "| --- " + "| ---: " * 14 + "|",
    ]
    with workspace(arguments.keep) as folder:
        if not any(Path(folder).glob("*/.run")):
            many_runs.fill(folder, arguments.runs)
        rows, painted = list(head), []
        print("\n".join(head))
        with serve() as url:
            process = server_of(url)
            for page in arguments.pages.split(","):
                found = of_page(process, url, page, arguments)
                rows.append(asyncio.run(found).row())
                print(rows[-1], flush=True)
            if arguments.browser:
                painted = in_browser(url, arguments.repeat)
    text = [
        f"# {arguments.runs:,} runs, and {arguments.sessions} sessions at once",
        "",
        f"`python -m bench.scale --runs {arguments.runs} --sessions {arguments.sessions}"
        f"{' --browser' if arguments.browser else ''}`: "
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} at the end. "
        "A draw is timed from the request until the page's script has finished, over the "
        "WebSocket of a real server; CPU is that of the server. Seconds; medians of "
        f"{arguments.repeat}.",
        "",
        *rows,
        "",
        "Draws at the same moment share one Python process, which runs one thread at a time: the "
        "last one ends after about the CPU of one redraw times the sessions, the median one after "
        "half of that or more. So that factor falls only with what sessions share, e.g. figures of "
        'Compare and dry runs of Retrain; less CPU for each draw lowers the seconds. "Now and '
        f'then" is how people use it: each of the {arguments.sessions} sessions clicks at random '
        f"moments, every {arguments.pause:g} s on average; the aim is at most 3 times one redraw.",
        *(["", "In headless Chromium, from the start of the navigation:", ""] + painted)
        * bool(painted),
        "",
    ]
    if arguments.save:
        RESULT.write_text("\n".join(text))


if __name__ == "__main__":
    main()
