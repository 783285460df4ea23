"""Budgets: what solved plans are predicted to take, and what they take.

    python -m bench.budget demo smollm2 --save
    python -m bench.budget DIR DIR --save
    python -m bench.budget demo --clock cpu --save

A checkpoint is measured first (``python -m core budget``, with its usual options); the folder of a
finished budget run is read. Every run has timed and measured its own plans for ten latency budgets,
whole, in turn with the dense model: see `core.budget.checks`. The table has each plan's latency
relative to the dense model's, predicted and measured, and its KL; solving is timed here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from core.__main__ import main as command_line
from core.benchmark.generate import Clock
from core.checkpoint.locate import plain_name
from core.prune import budgets
from core.prune.budgets import Limits
from core.prune.plan import default_protection
from core.prune.version_results import OUTPUT_TOKENS, ROUGH, PlanCheck, latency_errors

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "budget.md"
HEAD = [
    "| latency budget | blocks dropped | other versions | predicted | measured | error "
    "| predicted KL | measured KL |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]


def solving_ms(library: budgets.Library) -> float:
    """Return the median milliseconds of a solution, over 19 latency budgets."""
    protect, times = default_protection(library.blocks), []
    low = budgets.least(library, "latency", protect=protect)
    for number in range(1, 20):
        limits = Limits(latency=1 - (1 - low) * number / 19.5)
        began = time.perf_counter()
        budgets.solve(library, limits, protect=protect)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def section(folder: Path) -> list[str]:
    """Return the lines on one budget run."""
    library, rows = budgets.load(folder), PlanCheck.read(folder)
    found, errors = library.summary, latency_errors(rows)
    lines = [
        f"## {plain_name(found.checkpoint)}",
        "",
        f"{found.blocks} blocks; versions: {', '.join(found.measured)}. {found.device}, "
        f"{found.timed_dtype}, batch {found.batch}, {found.context} tokens of prompt and "
        f"{OUTPUT_TOKENS} after it, median of {found.runs} timings in turns. KL on "
        f"{found.calibration}, {found.samples} x {found.length} tokens: {found.seconds:.0f} s for "
        f"{len(library.rows) - found.blocks} versions, {found.passes} block passes instead of "
        f"{found.plain_passes}; timing took {found.timing_seconds:.0f} s. One solution takes "
        f"{solving_ms(library):.0f} ms.",
        "",
    ]
    if not errors:
        return [*lines, "No plans were checked."]
    middle = statistics.median(errors)
    lines += [
        f"**Latency relative to dense: median error {middle:.1%}, largest {max(errors):.1%}"
        + (f" (rough: above {ROUGH:.0%})" if middle > ROUGH else "")
        + "**",
        "",
        *HEAD,
    ]
    for row in rows:
        choice = row.choice.split()
        others = {v: choice.count(v) for v in found.measured if v != "drop" and v in choice}
        dense = row.seconds(OUTPUT_TOKENS, "dense_")
        share = row.seconds(OUTPUT_TOKENS) / dense
        lines.append(
            f"| {row.latency:.3f} | {choice.count('drop')} "
            f"| {', '.join(f'{n} {v}' for v, n in others.items()) or 'none'} "
            f"| {row.predicted_share:.3f} | {share:.3f} | {row.predicted_share / share - 1:+.1%} "
            f"| {row.predicted_kl:.4f} | {row.kl:.4f} |"
        )
    return lines


def main() -> None:
    """Measure or read the runs, and print or save the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="checkpoints, or folders of budget runs")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: this process's own CPU seconds, of one thread, for a machine that others use",
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
        Clock.now = staticmethod(time.process_time)
    lines = [
        "# Budgets: predicted and measured",
        "",
        "Predicted latency adds up blocks that were timed as one version each; predicted KL adds "
        "up blocks that were changed alone. Each plan was then timed and measured whole. Made by "
        f"`python -m bench.budget{' --clock cpu' if arguments.clock == 'cpu' else ''}`.",
    ]
    if arguments.clock == "cpu":
        lines += [
            "",
            "Times of plans are CPU seconds of one thread on a machine that others use at the same "
            "time: ratios, not speeds. What measuring took includes waiting for those others.",
        ]
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(arguments.names):
            folder = Path(name)
            if not budgets.is_run(folder):
                folder = Path(scratch) / str(number)
                if command_line(["budget", name, "--out", str(folder)]):
                    raise SystemExit(f"{name} could not be measured.")
            lines += ["", *section(folder)]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
