"""The available tasks: presets, each task's metric, and the names that lm-eval knows.

The names are read from the text of the task files, so that neither lm-eval (seconds) nor its index
of all tasks (much longer) has to be loaded to check that a task exists, to find it, or to suggest
similar names.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import outside
from core.demo import DATA
from core.demo.questions import SKILLS
from core.errors import OptionError

PAPER = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The seven tasks of Shortened LLaMA and the metric of each (METHODS, section 4)."""

DEMO = tuple(f"demo_{skill}" for skill in SKILLS)
"""The demo world's questions, one task per skill; shipped in `DEMO_TASKS`."""

OPEN = "demo_open"
"""The demo's questions, answered in the model's own words."""
WRITTEN = ("generate_until", "loglikelihood")
"""Output types of lm-eval whose answer the model writes, token by token: of the second it is
compared with what greedy decoding would write, as for LAMBADA."""
_WRITTEN_METRICS = ("exact_match", "flexible_match")

PRESETS: dict[str, tuple[str, ...]] = {
    "paper": tuple(PAPER),
    "demo": DEMO,
    "generation": ("gsm8k", "lambada_openai"),
    "reasoning": ("gsm8k", "logiqa", "copa", "commonsense_qa", "bbh_zeroshot"),
    "domains": ("mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other", "sciq",
                "medmcqa", "pubmedqa"),
}  # fmt: skip
"""Names that each stand for several tasks."""

DEMO_TASKS = (Path(__file__).parents[1] / "demo" / "tasks").resolve()
_LINE = re.compile(r"^['\"]?(?:task|group)['\"]?: *['\"]?([\w.:/+-]+)['\"]? *$", re.MULTILINE)
_TAGS = re.compile(r"^['\"]?tag['\"]?:((?: *\S.*)?(?:\n *- .*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Place:
    """The origin of a task."""

    name: str
    folder: Path
    """Folder of its file; for a tag, the folder of all its tasks."""
    local: bool
    """Whether it is from ``--task-dir`` or the demo, not from lm-eval."""


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Return task names with presets replaced by their tasks, each once, in order."""
    found = (task for name in names for task in PRESETS.get(name, (name,)))
    return tuple(dict.fromkeys(found))


def metric_of(task: str, metrics: Sequence[str]) -> str:
    """Return the metric of a task: the paper's, or the first that lm-eval reports."""
    wanted = PAPER.get(task, "")
    return wanted if wanted in metrics else metrics[0]


def is_written(task: str, metric: str, output_type: str = "") -> bool:
    """Whether a model writes the answer to a task itself, instead of choosing one of several.

    Runs of earlier versions did not record the type; then the metric decides.
    """
    if output_type:
        return output_type in WRITTEN
    return metric.partition(",")[0] in _WRITTEN_METRICS or task.startswith("lambada")


def find(names: Iterable[str], task_dir: str = "") -> tuple[Place, ...]:
    """Find each task; ``task_dir`` takes precedence over the demo's, those over lm-eval's.

    Raises:
        OptionError: The folder or a task does not exist; similar names are suggested.
    """
    near_by = {**_scan(DEMO_TASKS, local=True), **(own(task_dir) if task_dir else {})}
    places = []
    for name in names:
        place = near_by.get(name) or _builtin().get(name)  # lm-eval has 10,000 files
        if place is None:
            known = [*PRESETS, *catalog(task_dir)]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"Similar: {', '.join(near)}." if near else "Add --task-dir for a local task."
            raise OptionError(f"--tasks: unknown task '{name}'.", hint)
        places.append(place)
    return tuple(places)


def catalog(task_dir: str = "") -> dict[str, Place]:
    """Return every known task, group and tag by name."""
    own_tasks = own(task_dir) if task_dir else {}
    return {**_builtin(), **_scan(DEMO_TASKS, local=True), **own_tasks}


def own(task_dir: str) -> dict[str, Place]:
    """Return the tasks, groups and tags of a user's folder by name.

    Raises `OptionError` if there is no such folder.
    """
    folder = outside.path_of(task_dir)
    if not folder.is_dir():
        raise OptionError(
            f"--task-dir: no such folder: '{task_dir}'.", "Give a folder of YAML tasks."
        )
    return _scan(folder.resolve(), local=True)


@functools.lru_cache(maxsize=1)
def _builtin() -> dict[str, Place]:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return {}
    return _scan(Path(spec.origin).parent / "tasks", local=False)


def named_in(text: str) -> list[str]:
    """Return the tasks and groups that a YAML file's text defines."""
    return _LINE.findall(text)


def _scan(root: Path, *, local: bool) -> dict[str, Place]:
    """Return the tasks, groups and tags whose files are below ``root``."""
    found: dict[str, Place] = {}
    for path in sorted(root.glob("**/*.yaml")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        names = named_in(text)
        tags = [t.strip(" -'\"") for part in _TAGS.findall(text) for t in part.split("\n")]
        for name in names:
            found.setdefault(name, Place(name, path.parent, local))
        for tag in filter(None, tags):
            before = found.get(tag)
            folder = path.parent if before is None else _common(before.folder, path.parent)
            if before is None or tag not in names:
                found[tag] = Place(tag, folder, local)
    return found


def _common(first: Path, second: Path) -> Path:
    """Return the deepest folder that contains both."""
    return next(p for p in (first, *first.parents) if second.is_relative_to(p))


def files_content(place: Place) -> str:
    """Return a hash of a local task's files: everything below its folder.

    The demo's tasks also read the questions in the demo's data folder.
    """
    files = sorted(p for p in place.folder.rglob("*") if p.is_file())
    if place.folder == DEMO_TASKS:
        files += sorted(DATA.glob("questions_*.jsonl"))
    state = hashlib.sha256()
    for path in files:
        if "__pycache__" not in path.parts:
            state.update(path.name.encode() + b"\0")
            state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()[:32]
