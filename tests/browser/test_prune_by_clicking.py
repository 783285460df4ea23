"""From a checkpoint to a pruned one with clicks alone, and the result in stock transformers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.runs.workspace import Workspace

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=True)
print(json.dumps({"blocks": len(model.model.layers), "new": out.shape[1] - ids.shape[1],
                  "text": tokenizer.decode(out[0], skip_special_tokens=True)}))
"""


def wait_for_run(server, command, known=(), seconds=90):
    """Wait until a run of ``command`` that is not in ``known`` is done; return its folder."""
    deadline, new = time.time() + seconds, []
    while time.time() < deadline:
        runs = Workspace(server.workspace).runs(command)
        new = [run for run in runs if run.path not in known]
        assert len(new) < 2, new
        if new and not new[0].is_live:
            assert new[0].state == "done", new[0].log_tail()
            return new[0].path
        time.sleep(0.2)
    raise AssertionError(f"{command} is not done after {seconds} s: {new}")


def click_bar(visitor, block):
    """Click the bar of a block in the first chart, and wait until it is redrawn as toggled."""
    wanted = sorted(set(dropped(visitor)) ^ {block})
    # The drawn bar reaches below the axis, so the click goes just above the plot's lower edge.
    area = visitor.page.locator(".js-plotly-plot").first.locator(".nsewdrag").first
    area.scroll_into_view_if_needed()
    bar = visitor.page.locator(".plotly .barlayer .trace").first.locator(".point path").nth(block)
    inside, box = area.bounding_box(), bar.bounding_box()
    visitor.page.mouse.click(box["x"] + box["width"] / 2, inside["y"] + inside["height"] - 6)
    visitor.page.wait_for_function(
        """wanted => {
            const chart = document.querySelector(".js-plotly-plot");
            const bars = chart && chart.data ? chart.data[0].customdata : [];
            const found = bars.filter(b => b[1] === "dropped").map(b => b[0]);
            return JSON.stringify(found) === JSON.stringify(wanted);
        }""",
        arg=wanted,
    )
    visitor.settle()


def dropped(visitor):
    """Return the blocks that the pad's bars show as dropped."""
    bars = visitor.chart()["data"][0]
    return [b for b, kind in bars["customdata"] if kind == "dropped"]


def walk(visit, server, folder, calibration, drop):
    """Load, score, choose by clicking, create; return the importance and the variant's folder."""
    before = {run.path for run in Workspace(server.workspace).runs()}
    visitor = visit()
    page = visitor.page
    visitor.open("/")
    another = page.get_by_text("Another checkpoint")
    if another.count():
        another.click()
    page.locator('input[aria-label="Folder or Hub id"]').fill(str(folder))
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_text("Next step").wait_for()
    visitor.settle()

    visitor.turn_to("Importance")
    if not page.locator('input[aria-label="Calibration"]').is_visible():
        page.get_by_text("New run").click()  # closed where an earlier test scored these weights
    for label, value in (("Calibration", calibration), ("Samples", "3"), ("Length (tokens)", "48")):
        page.locator(f'input[aria-label="{label}"]').fill(value)
        page.keyboard.press("Tab")
        visitor.settle()
    page.get_by_role("button", name="Score the blocks").click()
    scores = wait_for_run(server, "importance", before)
    # The page hears of the end two seconds later; until then it shows an earlier test's scores.
    page.wait_for_url(lambda url: f"run={scores.name}" in url)
    page.get_by_role("heading", name="Perplexity without each block").wait_for()
    visitor.settle()
    with (scores / "blocks.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert visitor.chart()["data"][0]["y"] == pytest.approx([float(r["ppl"]) for r in rows])

    visitor.turn_to("Prune")
    page.get_by_role("heading", name="Create the variant").wait_for()
    visitor.settle()
    assert visitor.chart()["data"][0]["y"] == pytest.approx([float(r["ppl"]) for r in rows])
    assert dropped(visitor) == []
    for block in (*drop, 0):
        click_bar(visitor, block)
    assert dropped(visitor) == sorted((*drop, 0))
    click_bar(visitor, 0)
    assert dropped(visitor) == sorted(drop)
    click_bar(visitor, 0)
    click_bar(visitor, 0)
    assert dropped(visitor) == sorted(drop)
    assert f"drop={'%2C'.join(map(str, drop))}" in page.url

    page.get_by_role("button", name="Create the variant").click()
    variant = wait_for_run(server, "prune", before)
    page.get_by_text("AutoModelForCausalLM.from_pretrained").first.wait_for()
    visitor.settle()
    assert str(variant) in page.get_by_test_id("stMain").inner_text()

    visitor.turn_to("Jobs")  # settings are used again, and survive a refresh
    page.locator(f'a[href*="again={scores.name}"]').click()
    page.get_by_role("button", name="Score the blocks").wait_for()
    page.reload()
    visitor.settle()
    assert page.locator('input[aria-label="Samples"]').input_value() == "3"
    return rows, variant


def continues(folder):
    """Load a checkpoint in stock transformers, in a process of its own, and let it write."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def small_model(tiny_gqa):
    """A trained model and a real text; if they are not on this machine, a tiny model."""
    real = ROOT.parent / "shared" / "real"
    if (real / "stories260k").is_dir():
        return real / "stories260k", str(real / "wikitext2_test.txt")
    return tiny_gqa, "demo"


def test_from_a_typed_folder_to_a_story(visit, server, small_model):
    folder, calibration = small_model
    rows, variant = walk(visit, server, folder, calibration, (3, 1))
    assert len(rows) == 5
    said = json.loads((variant / "pruning.json").read_text())
    assert said["dropped"] == [3, 1]
    assert said["kept"] == [0, 2, 4]
    story = continues(variant)
    assert story["blocks"] == 3
    assert story["new"] == 12
    assert story["text"].startswith("Once upon a time")
    if calibration != "demo":  # trained: its first block is worth most
        assert max(rows, key=lambda r: float(r["ppl"]))["block"] == "0"
