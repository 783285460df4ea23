"""Find a Chromium for the browser tests: one that is there, else apt where we are root.

Run by ``make setup``; where neither works it prints the command that would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
INSTALL = "apt-get update && apt-get install -y chromium"


def find() -> str | None:
    """Return the path of a browser: ``$DEPTHCUT_BROWSER``, one on the PATH, or an application."""
    given = os.environ.get("DEPTHCUT_BROWSER")
    candidates = [given] if given else [shutil.which(n) for n in NAMES] + list(APPLICATIONS)
    return next((str(c) for c in candidates if c and Path(c).exists()), None)


def install() -> None:
    """Install a browser where that is possible, else say how."""
    if find():
        return
    can = shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0
    if can:
        print("Installing Chromium for the browser tests ...", flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update"], check=False, **quiet)  # type: ignore[call-overload]
        subprocess.run(["apt-get", "install", "-y", "chromium"], check=False, **quiet)  # type: ignore[call-overload]
    if not find():
        print(f"No browser found; browser tests will be skipped. Install one: {INSTALL}")


if __name__ == "__main__":
    install() if "--install" in sys.argv else print(find() or f"none; try: {INSTALL}")
