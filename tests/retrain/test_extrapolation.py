"""The power law through recovered shares: known curves, their intervals, what cannot be fitted."""

from __future__ import annotations

import random

import numpy as np
import pytest

from core.charts import retrain as charts
from core.retrain import extrapolation


def law(tokens, exponent=0.4, scale=3000.0, floor=0.0):
    return (1 - floor) * (1 - (1 + tokens / scale) ** -exponent)


def test_a_curve_without_noise_is_found_again():
    points = [(0.0, 0.0), *((t, law(t)) for t in range(2000, 22_000, 2000))]
    found = extrapolation.fit(points)
    for tokens in (1000, 20_000, 200_000):
        best, low, high = found.at(tokens)
        assert best == pytest.approx(law(tokens), abs=0.03)
        assert low <= law(tokens) <= high
    wanted = 3000 * (0.2 ** (-1 / 0.4) - 1)
    best, fewest, most = found.needed(0.8)
    assert fewest <= wanted <= most
    assert fewest <= best <= most


def test_what_never_comes_back_is_found():
    points = [(float(t), law(t, 1.5, floor=0.3)) for t in range(2000, 42_000, 2000)]
    found = extrapolation.fit(points)
    assert found.floor == pytest.approx(0.3, abs=0.06)
    best, low, high = found.at(400_000)
    assert best == pytest.approx(law(400_000, 1.5, floor=0.3), abs=0.04)
    assert low <= best <= high
    told = extrapolation.in_words(found, 0.9, "KL")
    assert told.startswith("Estimate: more tokens of the same recover at most 7")


def test_the_interval_holds_the_truth_in_about_nine_of_ten_runs():
    chance = random.Random(5)
    held = 0
    for _ in range(40):
        points = [(t, law(t) + chance.gauss(0, 0.01)) for t in range(2000, 22_000, 2000)]
        _, low, high = extrapolation.fit(points).at(80_000)
        held += low <= law(80_000) <= high
    assert held >= 33


@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 0.0), (1.0, 0.1), (2.0, 0.2), (3.0, 0.3)],
        [(1.0, 0.0), (2.0, 0.01), (3.0, 0.02), (4.0, 0.03)],
        [(1.0, 0.5), (2.0, 0.9), (3.0, 1.0), (4.0, 1.01)],
        [],
    ],
    ids=["few", "nothing", "beyond", "empty"],
)
def test_what_cannot_be_extrapolated(points):
    assert extrapolation.fit(points) is None


def test_the_estimate_in_words():
    found = extrapolation.fit([(float(t), law(t)) for t in range(2000, 22_000, 2000)])
    assert extrapolation.in_words(found, 0.5, "KL") == ""  # there already
    told = extrapolation.in_words(found, 0.7, "KL")
    assert told.startswith("Estimate: to recover 70% by KL, about ")
    assert "tokens are needed (" in told
    slow = extrapolation.fit([(float(t), law(t, 0.03, 300)) for t in range(2000, 22_000, 2000)])
    told = extrapolation.in_words(slow, 0.9, "loss")
    assert told == "Estimate: to recover 90% by loss, more than 20 M tokens would be needed."
    open_end = np.array([[2.0, 3000.0, 0.3], [2.0, 3000.0, 0.0]])
    unsure = extrapolation.Fit(open_end[0], open_end, 20_000.0)
    told = extrapolation.in_words(unsure, 0.99, "loss")
    assert told == (
        "Estimate: to recover 99% by loss, at least 27 k tokens are needed, if any suffice."
    )


def test_the_chart_has_measured_points_and_the_estimate():
    points = {"KL": [(float(t), law(t)) for t in range(2000, 22_000, 2000)]}
    figure = charts.by_tokens(points, {"KL": extrapolation.fit(points["KL"])})
    measured, band, estimated = figure.data
    assert measured.name == "KL, measured"
    assert tuple(measured.y) == tuple(share for _, share in points["KL"])
    assert estimated.name == "KL, estimated"
    assert max(estimated.x) == 4 * 20_000
    assert band.fill == "toself"
