"""Seconds from a click on the Prune page to its live figures: ``python -m bench.live_page NAME``.

Runs a real dashboard and a headless Chromium on this machine, starts the live model, and presses
blocks one after another, each time after the figures of the plan before have come. ``first`` is
the first live perplexity of the new plan on the page; ``last`` is the last change of any figure or
of the written text. The processor seconds of the live process and of the dashboard tell how much of
that was work, and how much waiting for a busy machine. Memory is the live process's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from bench import report
from bench.dashboard import chromium, core, serve, settled, workspace
from core.live import client
from core.runs.workspace import Workspace

WATCH = """block => new Promise(done => {
    const text = e => e ? e.innerText : "";
    const card = () => text([...document.querySelectorAll("[data-testid=stMetric]")]
        .find(e => e.innerText.startsWith("Perplexity")));
    const all = () => card() + text(document.querySelector(".st-key-words"))
        + [...document.querySelectorAll("[data-testid=stCaptionContainer]")].map(text)
            .filter(t => t.startsWith("Measured live")).join();
    const before = card(), pills = [...document.querySelectorAll(
        "[data-testid=stButtonGroup] button")];
    let now = all(), first = null, last = 0, tokens = "";
    const began = performance.now();
    pills.find(p => p.innerText.trim() === String(block)).click();
    const look = () => {
        const at = (performance.now() - began) / 1000;
        if (all() !== now) { now = all(); last = at; }
        if (first === null && card() !== before && card().startsWith("Perplexity, measured")
            && /Measured live/.test(now)) {
            first = at; tokens = now.match(/[\\d,]+(?= of [\\d,]+ tokens)|all [\\d,]+/)[0];
        }
        if (first !== null && at - last > 4 || at > 120) {
            const rest = now.match(/[\\d,]+(?= of [\\d,]+ tokens)|all [\\d,]+/);
            done([first, last, tokens, rest ? rest[0] : ""]);
        } else setTimeout(look, 15);
    };
    look();
})"""


def spent(pid: int) -> float:
    """Return the processor seconds of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def clicks(url: str, name: str, blocks: list[int], scores: str) -> list[dict[str, Any]]:
    """Press the blocks one after another; return a row for each."""
    rows = []
    with chromium(viewport={"width": 1440, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(300000)
        page.goto(f"{url}/prune?model={name}&run={scores}")
        page.get_by_role("button", name="Measure live").click()
        page.get_by_text("Measured live").first.wait_for()
        page.wait_for_timeout(15000)
        settled(page)
        record = client.running(Workspace())
        assert record is not None
        pid = int(record.status["pid"])
        for block in blocks:
            began = spent(pid)
            first, last, few, more = page.evaluate(WATCH, block)
            used = spent(pid) - began
            status = client.status(record)
            rows.append(
                {
                    "block": block, "first": first, "first_tokens": few, "last": last,
                    "last_tokens": more, "cpu": used,
                    "memory": status.process_mib if status else float("nan"),
                    "load": os.getloadavg()[0],
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
        client.stop(record)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--blocks", default="12,17,4,26,9,20,14,5")
    parser.add_argument("--workspace", default="")
    parser.add_argument("--scores", default="importance")
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args()
    blocks = [int(b) for b in asked.blocks.split(",")]
    with workspace(asked.workspace) as folder:
        if not (folder / asked.scores).is_dir():
            core(
                "importance", asked.checkpoint, "--metrics", "ppl", "--out", f"{folder}/importance"
            )
        with serve() as url:
            rows = clicks(url, asked.checkpoint, blocks, asked.scores)
    lines = [
        f"`python -m bench.live_page`, {Path(asked.checkpoint).name}, {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d')}; each block is removed in addition to those above it. "
        "Load: the machine's average over the last minute, of which this accounts for 2 at most.",
        "",
        "| block | first s | tokens | last s | tokens | processor s | process MiB | load |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['block']} | {r['first']:.2f} | {r['first_tokens']} | {r['last']:.2f} | "
            f"{r['last_tokens']} | {r['cpu']:.2f} | {r['memory']:,.0f} | {r['load']:.1f} |"
            for r in rows
        ),
        "",
        *(
            f"{what}: median {statistics.median(r[what] for r in rows):.2f} s, worst "
            f"{max(r[what] for r in rows):.2f} s."
            for what in ("first", "last", "cpu")
        ),
    ]
    report("\n".join(lines) + "\n", asked.save)


if __name__ == "__main__":
    main()
