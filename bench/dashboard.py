"""A dashboard and a browser for benchmarks and screenshots: its own workspace, one server."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.runs.workspace import read_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "browser"))


_RECORDS = (".json", ".csv", ".txt", ".md")
_REAL = re.compile(r"/[\w./-]*/shared/real/")


def core(*arguments: str) -> None:
    """Run ``python -m core``; raises if it fails."""
    subprocess.run([sys.executable, "-m", "core", *arguments], cwd=ROOT, check=True)


def fill(folder: Path, *, full: bool = False) -> None:
    """Fill a workspace with runs of the demo: scores, a curve, a variant; ``full``: all kinds."""
    core("importance", "demo", "--out", f"{folder}/importance-demo")
    core("curve", "demo", "--scores", f"{folder}/importance-demo", "--out", f"{folder}/curve")
    core("prune", "demo", "--drop", "4,5,6", "--out", f"{folder}/demo-without-4-5-6")
    if full:
        core("recipe", "depth-vs-width", "demo", "--out", f"{folder}/depth-vs-width")
        core("recipe", "restore", "demo", "--out", f"{folder}/restore")
        checkpoints = ("demo", "depth-vs-width/depth-ppl", "restore/lora")
        for number, name in enumerate(checkpoints):
            tasks = ("--tasks", "demo", "--limit", "100", "--perplexity", "demo")
            core("evaluate", name, *tasks, "--out", f"{folder}/evaluate-{number}")


def borrow(proof: Path, folder: Path) -> None:
    """Put the finished runs of `bench.smollm2` into a workspace: records copied, weights linked.

    Their records then name ``folder`` instead of ``proof``.
    """
    for run in sorted(proof.iterdir()):
        if (read_json(run / ".run" / "status.json") or {}).get("state") != "done":
            continue
        for path in (run, *sorted(run.rglob("*"))):
            target = folder / path.relative_to(proof)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif path.suffix in _RECORDS and path.name != "tokenizer.json":
                text = path.read_text(encoding="utf-8").replace(str(proof), str(folder))
                target.write_text(text, encoding="utf-8")
            else:
                target.symlink_to(path)


def shorten(folder: Path) -> None:
    """Name no machine's folders in a workspace's records: not its own, not that of real inputs.

    Names then begin with the workspace's own: its parent must be the server's working directory.
    """
    for path in folder.rglob("*"):
        if path.suffix in _RECORDS and path.is_file() and not path.is_symlink():
            text = path.read_text(encoding="utf-8")
            short = _REAL.sub("../shared/real/", text.replace(str(folder), folder.name))
            if short != text:
                path.write_text(short, encoding="utf-8")


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def workspace(keep: str = "") -> Iterator[Path]:
    """Yield the workspace of processes started here: ``keep``, or a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep or f"{temporary}/workspace").absolute()
        os.environ["DEPTHCUT_WORKSPACE"] = str(folder)
        yield folder


@contextlib.contextmanager
def serve(cwd: Path = ROOT) -> Iterator[str]:
    """Start the dashboard on the current workspace and yield its URL."""
    process, url = start(cwd)
    try:
        answers(f"{url}/_stcore/health")
        yield url
    finally:
        process.terminate()
        process.wait()


def start(cwd: Path = ROOT, port: int | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """Start the dashboard's process; return it and its URL, which answers a little later."""
    port = port or free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "streamlit", "run", str(ROOT / "app.py")),
            *("--server.port", str(port), "--server.headless", "true"),
            *("--server.fileWatcherType", "none"),
        ],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
    )
    return process, f"http://127.0.0.1:{port}"


def answers(url: str) -> None:
    """Wait until an address answers."""
    for _ in range(240):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=1)
            return
        time.sleep(0.25)
    raise SystemExit("The dashboard did not start.")


@contextlib.contextmanager
def chromium(**options: Any) -> Iterator[Any]:
    """Yield a browser context; ``options`` are Playwright's, e.g. color_scheme and viewport."""
    import find_browser
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = play.chromium.launch(executable_path=find_browser.find(), args=arguments)
        yield browser.new_context(**options)
        browser.close()


def settled(page: Any) -> None:
    """Wait until none of the page's scripts is running."""
    app = '[data-testid="stApp"][data-test-script-state="notRunning"]'
    page.locator(app).wait_for(state="attached", timeout=180000)
    page.locator('[data-testid="stStatusWidget"]').wait_for(state="detached", timeout=180000)
