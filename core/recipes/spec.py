"""The options of the recipe command; every recipe takes what it needs of them."""

from __future__ import annotations

from dataclasses import dataclass

from core import recipes
from core.runs.spec import DeviceOptions, option


@dataclass(frozen=True, kw_only=True)
class RecipeSpec(DeviceOptions):
    """Carry out a named chain of runs and judge the result."""

    name: str = option(
        positional=True, help=f"One of: {', '.join(recipes.NAMES)}.", choices=recipes.NAMES
    )
    checkpoint: str = option("demo", positional=True, help="Folder, run, Hub id, or demo.")
    out: str = option(help="Folder of the recipe; every step gets a folder in it.")
    ratio: float | None = option(
        None, help="Share of all parameters to remove; each recipe has its own.", low=0, high=1
    )
    data: str = option(
        "",
        help="Text to choose, train and judge by, where the recipe does: a SOURCE, of which rows "
        "are held out to judge by, or two with a comma between.",
    )
    steps: int | None = option(None, help="Training steps, where the recipe trains.", low=1)
    same_layers: bool = option(
        False,
        help="Of depth-vs-width: width methods cut only in the blocks that depth may drop. "
        "Otherwise each cuts where its paper does (FLAP and Wanda-sp in all).",
    )
    tasks: tuple[str, ...] = option(
        (),
        help="Of paper-table: tasks of lm-eval, with commas, or presets. Default: the paper's "
        "seven; the demo's own questions for the demo.",
    )
    task_dir: str = option("", help="Of paper-table: folder of your own tasks, as for evaluate.")
    limit: int | None = option(
        None, help="Of paper-table: questions of each task. Default: all; 40 for the demo.", low=1
    )
    seed: int | None = option(None, help="Seed of every step; none keeps each command's own.")
