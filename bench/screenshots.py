"""Screenshots of the running dashboard for the README: ``python -m bench.screenshots``.

Starts the dashboard on its own workspace, fills it from the command line with runs of the demo
checkpoint (takes some minutes) and with those of SmolLM2 that `bench.smollm2` has left in
``--proof``, and captures pages in a headless Chromium: ``--pages``, by default those in the README,
whose other pictures are `bench.walk`'s. Pages that show a real model are left out if there are no
such runs. ``--workspace`` keeps and reuses the runs; ``--out``, ``--dark`` and ``--width`` are for
inspecting pages; by default the images go to docs/img.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.dashboard import ROOT, borrow, chromium, fill, serve, settled, shorten, workspace

REAL, DEMO = "smollm2", "demo"
PAGES = {
    "home": (REAL, "", 900),
    "checkpoint": (REAL, "checkpoint", 900),
    "importance": (REAL, "importance", 1500),
    "prune": (REAL, "prune?drop=4,5,12,13,14,16,17,18", 900),
    "width": (REAL, "prune?prune_way=Width", 900),
    "retrain": (REAL, "retrain?run=lora-depth-ppl", 1500),
    "evaluate": (REAL, "evaluate", 1500),
    "compare": (REAL, "compare", 1700),
    "playground": (REAL, "playground", 900),
    "presentation": (REAL, "presentation", 900),
    "jobs": (REAL, "jobs", 700),
}
"""Name of the screenshot -> checkpoint, path of the page, and height of the window."""
README = ("presentation",)
"""Those that the README shows."""


def take(url: str, out: Path, dark: bool, width: int, models: dict[str, str]) -> None:
    """Capture pages at ``url``: ``models`` is name of the screenshot -> checkpoint."""
    with chromium(color_scheme="dark" if dark else "light") as context:
        page = context.new_page()
        page.set_default_timeout(180000)
        for name, model in models.items():
            _, path, height = PAGES[name]
            page.set_viewport_size({"width": width, "height": height})
            joint = "&" if "?" in path else "?"
            page.goto(f"{url}/{path}{joint}model={model}")
            page.get_by_text("Running jobs").first.wait_for(state="attached")
            settled(page)
            page.locator('[data-testid="stSkeleton"]').first.wait_for(state="detached")
            page.wait_for_timeout(2500)
            page.screenshot(path=str(out / f"{name}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument("--pages", nargs="*", choices=tuple(PAGES), default=list(README))
    parser.add_argument(
        "--workspace", default="", help="workspace to use and keep; filled if empty"
    )
    parser.add_argument("--proof", type=Path, default=ROOT / "workspace" / "proof-smollm2")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with workspace(arguments.workspace) as folder:
        if not folder.is_dir() or not any(folder.iterdir()):
            if any(PAGES[name][0] == DEMO for name in arguments.pages):
                fill(folder, full=True)
            if arguments.proof.is_dir():
                borrow(arguments.proof.resolve(), folder)
            shorten(folder)
        os.environ["DEPTHCUT_WORKSPACE"] = folder.name
        real = f"{folder.name}/{REAL}" if (folder / REAL / "config.json").is_file() else ""
        names = {DEMO: DEMO, REAL: real}
        models = {name: names[PAGES[name][0]] for name in arguments.pages}
        for name in [name for name, model in models.items() if not model]:
            print(f"{name}: left as it is, {arguments.proof} has no SmolLM2.")
            del models[name]
        with serve(folder.parent) as url:
            take(url, arguments.out, arguments.dark, arguments.width, models)


if __name__ == "__main__":
    main()
