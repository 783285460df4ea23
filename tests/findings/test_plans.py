"""The finding of a plan that takes many attentions: provoked, silent, and as it was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from core.checkpoint.drop import Removal
from core.findings import of_plan
from core.prune import cautions

REPORT = Path(__file__).parents[2] / cautions.SOURCE


def test_many_attentions_are_said_with_what_was_measured_of_such_plans():
    found = of_plan(Removal((14,), tuple(range(4, 13))), 30, "c4.jsonl")
    assert found.key == "attention-lost"
    assert found.sentence.startswith("9 of 30 blocks lose their attention alone, which can cost")
    assert "with SmolLM2-135M" in found.sentence
    assert "on WikiText-2, but 0.8 to 1.0 times on C4 and BoolQ passages." in found.sentence
    assert found.evidence["chosen on"] == "c4.jsonl"
    assert found.evidence["measured in"] == "docs/results/choosing.md"
    assert found.try_next.startswith("Measure the perplexity on a text like the model's use")


@pytest.mark.parametrize(
    "removal",
    [
        Removal(tuple(range(4, 20))),  # whole blocks
        Removal((14,), (5, 6, 7)),
        Removal((), (), tuple(range(4, 20))),
        Removal(),
    ],
)
def test_other_cuts_are_silent(removal):
    assert of_plan(removal, 30) is None


def test_the_figures_are_those_of_the_report():
    """Perplexity of the plain budget plan over that of greedy's whole blocks, at every count."""
    section = REPORT.read_text().partition("## SmolLM2-135M")[2].partition("\n## ")[0]
    texts = ("WikiText-2, 128", "WikiText-2, 2048", "C4, 128", "BoolQ passages, 128")
    ratios: dict[str, list[float]] = {}
    taken = []
    for part in re.split(r"^### ", section, flags=re.M):
        rows = {cells[1]: cells for line in part.splitlines() if len(cells := _cells(line)) > 6}
        plan, whole = rows.get("budget, same latency"), rows.get("greedy, KL")
        if "chosen by" not in rows or plan is None or whole is None:
            continue
        assert "-" not in (*plan[5:], *whole[5:])
        taken.append(_blocks(plan[2].partition("attention of ")[2]))
        at = [rows["chosen by"].index(name) for name in texts]
        for name, column in zip(texts, at, strict=True):
            ratio = float(plan[column].split()[0]) / float(whole[column].split()[0])
            ratios.setdefault(name.partition(",")[0], []).append(ratio)
    assert len(taken) == 3
    assert (min(taken), max(taken)) == cautions.TAKEN
    assert min(taken) / 30 >= cautions.FROM
    for name, (low, high) in (cautions.OTHER | cautions.ALIKE).items():
        assert (round(min(ratios[name]), 1), round(max(ratios[name]), 1)) == (low, high), name


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")] if line.startswith("|") else []


def _blocks(text: str) -> int:
    spans = re.findall(r"(\d+)(?: to (\d+))?", text)
    return sum(int(last or first) - int(first) + 1 for first, last in spans)
