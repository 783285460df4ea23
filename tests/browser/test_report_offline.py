"""A report is opened from its file, without a network: every chart in it is drawn."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "report"))
from test_report import lab

from core.__main__ import main
from core.criteria import METRICS

study = lab
"""A study with retraining curves, quality and benchmarks; its files are made, not computed."""

DRAWN = """chart => {
    const box = chart.getBoundingClientRect();
    const marks = chart.querySelectorAll(".cartesianlayer path, .cartesianlayer image").length;
    const traces = (chart._fullData || []).filter(trace => trace.visible === true).length;
    return {name: chart.getAttribute("aria-label"), width: box.width, height: box.height,
            marks, traces, given: chart.data.length};
}"""


def open_offline(chromium, path):
    """Open a file in a browser without a network; return its charts as drawn, and what went wrong.

    Whatever is asked for beside the file itself counts as wrong.
    """
    context = chromium.browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        wrong = []
        page.on("request", lambda asked: wrong.append(asked.url))
        page.on("pageerror", lambda error: wrong.append(f"exception: {error}"))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.goto(path.as_uri(), timeout=60_000)
        assert wrong.pop(0) == path.as_uri()
        charts = page.locator(".js-plotly-plot")
        charts.first.wait_for()
        page.wait_for_timeout(500)  # what asks for something late
        return [charts.nth(n).evaluate(DRAWN) for n in range(charts.count())], wrong
    finally:
        context.close()


@pytest.fixture
def scores(tmp_path, monkeypatch, tiny_gqa, tmp_path_factory):
    """The tiny model scored by everything there is; the checkpoint."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "scored"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    argv = ["importance", tiny_gqa, "--samples", "4", "--length", "24", "--device", "cpu"]
    argv += ["--metrics", ",".join(METRICS), "--out", tmp_path / "scored" / "run"]
    assert main([str(a) for a in argv]) == 0
    return tiny_gqa


@pytest.mark.parametrize("what", ["study", "scores"])
def test_every_chart_is_drawn_from_the_file_alone(chromium, request, tmp_path, what):
    made = request.getfixturevalue(what)
    path = tmp_path / "report.html"
    assert main(["report", str(made if what == "scores" else made[1]), "--out", str(path)]) == 0
    found = re.findall(r'<div class="plot" role="img" aria-label="([^"]*)"', path.read_text())
    names = [html.unescape(name) for name in found]
    charts, wrong = open_offline(chromium, path)
    assert wrong == []
    assert [chart["name"] for chart in charts] == names
    assert len(names) >= 6
    for chart in charts:
        assert chart["width"] > 300, chart
        assert chart["height"] > 100, chart
        assert chart["marks"] > 0, chart
        assert chart["traces"] > 0, chart
