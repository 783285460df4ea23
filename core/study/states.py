"""What changes when anything that a study is read from does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.checkpoint import headers, locate
from core.runs import workspace
from core.runs.workspace import RunRecord

ALL = ("",)
"""Every file name ends with it."""


def state_of(records: Sequence[RunRecord], name: str = "") -> object:
    """Return a value that is equal as long as the study of ``name`` in these runs is the same.

    It has the records, name, time and size of every file of the runs, and the same of each
    checkpoint elsewhere that a run names, whether it exists or not. Files are not read.
    """
    seen = _runs.take(None, dict)
    for record in records:
        if record.path not in seen:
            seen[record.path] = _run_state(record.path)
    return (
        tuple(records),
        tuple(seen[record.path] for record in records),
        tuple(_outside(records, name)),
        os.getcwd(),
        workspace.default_root(),
    )


_runs: workspace.Looks[dict[Path, tuple[headers.FileState, headers.FileState]]]
_runs = workspace.Looks(1)
"""The files of the runs' folders; each folder is looked at when its state is first asked for."""


def _run_state(folder: Path) -> tuple[headers.FileState, headers.FileState]:
    files = _files(folder)
    merged = any(file[0] == "merged" for file in files)
    return files, _files(folder / "merged") if merged else ()


def _files(folder: Path) -> headers.FileState:
    try:
        return headers.file_state(folder, ALL)
    except OSError:
        return ()


def _outside(
    records: Sequence[RunRecord], name: str
) -> Iterable[tuple[str, Path | None, headers.FileState]]:
    """Yield what each checkpoint name that is not a run's means, with the state of its files."""
    inside = {r.id for r in records} | {str(r.path) for r in records}
    names = {name} if name else set()
    for record in records:
        for one in record.checkpoints:
            if one not in inside:
                names |= {one, os.path.join(record.cwd, one)} if record.cwd else {one}
    for one in sorted(names):
        folder = locate.local_folder(one)
        yield one, folder, _files(folder) if folder else ()
