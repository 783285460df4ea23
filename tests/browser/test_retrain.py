"""LoRA on the pruned demo with clicks alone: points arrive, reload, cancel, resume, recovery."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time

from core.runs.workspace import json_lines, read_run


def wait_until(true, seconds=60, what="it"):
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, what
        time.sleep(0.2)


def steps_written(run):
    """The steps in the run's metrics, in their order."""
    lines = json_lines(run / ".run" / "metrics.jsonl")
    return [line["step"] for line in lines if "event" not in line]


@contextlib.contextmanager
def held(run, steps):
    """Let the run write ``steps`` steps, then hold its process while the body looks."""
    deadline = time.time() + 90
    while len(steps_written(run)) < steps:
        assert time.time() < deadline, f"no step {steps}"
        time.sleep(0.03)
    pid = read_run(run).status["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def steps_drawn(page):
    """How many steps the first chart's raw curve has."""
    return page.evaluate(
        """() => {
            const chart = document.querySelector(".js-plotly-plot");
            return chart && chart.data && chart.data[0].x ? chart.data[0].x.length : 0;
        }"""
    )


def fill(visitor, label, value):
    visitor.page.locator(f'input[aria-label="{label}"]').first.fill(value)
    visitor.page.keyboard.press("Tab")
    visitor.settle()


def test_lora_on_the_pruned_demo(visit, server, tmp_path):
    # Without its first block there is much to recover, whichever demo is bundled.
    server.command("prune", "demo", "--drop", "0", "--out", str(server.workspace / "cut-demo"))
    stories = [row["text"] for row in stories_of(400)]
    data = tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps({"text": story[:160]}) + "\n" for story in stories))
    visitor = visit()
    page = visitor.page
    visitor.open("/retrain?model=cut-demo")
    fill(visitor, "Data", str(data))
    fill(visitor, "Steps", "60")
    page.get_by_text("All options").click()
    fill(visitor, "Cutoff (tokens)", "48")
    fill(visitor, "Holdout", "12")
    fill(visitor, "Batch", "4")
    fill(visitor, "Eval every", "15")
    page.get_by_text("Underlined: tokens the loss is computed on.").wait_for()
    page.get_by_role("button", name="Start retraining").click()
    wait_until(lambda: list(server.workspace.glob("retrain-*")), what="no run")
    (run,) = server.workspace.glob("retrain-*")

    # Points arrive by themselves. The run is held while they are looked at, so that neither a
    # fast machine ends it nor a slow one makes this test wait.
    with held(run, steps=2):
        wait_until(lambda: steps_drawn(page) >= 2, what="no points")
        first = steps_drawn(page)
    with held(run, steps=first + 1):
        wait_until(lambda: steps_drawn(page) > first, what="no more points")
        # A reload shows the same run by its address.
        assert f"run={run.name}" in page.url
        page.reload()
        page.get_by_role("button", name="Cancel").click()
        wait_until((run / ".run" / "cancel").exists, what="not asked to stop")
    wait_until(lambda: read_run(run).state == "cancelled", what="not cancelled")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    done = json.loads((run / "summary.json").read_text())["steps"]
    assert 0 < done < 60

    page.get_by_role("button", name="Resume").click()
    wait_until(lambda: read_run(run).state == "done", 120, what="not done")
    page.get_by_text("of the gap was recovered").wait_for()
    visitor.settle()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 60
    assert summary["recovered"] > 0
    assert f"{summary['recovered']:.0%} of the gap was recovered" in page.inner_text("body")
    lines = json_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "event" not in line] == list(range(1, 61))
    wait_until(lambda: steps_drawn(page) == 60, what="not all points")
    visitor.check()


def stories_of(count):
    from core.data import sources

    return sources.rows_of("demo", "train")[:count]
