"""Options as a page calls them: sentences about ``--kl-weight`` speak of 'KL weight' there.

Errors, findings and help texts are shared with the command line, which has flags; a page has
fields. Only flags of our own commands are replaced, and never in commands that are shown as such.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from core.commands import COMMANDS

WORDS = {
    "lr": "Learning rate",
    "kl_weight": "KL weight",
    "teacher_top_k": "Teacher's tokens kept",
    "dtype": "Precision",
    "perplexity": "Perplexity of",
    "limit": "Questions per task",
    "task_dir": "Folder of custom tasks",
    "each_block": "Repeat with each block removed",
    "allow_task_code": "Allow these tasks to run Python code",
    "time_limit_s": "Time limit",
    "max_tokens": "Max tokens",
    "layers": "Blocks",
    "parts": "What to cut",
    "attention_layers": "Blocks whose attention is cut",
    "mlp_layers": "Blocks whose MLP is cut",
    "round_to": "Round widths to",
    "remove_heads": "Heads to remove",
    "order": "Taylor expansion",
    "drop": "Blocks to drop",
    "repo": "Repository",
    "same_layers": "Restrict all methods to the same blocks",
    "params": "Parameters",
    "counts": "Numbers of blocks",
}
"""Labels of fields whose names are abbreviations, or that a page calls differently."""
WRITING = ("temperature", "top_k", "top_p")
"""Options of generating text, which no command has: the live model is asked for it."""
FOLDER = re.compile(r"(another|a writable|a new|a different) --out( folder)?")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)(?:[ =]([\w.]+(?:[-:,/][\w.]+)*))?")


def called(name: str) -> str:
    """Return the label of the field of an option."""
    return WORDS.get(name) or name.replace("_", " ").capitalize()


@functools.cache
def _choices() -> dict[str, frozenset[str]]:
    """Return all options of all commands, each with the values that can be chosen."""
    found: dict[str, set[str]] = {name: set() for name in WRITING}
    for command in COMMANDS.values():
        for field in dataclasses.fields(command.spec_class):
            found.setdefault(field.name, set()).update(map(str, field.metadata["choices"] or ()))
    return {name: frozenset(values) for name, values in found.items()}


def in_words(text: str) -> str:
    """Return a sentence with the flags in it replaced by the labels of their fields."""
    if "--" not in text:
        return text
    return _FLAG.sub(_label, FOLDER.sub(r"\1 folder", text))


def _label(found: re.Match[str]) -> str:
    name, value = found[1].replace("-", "_"), found[2]
    known = _choices()
    if name.startswith("no_"):
        name = name.removeprefix("no_")
    if name not in known:
        return found[0]
    if value is None:
        return f"'{called(name)}'"
    if value.rstrip(".") in known[name] or value[:1].isdigit():
        end = "." if value.endswith(".") else ""
        return f"'{called(name)}: {value.rstrip('.')}'{end}"
    return f"'{called(name)}'{found[0][found.start(2) - found.start() - 1 :]}"


def about(field: dataclasses.Field[Any]) -> str:
    """Return the help text of an option's field."""
    text = in_words(str(field.metadata["help"]))
    return text.replace(", separated by commas", "") if field.metadata["choices"] else text
