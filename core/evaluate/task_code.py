"""Task files that run Python: found by parsing YAML without executing it, refused without consent.

``!function utils.load`` in a task's YAML makes lm-eval import and call a Python file beside it, and
``hf_evaluate: true`` a metric's script. The tasks of lm-eval and of the demo are trusted; those of
another folder are not, and neither is what they include. Templates are not code: without consent
they are rendered in jinja's sandbox (`core.evaluate.zero_shot`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import OptionError
from core.evaluate import suites
from core.evaluate.suites import DEMO_TASKS, Place, named_in

MOST_BYTES = 4 << 20
"""The largest task file that is read. Chosen; real ones have a few kilobytes."""


@dataclass(frozen=True)
class TaskFile:
    """What one YAML file says, without any of it being executed."""

    path: Path
    names: frozenset[str] = frozenset()
    """Its task, its group and its tags."""
    members: tuple[str, ...] = ()
    includes: tuple[Path, ...] = ()
    code: tuple[str, ...] = ()
    """What it would run."""


def check(places: Sequence[Place], *, allowed: bool) -> None:
    """Raise `OptionError` naming the tasks of other folders that would run Python code.

    ``allowed``: the user has consented.
    """
    found = [] if allowed else [(p.name, *code) for p in places if (code := _code_of(p))]
    if found:
        name, what, file = found[0]
        others = "".join(f", '{task}'" for task, *_ in found[1:6])
        more = f" (so {'do' if len(found) > 2 else 'does'}{others[1:]})" if others else ""
        raise OptionError(
            f"Task '{name}' would run Python code: {what} in {file}{more}.",
            "Read that code, and add --allow-task-code if you trust it.",
        )


def check_own(tasks: Sequence[str], task_dir: str, *, allowed: bool) -> None:
    """Raise `OptionError` as `check` does, for those of ``tasks`` that are in a user's folder.

    Tasks from elsewhere are not looked for: reading the index of lm-eval's takes seconds. Also
    raises if there is no such folder.
    """
    if task_dir:
        own = suites.own(task_dir)
        asked = suites.expand(tasks)
        check([own[name] for name in asked if name in own], allowed=allowed)


def is_trusted(folder: Path) -> bool:
    """Whether the files of ``folder`` are lm-eval's own or the demo's."""
    return any(folder.resolve().is_relative_to(root) for root in _trusted())


def _trusted() -> Iterator[Path]:
    yield DEMO_TASKS
    spec = importlib.util.find_spec("lm_eval")
    if spec and spec.origin:
        yield (Path(spec.origin).parent / "tasks").resolve()


def _code_of(place: Place) -> tuple[str, Path] | None:
    """Return the first code that loading a task would run, and its file; None if there is none."""
    if not place.local or is_trusted(place.folder):
        return None
    around = [read(path) for path in sorted(place.folder.glob("**/*.yaml"))]
    open_ = [file for file in around if place.name in file.names] or around
    seen: set[Path] = set()
    while open_:
        file = open_.pop()
        if file.path in seen or is_trusted(file.path.parent):
            continue
        seen.add(file.path)
        if file.code:
            return file.code[0], file.path
        open_ += [read(path) for path in file.includes]
        open_ += [other for other in around if other.names.intersection(file.members)]
    return None


def read(path: Path) -> TaskFile:
    """Return what a YAML file says; one that cannot be parsed counts as code.

    YAML's nodes are only composed, never constructed, so tags have no effect.
    """
    import yaml

    path = path.resolve()
    try:
        if not path.is_file():
            return TaskFile(path)
        if path.stat().st_size > MOST_BYTES:
            return TaskFile(path, code=("a file too large to check",))
        text = path.read_text(encoding="utf-8", errors="replace")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError:
        return TaskFile(path)  # lm-eval cannot read it either
    except (ValueError, RecursionError, yaml.YAMLError):
        return TaskFile(
            path, frozenset(named_in(text)), code=("something that cannot be parsed as YAML",)
        )
    code, names, members, includes = [], set(), [], []
    for key, node in _walk(root):
        if node.tag.startswith(("!", "tag:yaml.org,2002:python")):
            value = node.value if isinstance(node.value, str) else ""
            code.append(f"{node.tag} {value}".strip())
        if key == "hf_evaluate" and str(node.value).lower() in ("true", "yes", "on"):
            code.append("hf_evaluate: true")
        if key in ("task", "group", "tag"):
            told = _strings(node)
            is_list = not isinstance(node.value, str)
            if key == "task" and is_list:
                members += told  # a group's tasks
            else:
                names.update(told)
        if key == "include":
            includes += [path.parent / name for name in _strings(node)]
    return TaskFile(path, frozenset(names), tuple(members), tuple(includes), tuple(code))


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield every node once, with the key that it is the value of ("" if none)."""
    open_, seen = [("", root)] if root else [], set()
    while open_:
        key, node = open_.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield key, node
        if isinstance(node.value, list):
            for item in node.value:
                pair = item if isinstance(item, tuple) else (None, item)
                name = pair[0].value if pair[0] is not None else ""
                open_ += [(str(name), pair[1]), *([("", pair[0])] if pair[0] is not None else [])]


def _strings(node: Any) -> list[str]:
    """Return a scalar's text, or those of a list."""
    if isinstance(node.value, str):
        return [node.value]
    return [item.value for item in node.value if isinstance(getattr(item, "value", 0), str)]
