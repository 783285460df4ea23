"""Screenshots of the running dashboard for the README: ``python -m bench.screenshots``.

Starts the dashboard on its own workspace, fills it from the command line with runs of the demo
checkpoint (takes some minutes), and captures each page in a headless Chromium. ``--workspace``
keeps and reuses the runs; ``--out``, ``--dark`` and ``--width`` are for inspecting pages; by
default the images go to docs/img.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.dashboard import ROOT, chromium, fill, serve, settled, workspace

PAGES = {
    "home": ("", 900),
    "checkpoint": ("checkpoint", 900),
    "importance": ("importance", 1500),
    "prune": ("prune?drop=4,6,8", 1500),
    "width": ("prune?prune_way=Width", 900),
    "retrain": ("retrain?run=restore/lora", 1500),
    "evaluate": ("evaluate", 1500),
    "compare": ("compare", 1700),
    "playground": ("playground", 900),
    "presentation": ("presentation", 900),
    "jobs": ("jobs", 700),
}
"""Name of the screenshot -> path of the page, and height of the window."""


def take(url: str, out: Path, dark: bool, width: int, names: list[str]) -> None:
    """Capture every page of ``names`` at ``url``."""
    with chromium(color_scheme="dark" if dark else "light") as context:
        page = context.new_page()
        for name in names:
            path, height = PAGES[name]
            page.set_viewport_size({"width": width, "height": height})
            joint = "&" if "?" in path else "?"
            page.goto(f"{url}/{path}{joint}model=demo")
            page.get_by_text("Running jobs").first.wait_for(timeout=60000, state="attached")
            settled(page)
            page.wait_for_timeout(2500)
            page.screenshot(path=str(out / f"{name}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--pages", nargs="*", choices=tuple(PAGES), default=list(PAGES))
    parser.add_argument(
        "--workspace", default="", help="workspace to use and keep; filled if empty"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with workspace(arguments.workspace) as folder:
        if not folder.is_dir() or not any(folder.iterdir()):
            fill(folder, full=True)
        with serve() as url:
            take(url, arguments.out, arguments.dark, arguments.width, arguments.pages)


if __name__ == "__main__":
    main()
