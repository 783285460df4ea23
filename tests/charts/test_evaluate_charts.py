"""Charts of evaluations show their tables' numbers, and mark what may be chance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from core.charts import evaluate as charts
from core.evaluate import suites
from core.evaluate.by_content import Cell, Evaluated, Measure, means
from core.evaluate.compare import Delta
from core.evaluate.results import BlockCost
from core.study import Variant

ROWS = [
    BlockCost(-1, "demo_cause", "acc", 0.9, 0.03, 0.0, None),
    BlockCost(0, "demo_cause", "acc", 0.4, 0.05, -0.5, 0.06),
    BlockCost(1, "demo_cause", "acc", 0.86, 0.03, -0.04, 0.03),
    BlockCost(-1, "sciq", "acc", 0.5, 0.05, 0.0, None),
    BlockCost(0, "sciq", "acc", 0.4, 0.05, -0.1, None),
    BlockCost(1, "sciq", "acc", 0.6, 0.05, 0.1, 0.02),
]


def test_heatmap_cells_are_the_changes_and_unsure_ones_are_dotted():
    (heat,) = charts.skill_heatmap(ROWS).data
    assert [list(line) for line in heat.z] == [[-0.5, -0.04], [-0.1, 0.1]]
    assert [list(line) for line in heat.text] == [["", "·"], ["·", ""]]
    assert list(heat.y) == ["cause (acc)", "sciq (acc)"]
    assert (heat.zmin, heat.zmax) == (-0.5, 0.5)


def judged(label, kind, value, delta=None):
    run = SimpleNamespace(id="r", device="cpu")
    cells = {
        Measure("task", task, "acc", "c", "float32"): Cell(
            value + i / 100, 0.1, 20, run, delta=delta
        )
        for i, task in enumerate(suites.DEMO)
    }
    return Evaluated(Variant(label, label, kind, folder=None), cells)


def test_dots_are_the_cells_and_no_two_checkpoints_look_alike():
    shown = [judged("dense", "dense", 0.5), judged("a", "depth", 0.4), judged("b", "depth", 0.3)]
    tasks = list(shown[0].cells)
    figure = charts.task_dots(shown, tasks, {"demo_cause": 0.25})
    for trace, one in zip(figure.data, shown, strict=False):
        assert list(trace.x) == [one.cells[m].value for m in tasks]
        assert list(trace.error_x.array) == [0.1] * len(tasks)
    looks = {(t.marker.color, t.marker.symbol) for t in figure.data[:3]}
    assert len(looks) == 3
    (guess,) = figure.data[3:]
    assert list(guess.x) == [0.25, 0.25]


def test_the_mean_of_a_preset_has_the_error_of_its_paired_differences():
    one = judged("a", "depth", 0.4, Delta(-0.1, 0.08, 20))
    ((name, value, delta),) = means(one, list(one.cells))
    assert name == "AVE demo"
    assert value == pytest.approx(0.4 + 0.28 / 8)
    assert delta.value == pytest.approx(-0.1)
    assert delta.stderr == pytest.approx(0.08 / 8**0.5)
    assert means(one, list(one.cells)[1:]) == []


def test_the_grid_shows_ratio_and_perplexity():
    cells = [
        {"calibration": c, "evaluated": e, "ratio": r, "ppl": 10 * r}
        for c, e, r in (("A", "A", 1.1), ("A", "B", 1.4), ("B", "A", 1.2), ("B", "B", 1.3))
    ]
    (heat,) = charts.calibration_grid(cells).data
    assert [list(line) for line in heat.z] == [[1.1, 1.4], [1.2, 1.3]]
    assert heat.text[0][1] == "1.400 x<br>14"
