"""Live perplexity while blocks are toggled, and two columns of the playground side by side."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
prompt, *folders = sys.argv[1:]
texts = []
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
    texts.append(tokenizer.decode(out[0][ids.shape[1]:], skip_special_tokens=True))
print(json.dumps(texts))
"""


def written(prompt, *folders):
    """What stock transformers continues the prompt with, greedily, from each folder."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, prompt, *map(str, folders)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def pruned(server, tiny_gqa):
    """The tiny model really without blocks 1 and 3, its perplexity, and its own text."""
    folder = server.workspace / "live-pruned"
    server.command("prune", str(tiny_gqa), "--drop", "1,3", "--out", str(folder))
    out = server.workspace / "live-judged"
    server.command("evaluate", str(folder), "--perplexity", "demo", "--out", str(out))
    summary = json.loads((out / "summary.json").read_text())
    return folder, summary["perplexity"][0]["ppl"]


def test_toggled_blocks_become_what_the_command_line_gives(visit, server, tiny_gqa, pruned):
    folder, wanted = pruned
    visitor = visit()
    page = visitor.page
    visitor.open(f"/prune?model={tiny_gqa}&text=demo")
    visitor.settle()
    page.get_by_role("button", name="Measure live").click()
    page.get_by_role("button", name="Stop live", exact=True).wait_for()
    pills = page.get_by_test_id("stButtonGroup").filter(has_text="01234")
    for block in ("1", "3"):
        pills.get_by_role("button", name=block, exact=True).click()
        visitor.settle()
    page.get_by_text("Measured live on demo (held out), all ").wait_for()
    table = page.get_by_test_id("stTable").filter(has_text="plan / dense")
    row = table.locator("tr").filter(has_text="all ").last
    row.wait_for()
    names = table.locator("th").all_inner_texts()
    plan = row.locator("td, th").nth(names.index("plan")).inner_text()
    assert float(plan) == pytest.approx(wanted, rel=1e-4)
    card = page.get_by_test_id("stMetric").filter(has_text="Perplexity, measured")
    assert f"{wanted:.4g}, dense" in card.inner_text()
    visitor.check()

    prompt = "Ann sees the red ball"
    address = f"/playground?model={tiny_gqa}&columns=dense|skip:1,3&max_tokens=12&temperature=0.0"
    visitor.open(f"{address}&prompt={prompt}")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Measured on").first.wait_for()  # shown twice while the page changes
    page.get_by_role("button", name="Stop", exact=True).wait_for(state="detached")
    visitor.settle()
    texts = page.locator(".pg-text")
    assert texts.count() == 2
    for place, text in enumerate(written(prompt, tiny_gqa, folder)):
        assert texts.nth(place).inner_text().replace("▌", "") == prompt + text
    figures = page.get_by_test_id("stTable").inner_text()
    assert figures.count("tokens/s") == 2
    page.get_by_role("button", name="Unload").click()
    page.get_by_text("The live model starts with the first generation").wait_for()
