"""The settings of a study: what it measures on, trains on and aims at.

They are asked once for a dense checkpoint; every page and recipe starts from them. `options_of` and
`recipe_options` return the options that follow from them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import outside
from core.checkpoint.vocabulary import default_text, text_of
from core.data import hub, readers, sources
from core.errors import DataError, OptionError
from core.evaluate import task_code
from core.runs import flags
from core.runs.spec import DeviceOptions, build, option

TEXTS = ("calibration", "evaluation", "training")
HASHED = 256 * outside.MIB
"""Files up to this size are compared by their content."""
DEMO_QUESTIONS = 40
"""Questions per task on the demo: its eight skills take seconds."""
CALIBRATED = ("importance", "search", "budget", "width", "prune")
"""Commands that read calibration text."""


@dataclass(frozen=True, kw_only=True)
class Settings(DeviceOptions):
    """What every page and recipe of a study starts from."""

    calibration: str = option(
        "english", help="Text that scores, searches, width pruning and healing read."
    )
    evaluation: str = option(
        "english",
        help="Text that perplexity is measured on. It must have no part in calibration or "
        "training; of the bundled texts, a separate part is kept for it.",
    )
    training: str = option("english", help="Text or instructions that retraining learns from.")
    tasks: tuple[str, ...] = option(
        (), help="lm-eval tasks or presets (paper, demo, reasoning, domains). Empty: none."
    )
    task_dir: str = option(
        "", help="Folder with your own tasks as lm-eval YAML files; they can then be chosen."
    )
    allow_task_code: bool = option(
        False,
        help="Let these tasks run the Python code that their YAML files name, with your rights. "
        "Read that code first.",
    )
    limit: int | None = option(None, help="Questions per task. Empty: all.", low=1, high=1_000_000)
    ratio: float | None = option(
        None, help="Share of all parameters to remove. Empty: no target.", low=0.001, high=0.95
    )
    ms_per_token: float | None = option(
        None, help="Time for a token that a variant must not exceed.", low=0.001, high=1e6
    )
    memory_gib: float | None = option(
        None, help="Memory that a variant must not exceed.", low=0.001, high=1e6
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, in their order on the page."""
        found = dataclasses.asdict(self)
        return {name: found[name] for name in NAMES} | {"tasks": list(self.tasks)}


NAMES = (
    *TEXTS, "tasks", "task_dir", "allow_task_code", "limit", "ratio", "ms_per_token", "memory_gib",
    "device", "dtype",
)  # fmt: skip


def defaults(folder: Path) -> Settings:
    """Return the settings of a new study of the checkpoint in ``folder``.

    The bundled text that fits its vocabulary; the demo's own questions for the demo. Other tasks
    are not on this machine, so none is a default.
    """
    text = default_text(folder)
    texts: dict[str, Any] = dict.fromkeys(TEXTS, text)
    if text == "demo":
        return Settings(**texts, tasks=("demo",), limit=DEMO_QUESTIONS)
    return Settings(**texts)


def read(values: Mapping[str, Any], folder: Path) -> Settings:
    """Return settings from a file of the workspace; what is not usable takes its default."""
    found = defaults(folder)
    for name in NAMES:
        if name in values:
            try:
                one = build(Settings, {name: values[name]})
            except OptionError:
                continue
            found = dataclasses.replace(found, **{name: getattr(one, name)})
    return resolved(found, folder)


def resolved(settings: Settings, folder: Path) -> Settings:
    """Return the settings with ``auto``, or nothing, replaced by the text that it stands for."""
    texts: dict[str, Any] = {
        name: text_of(getattr(settings, name).strip(), folder) for name in TEXTS
    }
    return dataclasses.replace(settings, **texts)


def options_of(settings: Settings, command: str) -> dict[str, Any]:
    """Return the options of a command that a study's settings decide."""
    where = {"device": settings.device, "dtype": settings.dtype}
    if command in CALIBRATED:
        return {"calibration": settings.calibration, **where}
    if command == "evaluate":
        return {"perplexity": (settings.evaluation,), **_asked(settings), **where}
    if command == "generate":
        return {"prompts": settings.training, **where}
    return {"data": settings.training, **where} if command == "retrain" else where


def _asked(settings: Settings) -> dict[str, Any]:
    """Return the options of a command that asks tasks."""
    found: dict[str, Any] = {"tasks": settings.tasks, "limit": settings.limit}
    if settings.task_dir:
        found["task_dir"] = settings.task_dir
        found["allow_task_code"] = settings.allow_task_code
    return found


SIZED = ("restore", "depth-vs-width", "calibration", "ablation", "stability", "domain", "cpt-lora")
"""Recipes that remove a share of the parameters."""
APART = ("drop-one", "depth-vs-width", "paper-table")
"""Recipes that take a text to work on and another to evaluate on."""
TWO_DATASETS = ("calibration", "domain")
"""Recipes that compare two datasets: these are not a study's."""
WHOLE = "make"
"""The recipe that makes and measures one variant: it takes all that a study knows."""


def recipe_options(settings: Settings, name: str) -> dict[str, Any]:
    """Return the options of a recipe that a study's settings decide."""
    found: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
    if name == WHOLE:
        both = dict.fromkeys((settings.training, settings.evaluation))
        found |= {"data": ",".join(both), "calibration": settings.calibration}
        return found | _asked(settings)
    if name in APART:
        both = dict.fromkeys((settings.calibration, settings.evaluation))
        found["data"] = ",".join(both)
    elif name not in TWO_DATASETS:
        found["data"] = settings.calibration if name == "importance" else settings.training
    if name in SIZED and settings.ratio is not None:
        found["ratio"] = settings.ratio
    if name == "paper-table":
        found |= _asked(settings)
    return found


def problems(settings: Settings) -> list[str]:
    """Return one sentence for each setting that does not work: missing files, shared text."""
    found = []
    for name in TEXTS:
        try:
            _check(getattr(settings, name))
        except DataError as error:
            found.append(f"{name.capitalize()}: {error}")
    try:
        task_code.check_own(settings.tasks, settings.task_dir, allowed=settings.allow_task_code)
    except OptionError as error:
        found.append(flags.in_words(str(error)))
    return [*found, *filter(None, [seen_before(settings.evaluation, settings)])]


def seen_before(evaluation: str, settings: Settings) -> str:
    """Return a sentence if an evaluation text has a part in calibration or training, else ""."""
    shared = [
        words
        for words, other in (
            ("the calibration text", settings.calibration),
            ("the training data", settings.training),
        )
        if same_text(evaluation, other)
    ]
    if not shared:
        return ""
    return (
        f"The evaluation text {short(evaluation)} is also {' and '.join(shared)}, so perplexity on "
        "it says little about other text: choose another evaluation text."
    )


def short(source: str) -> str:
    """Return a SOURCE without the folders of a file."""
    if source.startswith("hub:"):
        return source
    return source.rstrip("/").rsplit("/", 1)[-1] or source


def _check(source: str) -> None:
    """Raise `DataError` if a SOURCE names a file that is not there; nothing is read."""
    name = sources.preset(sources.split_field(source)[0])
    if name in sources.BUNDLED or name.startswith("hub:"):
        return
    if not outside.is_folder(outside.path_of(name)):
        readers.source_file(name)


def same_text(first: str, second: str) -> bool:
    """Whether two SOURCEs are the same text; a bundled one has a part for every use."""
    if first == second:
        return first not in sources.BUNDLED
    (one, field), (other, other_field) = map(sources.split_field, (first, second))
    if field and other_field and field != other_field:
        return False
    one, other = (sources.PRESETS.get(name, name) for name in (one, other))
    if one.startswith("hub:") and other.startswith("hub:"):
        return hub.split_name(one)[:3] == hub.split_name(other)[:3]
    if one in sources.BUNDLED or other in sources.BUNDLED:
        return False
    return _same_file(outside.path_of(one), outside.path_of(other))


def _same_file(one: Path, other: Path) -> bool:
    try:
        if os.path.samefile(one, other):
            return True
        states = [(os.path.realpath(path), path.stat()) for path in (one, other)]
        sizes = {state.st_size for _, state in states}
        if len(sizes) > 1 or max(sizes) > HASHED or not (one.is_file() and other.is_file()):
            return False
        first, second = (_digest(path, s.st_size, s.st_mtime_ns) for path, s in states)
    except (OSError, ValueError):
        return False
    return first == second


@functools.lru_cache(maxsize=64)
def _digest(path: str, _size: int, _mtime: int) -> bytes:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
