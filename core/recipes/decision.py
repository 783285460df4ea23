"""The verdict on the study that a recipe is part of: that of every page and of the report."""

from __future__ import annotations

from pathlib import Path

from core.benchmark.results import known_rates
from core.compare.verdict import Verdict, verdict_of
from core.errors import DepthcutError
from core.runs.workspace import Workspace
from core.study import store, study


def of_study(checkpoint: str, folder: Path) -> Verdict | None:
    """Return the verdict on the study of ``checkpoint``; ``folder`` is the recipe's.

    The study is that of the workspace, if the recipe runs there, else of the recipe's own steps.
    None if the checkpoint can no longer be read.
    """
    where = Workspace()
    if folder.resolve().parent != where.root.resolve():
        where = Workspace(folder)
    try:
        known = study(where, checkpoint)
    except (DepthcutError, OSError):
        return None
    settings = store.of(known.dense.id, where).settings
    return verdict_of(known, settings, rates=known_rates(where))
