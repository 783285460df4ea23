"""Registers the commands of `slow_commands` in processes that tests start.

Python imports this by itself at its start where this folder is on PYTHONPATH, so that detached
runs of real processes know the test-only commands. With DEPTHCUT_TEST_RECIPES, recipes in the
folder ``recipes`` stand for those of the same name.
"""

import os
from pathlib import Path

import slow_commands

slow_commands.register()
if os.environ.get("DEPTHCUT_TEST_RECIPES"):
    from core import recipes

    recipes.__path__.insert(0, str(Path(__file__).parent / "recipes"))
