"""The shipping path in a real browser: ``python -m bench.walk [demo|smollm2] [--save]``.

Opens a checkpoint, scores its blocks, chooses a cut of about 20 %, makes and measures it with LoRA
beside a width variant of the same size (FLAP), compares, downloads the report and exports a GGUF
file, as a user would with mouse and keyboard. Counts clicks and typed fields, times every step
(most of it is the machine's work), and keeps a screenshot of each. With ``--save`` the table goes
to docs/results/walk_NAME.md, and those pictures of smollm2 that show no folder of the machine to
docs/img/walk, for the README. ``--rehearsal`` trains for a few steps and asks few questions, to see
that the path is open; it saves nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.dashboard import ROOT, chromium, serve, settled, workspace
from core.runs.workspace import RunRecord, Workspace

WAIT_S = 4 * 3600.0
"""For a run; a failed one ends the walk at once."""
REAL = ROOT.parent / "shared" / "real"
"""Instructions to train on, and tasks with their questions, of SmolLM2's study."""
ASKED = ("arc_easy", "piqa")
"""Tasks that are chosen for SmolLM2."""
QUESTIONS = {False: "200", True: "5"}
"""Of each task; in a rehearsal."""
STEPS = "4"
"""Of training in a rehearsal; the page's own number otherwise."""
OPEN = {"demo": "Load the demo", "smollm2": "SmolLM2-135M"}
IMAGES = ROOT / "docs" / "img" / "walk"
KEPT = ("03.png", "04.png", "06.png")
"""Importance, Prune and Compare: pictures of SmolLM2 without folders of the machine."""
MOST_CLICKS, MOST_TYPED = 15, 3


@dataclass
class Step:
    """One row of the table."""

    name: str
    clicks: int = 0
    typed: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Of these, for runs."""


@dataclass
class Walk:
    """A user in front of the dashboard: what was clicked, typed and waited for."""

    page: Any
    where: Workspace
    pictures: Path
    steps: list[Step] = field(default_factory=list)
    visited: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step, and take a picture at its end."""
        self.steps.append(Step(name))
        began = time.monotonic()
        yield
        self.settle()
        self.now.seconds = time.monotonic() - began
        number = len(self.steps)
        self.page.screenshot(path=str(self.pictures / f"{number:02d}.png"))
        print(f"{number:2d} {name}: {self.now.seconds:.0f} s", flush=True)

    @property
    def now(self) -> Step:
        """The step under way."""
        return self.steps[-1]

    def settle(self) -> None:
        """Wait until the page has been drawn and nothing is wrong with it."""
        self.page.wait_for_timeout(300)
        settled(self.page)
        broken = self.page.get_by_test_id("stException")
        if broken.count():
            raise SystemExit(f"A page broke: {broken.first.inner_text()}")

    def click(self, target: Any) -> None:
        """Click something once it is there and enabled."""
        target.scroll_into_view_if_needed()
        target.click()
        self.now.clicks += 1
        self.settle()

    def button(self, name: str, number: int = 0, *, exact: bool = True) -> None:
        """Click a button by its label."""
        self.click(self.page.get_by_role("button", name=name, exact=exact).nth(number))

    def link(self, name: str) -> None:
        """Click a link of the page's body."""
        self.click(self.page.get_by_test_id("stMain").get_by_role("link", name=name).first)
        self.arrived()

    def turn_to(self, name: str) -> None:
        """Go to a page by the sidebar."""
        side = self.page.get_by_test_id("stSidebar")
        self.click(side.get_by_role("link", name=name, exact=True))
        self.page.get_by_role("heading", name=name, exact=True).first.wait_for()
        self.arrived()

    def arrived(self) -> None:
        """Note the page that is shown now."""
        self.settle()
        self.visited.append(self.page.url.split("?")[0].rsplit("/", 1)[-1] or "home")

    def tick(self, label: str) -> None:
        """Tick a checkbox."""
        self.click(self.page.get_by_test_id("stCheckbox").filter(has_text=label).first)

    def several(self, label: str, options: Sequence[str]) -> None:
        """Pick options of a list: one click opens it, one more chooses each."""
        self.click(self.page.get_by_role("combobox", name=label).first)
        for option in options:
            self.click(self.page.get_by_role("option", name=option, exact=True).first)
        self.page.keyboard.press("Escape")
        self.settle()

    def type(self, label: str, text: str) -> None:
        """Type into a field."""
        at = self.page.get_by_label(label, exact=True).first
        at.scroll_into_view_if_needed()
        at.fill(text)
        at.press("Enter")
        self.now.typed += 1
        self.settle()

    def wait(self, command: str, more_than: int = 0) -> RunRecord:
        """Wait for the newest run of a command; a failure ends the walk."""
        began = time.monotonic()
        while time.monotonic() - began < WAIT_S:
            found = [r for r in self.where.runs(command) if not r.parent]
            if len(found) > more_than and not found[0].is_live:
                if found[0].state != "done":
                    raise SystemExit(f"{found[0].id} {found[0].state}: {found[0].error}")
                self.now.waited += time.monotonic() - began
                self.page.wait_for_timeout(1500)  # the page notices within a second
                self.settle()
                return found[0]
            time.sleep(0.5)
        raise SystemExit(f"No {command} run has finished within {WAIT_S:.0f} s.")


def walk(user: Walk, name: str, real: Path, rehearsal: bool) -> None:
    """Go the whole way."""
    page = user.page
    with user.step("Open the checkpoint"):
        user.button(OPEN[name], exact=False)
        page.get_by_text("Active checkpoint").nth(1).wait_for(timeout=WAIT_S * 1000)
        user.settle()
    with user.step("Set up the study"):
        if name == "smollm2":
            user.type("Training data", str(real / "text" / "alpaca_999.jsonl"))
            user.type("Folder of custom tasks", str(real / "tasks"))
            user.several("Tasks", ASKED)
            user.type("Questions per task", QUESTIONS[rehearsal])
            user.tick("Allow these tasks to run Python code")
        else:
            user.button("Use these settings")
    with user.step("Score the blocks"):
        user.link("Score the blocks")
        user.button("Score the blocks")
        user.wait("importance")
    with user.step("Choose a cut of about 20 %"):
        user.link("Next: choose blocks to drop")
        user.click(page.get_by_role("button", name=re.compile(r"^\d+ blocks: ")).last)
    with user.step("Make and measure it, with LoRA and beside FLAP"):
        if rehearsal:
            user.type("Training steps", STEPS)
        user.button("Make it and measure it")
        user.wait("recipe")
    with user.step("Compare"):
        user.link("Next: compare")
        page.get_by_text(re.compile(r"the best of 3 variants")).first.wait_for()  # FLAP is one
    with user.step("The report"):
        with page.expect_download() as download:
            user.button("Report")
        download.value.save_as(user.pictures / "report.html")
    with user.step("Export a GGUF file"):
        user.click(page.get_by_test_id("stMain").get_by_text("Export", exact=True).first)
        user.button("Export", -1)
        user.wait("export")


def lines_of(user: Walk, name: str) -> list[str]:
    """Return the page of results."""
    clicks = sum(step.clicks for step in user.steps)
    typed = sum(step.typed for step in user.steps)
    seconds = sum(step.seconds for step in user.steps)
    waited = sum(step.waited for step in user.steps)
    twice = sorted({one for one in user.visited if user.visited.count(one) > 1})
    lines = [
        f"# From a checkpoint to a smaller one in the browser: {name}",
        "",
        f"`python -m bench.walk {name} --save`: headless Chromium, {os.cpu_count()} cores, no GPU. "
        f"{clicks} clicks and {typed} typed fields (aims: at most {MOST_CLICKS} and {MOST_TYPED}); "
        f"{seconds / 60:.1f} minutes, of which {waited / 60:.1f} were spent waiting for runs. "
        f"Pages in order: {', '.join(user.visited)}; visited twice: {', '.join(twice) or 'none'}.",
        "",
        "| step | clicks | typed | seconds | of these, waiting for runs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {s.name} | {s.clicks} | {s.typed} | {s.seconds:.0f} | {s.waited:.0f} |"
        for s in user.steps
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", choices=tuple(OPEN), default="demo")
    parser.add_argument("--workspace", default="", help="workspace to use and keep")
    parser.add_argument("--pictures", type=Path, default=Path("/tmp/depthcut-walk"))
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--real", type=Path, default=REAL, help="folder of text/ and tasks/")
    parser.add_argument("--rehearsal", action="store_true", help="few steps, few questions")
    asked = parser.parse_args()
    if asked.save and asked.rehearsal:
        parser.error("a rehearsal saves nothing")
    asked.pictures.mkdir(parents=True, exist_ok=True)
    with workspace(asked.workspace) as folder, serve() as url:
        size = {"width": 1440, "height": 900}
        with chromium(viewport=size, accept_downloads=True) as context:
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.goto(url)
            page.get_by_test_id("stMain").wait_for()
            user = Walk(page, Workspace(folder), asked.pictures)
            user.arrived()
            try:
                walk(user, asked.checkpoint, asked.real.absolute(), asked.rehearsal)
            except Exception:
                page.screenshot(path=str(asked.pictures / "broken.png"), full_page=True)
                raise
    text = "\n".join(lines_of(user, asked.checkpoint)) + "\n"
    print(text)
    if asked.save:
        (ROOT / "docs" / "results" / f"walk_{asked.checkpoint}.md").write_text(text)
        if asked.checkpoint == "smollm2":
            IMAGES.mkdir(parents=True, exist_ok=True)
            for picture in KEPT:
                shutil.copy(asked.pictures / picture, IMAGES)


if __name__ == "__main__":
    main()
