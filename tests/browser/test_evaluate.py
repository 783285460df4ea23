"""The Evaluate page of real evaluations: table, dots and heatmap show what the CSV files hold."""

from __future__ import annotations

import csv

import pytest

from core.__main__ import main

TASKS = ("demo_cause", "demo_compare")


def rows_of(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def judged(server, monkeypatch, tmp_path, tiny_dir):
    """A tiny model and what is left without block 2, both judged in the server's workspace."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", server.env["DEPTHCUT_WORKSPACE"])
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", server.env["DEPTHCUT_LOCK_DIR"])
    dense, pruned = tiny_dir("mha", seed=5), server.workspace / "evaluated-pruned"
    found = {"dense": dense, "pruned": pruned}
    assert main(["prune", str(dense), "--drop", "2", "--out", str(pruned)]) == 0
    for name, folder in found.items():
        out = server.workspace / f"evaluated-{name}-judged"
        argv = ["evaluate", folder, "--perplexity", "demo", "--window", "64", "--limit", "10"]
        argv += ["--tasks", ",".join(TASKS), "--device", "cpu", "--out", out]
        assert main([str(a) for a in argv] + ["--each-block"] * (name == "dense")) == 0
        found[name] = out
    return dense, found


def traces(visitor, has):
    """Return the traces of the first drawn chart with a trace that ``has`` says yes to."""
    for number in range(visitor.page.locator(".js-plotly-plot").count()):
        data = visitor.chart(number)["data"]
        if any(has(trace) for trace in data):
            return data
    raise AssertionError("no such chart")


def test_table_dots_and_heatmap_show_what_was_measured(visit, server, judged, tmp_path):
    dense, runs = judged
    visitor = visit()
    page = visitor.page
    visitor.open(f"/evaluate?model={dense}")
    page.get_by_role("heading", name="What each block is for").wait_for()
    page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for(state="attached")
    visitor.settle()

    measured = {name: rows_of(out / "tasks.csv") for name, out in runs.items()}
    dots = [t for t in traces(visitor, lambda t: t.get("error_x")) if t.get("error_x")]
    assert len(dots) == 2
    for dot, rows in zip(dots, measured.values(), strict=True):
        assert dot["x"] == pytest.approx([float(row["value"]) for row in rows])
        assert dot["error_x"]["array"] == pytest.approx([float(row["stderr"]) for row in rows])

    (heat,) = traces(visitor, lambda t: t["type"] == "heatmap")
    costs = [row for row in rows_of(runs["dense"] / "skills.csv") if int(row["block"]) >= 0]
    for line, task in zip(heat["z"], TASKS, strict=True):
        wanted = {int(row["block"]): float(row["delta"]) for row in costs if row["task"] == task}
        assert dict(zip(heat["x"], line, strict=True)) == pytest.approx(wanted)
    # What the heatmap says of block 2 is what the really pruned model lost.
    for line, before, after in zip(heat["z"], *measured.values(), strict=True):
        assert line[2] == pytest.approx(float(after["value"]) - float(before["value"]))

    page.get_by_test_id("stDataFrame").first.scroll_into_view_if_needed()
    page.locator('[role="gridcell"]').first.wait_for(state="attached")
    cells = page.locator('[role="gridcell"]').all_text_contents()
    for out in runs.values():
        (text,) = rows_of(out / "perplexity.csv")
        assert any(cell.startswith(f"{float(text['ppl']):.3f}") for cell in cells), cells

    with page.expect_download() as download:
        page.get_by_role("button", name="skills.csv").click()
    path = tmp_path / "skills.csv"
    download.value.save_as(path)
    assert rows_of(path) == rows_of(runs["dense"] / "skills.csv")
    visitor.check()
