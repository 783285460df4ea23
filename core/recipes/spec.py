"""Options of the recipe command; every recipe uses those that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from core import recipes
from core.data.calibration import JOIN_HELP, JOINS
from core.heal import seams
from core.retrain.spec import METHODS
from core.runs.spec import DeviceOptions, option
from core.width.methods import NAMES as WIDTH_METHODS


@dataclass(frozen=True, kw_only=True)
class RecipeSpec(DeviceOptions):
    """Carry out a named chain of runs and report a verdict."""

    name: str = option(
        positional=True, help=f"One of: {', '.join(recipes.NAMES)}.", choices=recipes.NAMES
    )
    checkpoint: str = option("demo", positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    out: str = option(help="Folder of the recipe; every step gets a subfolder.")
    drop: tuple[int, ...] = option(
        (), help="make: blocks to drop, e.g. 3,5 or 4-8. Without them, --ratio chooses."
    )
    attention: tuple[int, ...] = option((), help="make: blocks that lose their attention.")
    mlp: tuple[int, ...] = option((), help="make: blocks that lose their MLP.")
    mlp_width: tuple[str, ...] = option(
        (), help="make: blocks whose MLP keeps some of its neurons, as block:neurons."
    )
    neurons: str | None = option(None, help="make: budget run that ranked the neurons.")
    criterion: str | None = option(
        None, help="make: criterion behind --drop, for the record; with --ratio, ppl."
    )
    heal: str = option(
        "none", choices=seams.CHOICES, help="make: closed-form repair of the seams, as in prune."
    )
    calibration: str = option("auto", help="make: text to heal on, and to score with --ratio.")
    retrain: str = option(
        "none", choices=("none", *METHODS), help="make: retrain the variant with this method."
    )
    width: str = option(
        "none",
        choices=("none", *WIDTH_METHODS),
        help="make: also make a width variant of the same size with this method, and evaluate and "
        "time it in the same run.",
    )
    ratio: float | None = option(
        None,
        help="Share of all parameters to remove. Default: each recipe's own.",
        low=0,
        high=1,
    )
    latency: float | None = option(
        None,
        help="best: most time of a generation, as a share of the dense model's. Default: 0.8 if no "
        "other budget is given.",
    )
    memory_gib: float | None = option(
        None, help="best: most memory of weights and key/value cache.", unit="GiB"
    )
    params: int | None = option(None, help="best: most parameters.", low=1)
    time_limit_s: float | None = option(
        None,
        help="best: most time for the whole recipe. It uses as much text as fits, at the rate that "
        "its first step measures, and never less than it needs. Default: 1200.",
        low=1,
        unit="seconds",
    )
    data: str = option(
        "",
        help="Dataset for calibration, training and evaluation (as the recipe needs). One SOURCE "
        "(some rows are held out) or TRAIN,EVAL. Default: english, or the demo's stories for the "
        "demo.",
    )
    join: str = option("auto", help=JOIN_HELP, choices=JOINS)
    steps: int | None = option(None, help="Training steps, if the recipe trains.", low=1)
    grid: tuple[str, ...] = option(
        (),
        repeat=True,
        help="sweep: an option of retrain and its values, e.g. lr=1e-3,3e-3; can be repeated. "
        "Default: lr=1e-3,3e-3 and loss=ce,kl.",
    )
    within: float | None = option(
        None, low=0, unit="s", help="sweep: the longest training that can be called the best."
    )
    same_layers: bool = option(
        False,
        help="depth-vs-width: width methods prune only the blocks that depth pruning may drop. By "
        "default, each prunes the blocks its paper does (FLAP and Wanda-sp: every block).",
    )
    tasks: tuple[str, ...] = option(
        (),
        help="paper-table, make: lm-eval tasks or presets, separated by commas. Default: the "
        "paper's seven tasks, for the demo its own questions; make: none.",
    )
    task_dir: str = option("", help="paper-table, make: folder of custom tasks, as for evaluate.")
    allow_task_code: bool = option(
        False, help="Let these tasks run the Python code that their YAML files name."
    )
    limit: int | None = option(
        None, help="paper-table, make: questions per task. Default: all; for the demo, 40.", low=1
    )
    seed: int | None = option(None, help="Seed for every step. Default: each command's own.")
