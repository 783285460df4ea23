"""Recipes: resumable chains of ordinary runs with one progress view and a final verdict.

A recipe is a module ``core/recipes/NAME.py`` (hyphens in the name become underscores) with a
constant ``RECIPE = Recipe(...)``; its name is listed in ``NAMES``. `core.recipes.chain` defines the
types and describes the parts of a recipe.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from core.errors import OptionError

if TYPE_CHECKING:
    from core.recipes.chain import Recipe

NAMES: tuple[str, ...] = (
    "importance",
    "make",
    "best",
    "drop-one",
    "restore",
    "depth-vs-width",
    "paper-table",
    "ablation",
    "stability",
    "domain",
    "cpt-lora",
    "sweep",
    "calibration",
)
"""Recipe names in the order in which pages offer them."""


def get(name: str) -> Recipe:
    """Return a recipe by name; raises `OptionError` with the known names."""
    if name not in NAMES:
        raise OptionError(f"Unknown recipe '{name}'.", f"Recipes: {', '.join(NAMES)}.")
    recipe: Recipe = importlib.import_module(f"core.recipes.{name.replace('-', '_')}").RECIPE
    return recipe
