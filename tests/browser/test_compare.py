"""Compare in a browser: a recipe's verdict, its figures, a clicked point, and a budget's choice."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "compare"))
import study_helpers as made

from core import checkpoint, workspace

POINTS = {"dense": (10.0, 4000.0, 2.0), "deep": (6.0, 3000.0, 2.3), "wide": (9.5, 3200.0, 2.2)}
"""ms a token, MiB, perplexity."""


@pytest.fixture
def study(server, tmp_path, monkeypatch):
    """A dense checkpoint with a depth and a width variant, measured; in the server's workspace."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(server.workspace))
    root, dense = server.workspace, made.checkpoint(tmp_path / "dense")
    total = checkpoint.inspect(dense).parameters
    made.pruned(root, "deep", dense, [1, 4], 1, total, criterion="ppl",
                plan={"protect_first": 1})  # fmt: skip
    wide = made.checkpoint(made.run(root, "wide", "width", 2, checkpoint=dense, method="flap"))
    size = {"method": "flap", "parameters_after": total - 15000}
    workspace.write_json(wide / "pruning.json", size)
    paths = {"dense": str(dense), "deep": str(root / "deep"), "wide": str(wide)}
    rows = []
    for place, (name, path) in enumerate(paths.items()):
        pace, mib, ppl = POINTS[name]
        judged = made.run(root, f"judged-{name}", "evaluate", 3 + place, checkpoint=path)
        columns = ("source", "window", "bos", "tokens", "ppl")
        workspace.write_csv(judged / "perplexity.csv", columns, [("demo", 128, "once", 9, ppl)])
        rows.append({
            "variant": name, "batch_size": 1, "input_tokens": 12, "output_tokens": 8,
            "latency_s_mean": pace / 100, "latency_s_p50": pace / 100, "per_token_s": pace / 1000,
            "first_token_s": 0.01, "tokens_per_s": 800 / pace, "peak_memory_mib": mib,
            "oom": False, "runs": 20,
        })  # fmt: skip
    made.benchmark(root, "bench", 9, paths, rows)
    recipe = root / "dvw"
    asked = {"name": "depth-vs-width", "checkpoint": str(dense)}
    workspace.write_json(recipe / ".run/spec.json", {"command": "recipe", "spec": asked})
    workspace.write_json(recipe / ".run/status.json", {"state": "done", "created": 10})
    found = {"verdict": "Depth is faster than width.", "findings": ["Depth: 1.67 x dense."]}
    workspace.write_json(recipe / "summary.json", found)
    return dense


TITLED = """title => [...document.querySelectorAll(".js-plotly-plot")].find(
    chart => chart.layout && chart.layout.yaxis && chart.layout.yaxis.title
        && chart.layout.yaxis.title.text === title)"""


def drawn(visitor, title):
    """Return what the chart with this y axis shows: candidate -> y values; waits for the chart."""
    visitor.page.wait_for_function(f"title => Boolean(({TITLED})(title))", arg=title)
    data = visitor.page.evaluate(
        f"title => JSON.parse(JSON.stringify(({TITLED})(title).data))", title
    )
    lines = [t for t in data if t.get("mode") == "lines+markers"]
    return {t["customdata"][0][0]: numbers(t["y"]) for t in lines}


def numbers(values):
    """Return values as plotly keeps them: a list, or what it made of a typed array."""
    return list(values.values()) if isinstance(values, dict) else values


def click_point(visitor, label):
    """Click the marker of the candidate ``label`` on the Pareto chart, the page's second."""
    chart = visitor.page.locator(".js-plotly-plot").nth(1)
    chart.scroll_into_view_if_needed()
    visitor.page.wait_for_function(
        """label => {
            const chart = document.querySelectorAll(".js-plotly-plot")[1];
            const drawn = chart && chart._fullLayout && chart._fullLayout.xaxis;
            return drawn && chart.data.some(t => t.customdata && t.customdata[0][1] === label);
        }""",
        arg=label,
    )
    place = chart.evaluate(
        """(chart, label) => {
            const trace = chart.data.find(t => t.customdata && t.customdata[0][1] === label);
            const layout = chart._fullLayout, box = chart.getBoundingClientRect();
            const x = layout.xaxis, y = layout.yaxis;
            return [box.left + x._offset + x.c2p(x.d2c(trace.x[0])),
                    box.top + y._offset + y.c2p(y.d2c(trace.y[0]))];
        }""",
        label,
    )
    visitor.page.mouse.click(*place)
    visitor.settle()


def test_a_clicked_point_shows_its_plan_and_a_budget_picks_another(visit, server, study):
    visitor = visit()
    page = visitor.page
    visitor.open(f"/compare?model={study}")
    page.get_by_text("Click a point to see its plan.").wait_for()
    visitor.settle()
    page.get_by_text("Depth is faster than width.").wait_for()
    with (server.workspace / "bench" / "points.csv").open() as handle:
        rows = {row["variant"]: row for row in csv.DictReader(handle)}
    for title, column in (("latency (s)", "latency_s_p50"), ("tokens/s", "tokens_per_s")):
        lines = {key.rsplit("/", 1)[-1]: y for key, y in drawn(visitor, title).items()}
        assert lines == {name: [pytest.approx(float(r[column]))] for name, r in rows.items()}
    label = next(t["customdata"][0][1] for t in visitor.chart(1)["data"]
                 if t.get("customdata") and t["customdata"][0][0] == "deep")  # fmt: skip
    click_point(visitor, label)
    page.get_by_role("heading", name=label).wait_for()
    assert "point=deep" in page.url
    strip = visitor.chart(2)["data"][0]
    assert [b for b, _, kind in strip["customdata"] if kind == "dropped"] == [1, 4]

    assert page.get_by_text("dense: nothing removed").count() == 1
    limit = page.get_by_label("At most, ms a token")
    limit.fill("9.6")
    limit.press("Enter")
    page.get_by_text("FLAP 21%: 20.5% of the parameters removed").wait_for()
    limit.fill("7")
    limit.press("Enter")
    page.get_by_text("the lowest perplexity of 1 that keep to the budget").wait_for()
    assert page.get_by_text(f"{label}: 21.2% of the parameters removed").count() >= 1
    visitor.settle()
    assert "ms=7" in page.url

    page.reload()
    page.get_by_role("heading", name=label).wait_for()
    page.get_by_text("the lowest perplexity of 1 that keep to the budget").wait_for()
    page.get_by_role("button", name="Make it the active checkpoint").click()
    page.get_by_text("Active checkpoint").first.wait_for()
    visitor.settle()
    assert "model=deep" in page.url
    visitor.check()
