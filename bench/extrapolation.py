"""The extrapolation of a retraining, checked against how it went on.

``python -m bench.extrapolation RUN ... [--page FILE]`` takes finished retrainings, fits the power
law to the first half of each (in tokens) and compares what it says of the end with what was
measured there. Nothing is trained.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from core.retrain import extrapolation, history
from core.retrain.log import MetricLog
from core.retrain.results import Summary
from core.runs.workspace import BOOKKEEPING
from core.words import percent

PAGE = Path(__file__).parents[1] / "docs" / "results" / "extrapolation.md"
HEAD = (
    "| run | measure | fitted on | end | measured there | estimate | interval | inside |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
)


@dataclass(frozen=True)
class Check:
    """One measure of one run: what its first half said of the end, and what was measured there."""

    run: str
    measure: str
    fitted: float
    """Tokens of the last point that was fitted."""
    end: float
    measured: float
    estimate: float
    low: float
    high: float

    @property
    def is_inside(self) -> bool:
        """Whether the measured share is within the interval."""
        return self.low <= self.measured <= self.high

    def line(self) -> str:
        """Return a row of the table."""
        interval = f"{percent(self.low)} to {percent(self.high)}"
        return (
            f"| {self.run} | {self.measure} | {self.fitted:,.0f} tokens | {self.end:,.0f} | "
            f"{percent(self.measured)} | {percent(self.estimate)} | {interval} | "
            f"{'yes' if self.is_inside else 'no'} |"
        )


def checks(folder: Path) -> list[Check]:
    """Return a check for every measure of a run whose first half can be fitted."""
    log = MetricLog(folder / BOOKKEEPING / "metrics.jsonl")
    log.update()
    found = []
    for measure, points in history.by_tokens(log.steps, log.evaluations).items():
        if not points:
            continue
        end, measured = points[-1]
        first = [point for point in points if point[0] <= end / 2]
        if fit := extrapolation.fit(first):
            found.append(Check(name_of(folder), measure, first[-1][0], end, measured, *fit.at(end)))
    return found


def name_of(folder: Path) -> str:
    """Return what a run trained, in a few words."""
    summary = Summary.read(folder) or Summary()
    blocks = f"{(summary.parameters or 0) / 1e6:.3g} M parameters"
    return f"{folder.name}, {blocks}, {summary.steps or 0} steps"


def page(found: list[Check], runs: int) -> list[str]:
    """Return the page."""
    some = "1 run" if runs == 1 else f"{runs} runs"
    inside = sum(one.is_inside for one in found)
    return [
        "# How far the extrapolation of a retraining can be trusted",
        "",
        "`python -m bench.extrapolation RUN ...`: the power law fitted to the first half of a "
        "retraining's tokens, against what the same run measured at its end (held-out rows). The "
        "interval is the one that the Retrain page draws (90 %); as the learning rate falls to 0 "
        "towards the end of a run, the second half is not trained as the first.",
        "",
        f"{inside} of {len(found)} intervals, from {some}, hold what was measured."
        if found
        else "No run so far has enough evaluations in its first half.",
        "",
        *(HEAD if found else ()),
        *(one.line() for one in found),
        "",
        "An estimate above what was measured is too optimistic. The power law has a floor, a share "
        "of the gap that never comes back: a law without one put the end of the first run that was "
        "checked at 98 %, where 91 % was measured, outside its interval.",
    ]


def main() -> None:
    """Check the runs that are named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args()
    found = [one for folder in asked.runs for one in checks(folder)]
    text = "\n".join(page(found, len({one.run for one in found}))) + "\n"
    asked.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
