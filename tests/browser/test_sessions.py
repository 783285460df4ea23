"""Addresses, sessions, restarts, fast clicks and the keyboard, in a real browser."""

from __future__ import annotations

import os
import signal
import time

import pytest

from core.runs.workspace import Workspace, read_run
from core.ui.frame import PAGES

PILLS = '[data-testid="stButtonGroup"]'


def pill(visitor, block):
    """Return the pill of a block."""
    return blocks_of(visitor).get_by_text(str(block), exact=True)


def blocks_of(visitor):
    """Return the pills of whole blocks; those of their parts are in a closed expander."""
    groups = visitor.page.get_by_test_id("stMain").locator(PILLS)
    return groups.filter(has_text="Blocks that plan")


def wait_for_address(visitor, drop):
    """Wait until the address names the blocks ``drop``."""
    text = "%2C".join(map(str, drop))
    visitor.page.wait_for_url(lambda url: f"drop={text}" in url.replace(",", "%2C"))
    visitor.settle()


def see(visitor, text):
    """Wait until the page says ``text``."""
    found = visitor.page.get_by_test_id("stMain").get_by_text(text)
    found.locator("visible=true").first.wait_for()  # commands also stand in closed expanders


def runs_of(server, command):
    return [record.path for record in Workspace(server.workspace).runs(command)]


def state_of(run):
    return read_run(run).state


def wait_until(true, seconds=90):
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, "it did not come"
        time.sleep(0.1)


def test_a_cold_deep_link_keeps_its_query_and_the_frame(visit, server, tiny_gqa):
    server.stop()
    server.start()
    visitor = visit()
    visitor.open(f"/prune?drop=3,1&b=2&model={tiny_gqa}")
    visitor.page.get_by_role("heading", name="Create the variant").wait_for()
    visitor.settle()
    links = visitor.page.get_by_test_id("stSidebar").get_by_role("link")
    names = [label for _, label, _ in PAGES.values()]
    links.nth(len(names) - 1).wait_for()
    assert names == [text.split("\n")[-1] for text in links.all_inner_texts()[: len(names)]]
    wait_for_address(visitor, (3, 1))
    see(visitor, "--drop 3,1")
    strip = visitor.chart(-1)["data"]
    found = {bar["name"]: [c[0] for c in bar["customdata"] if c[2] == "dropped"] for bar in strip}
    assert found == {"A": [1, 3], "B": [2]}


def test_two_sessions_do_not_disturb_each_other(visit, tiny_gqa):
    one, two = visit(), visit()
    one.open(f"/prune?drop=1&model={tiny_gqa}")
    two.open(f"/prune?drop=2&model={tiny_gqa}")
    pill(one, 3).click()
    wait_for_address(one, (1, 3))
    pill(two, 0).click()
    wait_for_address(two, (2, 0))
    one.page.get_by_text("Copy A to B").click()
    one.settle()
    see(one, "--drop 1,3")
    see(two, "--drop 2,0")


def test_blocks_are_chosen_by_keyboard(visit, tiny_gqa):
    visitor = visit()
    visitor.open(f"/prune?model={tiny_gqa}")
    pill(visitor, 2).wait_for()
    pill(visitor, 2).locator("xpath=ancestor::button").focus()
    visitor.page.keyboard.press("Space")
    wait_for_address(visitor, (2,))
    see(visitor, "--drop 2")
    for key, chosen in (("ArrowRight", (2, 3)), ("ArrowLeft", (3,))):  # the focus stays there
        visitor.page.keyboard.press(key)
        visitor.page.keyboard.press("Space")
        wait_for_address(visitor, chosen)


def test_a_selection_survives_other_pages(visit, tiny_gqa):
    visitor = visit()
    visitor.open(f"/prune?drop=3&model={tiny_gqa}")
    pill(visitor, 1).click()
    wait_for_address(visitor, (3, 1))
    for name in ("Jobs", "Prune"):
        visitor.turn_to(name)
    wait_for_address(visitor, (3, 1))


def test_two_fast_clicks_start_one_run(visit, server, tiny_gqa):
    before = runs_of(server, "prune")
    visitor = visit()
    visitor.open(f"/prune?drop=1,2&model={tiny_gqa}")
    visitor.page.get_by_role("button", name="Create the variant").dblclick()
    visitor.page.get_by_text("AutoModelForCausalLM.from_pretrained").first.wait_for()
    visitor.settle()
    new = [run for run in runs_of(server, "prune") if run not in before]
    assert len(new) == 1
    assert state_of(new[0]) == "done"


def test_a_run_outlives_the_dashboard(visit, server, tiny_dir):
    folder = tiny_dir("gqa", num_hidden_layers=12)
    before = runs_of(server, "importance")
    visitor = visit()
    visitor.open(f"/importance?model={folder}")
    visitor.page.locator('input[aria-label="Samples"]').fill("64")
    visitor.page.keyboard.press("Tab")
    visitor.settle()
    visitor.page.get_by_role("button", name="Score the blocks").click()
    wait_until(lambda: len(runs_of(server, "importance")) > len(before))
    (run,) = [r for r in runs_of(server, "importance") if r not in before]
    wait_until(lambda: read_run(run).status.get("pid"))
    pid = read_run(run).status["pid"]
    os.kill(pid, signal.SIGSTOP)  # held, so that it does not end before the dashboard has
    visitor.close()  # a browser that is left open complains of the dashboard's end in many ways
    server.stop()
    try:
        assert state_of(run) in ("queued", "running")
    finally:
        os.kill(pid, signal.SIGCONT)
        server.start()
    wait_until(lambda: state_of(run) == "done")
    again = visit()
    again.open(f"/jobs?run={run.name}")
    card = again.page.get_by_test_id("stMain")
    card.get_by_text(run.name).first.wait_for()
    assert "done" in card.inner_text()
    again.open(f"/importance?model={folder}&run={run.name}")
    again.page.get_by_role("heading", name="Perplexity without each block").wait_for()


@pytest.mark.parametrize("blocks", [2, 126])
def test_no_page_complains_from_2_to_126_blocks(visit, server, tiny_dir, blocks):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    folder = tiny_dir("gqa", num_hidden_layers=blocks, **size)
    out = server.workspace / f"scores-{blocks}"
    server.command(
        *("importance", str(folder), "--out", str(out)),
        *("--samples", "1", "--length", "8", "--device", "cpu"),
    )
    visitor = visit()
    visitor.open(f"/prune?model={folder}&drop=1")
    for page, heading in (
        ("Prune", "Create the variant"),
        ("Checkpoint", "Where the parameters are"),
        ("Importance", "All scores"),
        ("Jobs", "Jobs"),
    ):
        visitor.turn_to(page)
        visitor.page.get_by_role("heading", name=heading).wait_for()
        visitor.settle()
        visitor.check()
        assert visitor.page.get_by_test_id("stAlertContentError").count() == 0
