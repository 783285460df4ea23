"""kill -9 of the live model: the page reports it, and the next request restarts it."""

from __future__ import annotations

import os
import signal

import pytest

from core.__main__ import main
from core.runs.workspace import Workspace


def live_runs(server):
    return Workspace(server.workspace).runs("live")


def test_a_killed_live_model_is_said_and_started_by_the_next_question(
    visit, server, tiny_dir, tmp_path, monkeypatch
):
    for name in ("DEPTHCUT_WORKSPACE", "DEPTHCUT_LOCK_DIR"):
        monkeypatch.setenv(name, server.env[name])
    model = tiny_dir("tied", seed=9)
    before = {record.id for record in live_runs(server)}
    visitor = visit()
    page = visitor.page
    text = tmp_path / "held.txt"
    text.write_text("Ann sees the red ball in the garden.\n" * 60)
    visitor.open(f"/prune?model={model}&text={text}")
    page.get_by_role("button", name="Measure live").click()
    page.get_by_text("Measured live on held.txt").first.wait_for()
    table = page.get_by_test_id("stTable").filter(has_text="plan / dense")
    row = table.locator("tr").filter(has_text="all ").last

    def cell(column):
        names = table.locator("th").all_inner_texts()
        return row.locator("td, th").nth(names.index(column)).inner_text()

    row.wait_for()
    (first,) = (record for record in live_runs(server) if record.id not in before)

    os.kill(first.status["pid"], signal.SIGKILL)
    page.get_by_text("process exited (lost); it restarts with the next request").wait_for()
    card = page.get_by_test_id("stMetric").filter(has_text="Perplexity, measured")
    assert f"dense {float(cell('dense')):.4g}" in card.inner_text()  # what was measured stays
    visitor.check()

    pills = page.get_by_test_id("stButtonGroup").filter(has_text="01234")
    pills.get_by_role("button", name="2", exact=True).click()
    row.filter(has_text="±").wait_for()
    visitor.settle()
    shown = float(cell("plan"))
    assert page.get_by_text("process exited").count() == 0
    (second,) = (r for r in live_runs(server) if r.id not in before | {first.id})
    assert second.is_live
    assert second.status["pid"] != first.status["pid"]

    cut, out = server.workspace / "killed-cut", server.workspace / "killed-judged"
    assert main(["prune", str(model), "--drop", "2", "--out", str(cut)]) == 0
    assert main(["evaluate", str(cut), "--perplexity", str(text), "--out", str(out)]) == 0
    (row,) = (out / "perplexity.csv").read_text().splitlines()[1:]
    assert shown == pytest.approx(float(row.split(",")[-1]), rel=1e-4)
    page.get_by_role("button", name="Stop live", exact=True).click()
    page.get_by_role("button", name="Measure live").wait_for()
    visitor.check()
