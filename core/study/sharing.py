"""A study's settings as one YAML file: written in their order, read strictly.

Such a file comes from outside, so nothing in it is guessed: an unknown key, a key that stands
twice, a value of the wrong type or out of range is refused in one sentence that names it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from core import outside
from core.errors import InputError, OptionError
from core.runs.spec import build, flag_of
from core.study import settings as study_settings
from core.study.settings import NAMES, Settings

VERSION = 1
HEAD = "depthcut_study"
"""The key that says what the file is; its value is the format's version."""
NAMED = "checkpoint"
MOST_BYTES = 64 * 1024
CONSENT = "allow_task_code"
"""Consent is given on a page: a file from elsewhere neither grants nor carries it."""
SHARED = tuple(name for name in NAMES if name != CONSENT)
_FIX = "Save the settings of a study on the home page for an example."


def to_yaml(settings: Settings, checkpoint: str) -> str:
    """Return the settings as YAML."""
    import yaml

    found = settings.to_dict()
    values = {HEAD: VERSION, NAMED: checkpoint, **{name: found[name] for name in SHARED}}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def from_yaml(data: bytes, folder: Path) -> tuple[Settings, str]:
    """Return the settings in a YAML file, and the checkpoint that it was saved for.

    ``folder`` is that of the checkpoint that they are for: what the file does not set takes its
    default there.

    Raises `InputError` for anything that is not such a file.
    """
    found = _mapping(data)
    version = found.pop(HEAD, None)
    if version != VERSION or isinstance(version, bool):
        raise InputError(
            f"This is not a study of this version: {HEAD} is {outside.brief(version)}, "
            f"not {VERSION}.",
            _FIX,
        )
    checkpoint = found.pop(NAMED, "")
    if not isinstance(checkpoint, str):
        raise InputError(f"{NAMED}: {outside.brief(checkpoint)} is not a name.", _FIX)
    unknown = [name for name in found if name not in SHARED]
    if unknown:
        raise InputError(
            f"Unknown setting: {outside.brief(unknown[0])}.", f"Settings: {', '.join(SHARED)}."
        )
    start = dataclasses.asdict(study_settings.defaults(folder))
    try:
        settings = build(Settings, {**start, **found})
    except OptionError as error:
        text, hint = error.message, error.hint
        for name in SHARED:
            text = text.replace(flag_of(name) + ":", f"{name}:")
        raise InputError(text, hint) from None
    return study_settings.resolved(settings, folder), checkpoint


def _mapping(data: bytes) -> dict[str, Any]:
    """Parse a YAML mapping with text as keys; raises `InputError` if it is not one."""
    import yaml

    if len(data) > MOST_BYTES:
        raise InputError(
            f"The file has {len(data):,} bytes; a study's settings have up to {MOST_BYTES:,}.",
            "Choose the file that was saved for a study.",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The file is not UTF-8 text (byte {error.start}).", _FIX) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        reason = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"The file is not valid YAML{line}: {reason}.", _FIX) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError("The file does not hold settings: it is not a list of names.", _FIX)
    keys = [key.value for key, _ in root.value]
    twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if twice:
        raise InputError(f"{outside.brief(twice[0])} is set twice.", "Keep one of the two.")
    return value
