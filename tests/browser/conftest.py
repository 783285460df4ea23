"""A real dashboard and a real Chromium: fixtures of the browser tests.

One server a session, with a workspace and device locks of its own. Without a browser these tests
are skipped and the summary says so; with ``CI=true`` they fail.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import find_browser

from core.__main__ import main
from core.runs import jobs
from core.runs.workspace import Workspace

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
STILL = """
    addEventListener("DOMContentLoaded", () => {
        const style = document.createElement("style");
        style.textContent =
            "*, ::before, ::after {animation: none !important; transition: none !important}";
        document.head.append(style);
    });
"""
"""Nothing on a page moves: drawing each frame of a spinner takes half a core without a GPU."""
TIMEOUT_MS = 60_000
MISSING = "No browser was found: the dashboard was NOT tested in a browser. Run: make setup"


def pytest_collection_modifyitems(items):
    """Mark every test of this folder ``browser``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


def pytest_terminal_summary(terminalreporter):
    """Say loudly that browser tests were skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    if any(MISSING in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(MISSING, red=True, bold=True)


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A dashboard process with its own workspace."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "workspace"
        self.workspace.mkdir()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.env = {
            **os.environ,
            "DEPTHCUT_WORKSPACE": str(self.workspace),
            "DEPTHCUT_LOCK_DIR": str(folder / "locks"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent / "brief"),
        }
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the dashboard and wait until it answers."""
        flags = {
            "server.port": self.port,
            "server.headless": "true",
            "server.fileWatcherType": "none",
            "browser.gatherUsageStats": "false",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streamlit", "run", "app.py"]
                + [f"--{name}={value}" for name, value in flags.items()],
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.time() + 60
        while time.time() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=2).read()
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        pytest.fail(f"The dashboard did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End the dashboard as Ctrl-C would, by force where it lingers."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def command(self, *arguments: str) -> None:
        """Run a command of ``python -m core`` in this server's workspace, in this process."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("DEPTHCUT_WORKSPACE", "DEPTHCUT_LOCK_DIR"):
                patch.setenv(name, self.env[name])
            assert main(list(arguments)) == 0


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, in which every page is a session of its own."""
    path = find_browser.find()
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        # One context: what one visitor's browser has fetched and compiled, the next one's need not.
        # Neither the dashboard nor Streamlit keeps anything of a session in it.
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.add_init_script(STILL)
        yield context
        browser.close()


@pytest.fixture(scope="session")
def server(chromium, tmp_path_factory):
    """The dashboard all browser tests share; ``chromium`` first, so that no browser skips early."""
    server = Server(tmp_path_factory.mktemp("dashboard"))
    server.start()
    yield server
    server.stop()
    for record in Workspace(server.workspace).runs():
        if record.is_live:  # a live model that a failed test left behind
            jobs.LocalLauncher().kill(record)


class Visitor:
    """One browser session: a page, and what its console complained about."""

    def __init__(self, context, url: str) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.url = url
        self.closed = False
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("console", self._console)

    def _console(self, message) -> None:
        # Streamlit looks for its own addresses below a page's first, which the browser reports;
        # so it does a stopped server, and a test that stops one knows that.
        expected = "/_stcore/" in (message.location or {}).get("url", "")
        if message.type == "error" and not expected and "ERR_CONNECTION" not in message.text:
            self.complaints.append(f"console: {message.text} {message.location}")

    def open(self, path: str = "/") -> None:
        """Open a page of the dashboard and wait until it has been drawn."""
        self.page.goto(self.url + path)
        self.page.get_by_test_id("stMain").wait_for()
        self.settle()

    def turn_to(self, name: str) -> None:
        """Go to another page by its link in the sidebar, and wait until it has been drawn."""
        self.page.get_by_test_id("stSidebar").get_by_role("link", name=name, exact=True).click()
        self.page.get_by_role("heading", name=name, exact=True).wait_for()
        self.settle()

    def settle(self) -> None:
        """Wait until no script runs and nothing is stale."""
        # A moment for the browser to send what was just done and the script to begin.
        self.page.wait_for_timeout(150)
        app = '[data-testid="stApp"][data-test-script-state="notRunning"]'
        self.page.locator(app).wait_for(state="attached")
        self.page.locator('[data-testid="stStatusWidget"]').wait_for(state="detached")

    def check(self) -> None:
        """Assert that nothing went wrong so far: no exception shown, no complaint logged."""
        assert self.page.get_by_test_id("stException").count() == 0, self.page.locator(
            '[data-testid="stException"]'
        ).first.inner_text()
        assert not self.complaints, "\n".join(self.complaints)

    def chart(self, number: int = 0) -> dict:
        """Return data and layout of the page's n-th Plotly chart, as the browser drew it."""
        return (
            self.page.locator(".js-plotly-plot")
            .nth(number)
            .evaluate("e => JSON.parse(JSON.stringify({data: e.data, layout: e.layout}))")
        )

    def tell(self) -> None:
        """Print what the page shows; pytest passes it on where the test failed."""
        with contextlib.suppress(Exception):
            text = self.page.get_by_test_id("stMain").inner_text(timeout=2000)
            print(f"{self.page.url}\n{text}")

    def close(self) -> None:
        """Check this session a last time and close it."""
        if not self.closed:
            self.closed = True
            try:
                self.check()
            finally:
                self.page.close()


@pytest.fixture
def visit(chromium, server):
    """A function that opens browser sessions; all of them must end without a complaint."""
    visitors = []

    def new() -> Visitor:
        visitors.append(Visitor(chromium, server.url))
        return visitors[-1]

    yield new
    for visitor in visitors:
        visitor.tell()
        visitor.close()
