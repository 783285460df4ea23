"""Pictures of the running dashboard for the README: ``python -m bench.screenshots``.

Starts the dashboard on a workspace of its own, scores the demo checkpoint and prunes it from the
command line, and takes each page in a headless Chromium. ``--out`` and ``--dark`` for looking at
it; the default writes docs/img.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "browser"))
PAGES = {
    "home": ("", 760),
    "checkpoint": ("checkpoint", 900),
    "importance": ("importance", 1500),
    "prune": ("prune?drop=5,8,11", 1500),
    "jobs": ("jobs", 700),
}


def core(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "core", *arguments], cwd=ROOT, check=True)


def wait_for(url: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.25)
    raise SystemExit("The dashboard did not start.")


def take(url: str, out: Path, dark: bool, width: int) -> None:
    import find_browser
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=find_browser.find(), args=["--no-sandbox", "--disable-gpu"]
        )
        scheme = "dark" if dark else "light"
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        for name, (path, height) in PAGES.items():
            page.set_viewport_size({"width": width, "height": height})
            joint = "&" if "?" in path else "?"
            page.goto(f"{url}/{path}{joint}model=demo")
            page.get_by_text("Running jobs").first.wait_for(timeout=60000)
            page.wait_for_function(
                "!document.querySelector('[data-testid=stStatusWidget]')", timeout=60000
            )
            time.sleep(2)
            page.screenshot(path=str(out / f"{name}.png"))
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--port", type=int, default=8799)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DEPTHCUT_WORKSPACE"] = folder
        core("importance", "demo", "--out", f"{folder}/importance-demo")
        core("curve", "demo", "--scores", f"{folder}/importance-demo", "--out", f"{folder}/curve")
        core("prune", "demo", "--drop", "5,8", "--out", f"{folder}/demo-without-5-8")
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "streamlit", "run", "app.py"),
                *("--server.port", str(arguments.port), "--server.headless", "true"),
            ],
            cwd=ROOT,
        )
        try:
            url = f"http://127.0.0.1:{arguments.port}"
            wait_for(url)
            take(url, arguments.out, arguments.dark, arguments.width)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
