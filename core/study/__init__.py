"""A study: a dense checkpoint and every run of a workspace descended from it.

``study(Workspace(), "demo")`` gathers the variants (dense, depth, width, retrained), and what runs
measured about them: perplexities, task scores, benchmark points, and the perplexities of plans
that were never written as checkpoints (importance, curve and search runs). Everything is read from
run directories; no model is loaded, and torch is not needed.

Perplexities are comparable only within one `Protocol`: the same text, window and BOS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from core.checkpoint import locate
from core.runs import workspace
from core.runs.workspace import RunRecord, Workspace
from core.study.kinds import (
    Benchmark,
    Finder,
    Protocol,
    Quality,
    Study,
    Task,
    Variant,
    criterion_label,
    info_of,
)
from core.study.lineage import lineage_of
from core.study.measured import benchmarks, perplexities_and_tasks, read_rows, recoveries
from core.study.states import state_of
from core.study.tokenizers import tokenizer_conflict

__all__ = [
    "Benchmark",
    "Protocol",
    "Quality",
    "Study",
    "Task",
    "Variant",
    "criterion_label",
    "info_of",
    "read_rows",
    "study",
    "tokenizer_conflict",
]

KEPT = 16
"""Studies that are kept: a few for each session, which looks at one or two at a time."""
_kept: dict[tuple[Path, str], tuple[object, Study]] = {}
_looks: workspace.Looks[Study] = workspace.Looks(KEPT)


def study(where: Workspace, name: str) -> Study:
    """Gather the study that checkpoint ``name`` (dense, or any variant of it) belongs to.

    Kept until a run, a file of a run or a checkpoint of the study changes; the lists and
    dictionaries in it are shared, so never changed in place.

    Raises `CheckpointError` if a local checkpoint cannot be read.
    """
    root = where.root.absolute()
    key = (root, name, os.getcwd(), workspace.default_root())
    return _looks.take(key, lambda: _as_now(where, (root, name)))


def _as_now(where: Workspace, key: tuple[Path, str]) -> Study:
    """Return the study that was kept, if nothing it was read from has changed; else read it."""
    records = [r for r in where.runs() if r.state == "done"]
    state, kept = state_of(records, key[1]), _kept.get(key)
    if kept and kept[0] == state:
        return kept[1]
    found = gather(records, key[1])
    while len(_kept) >= KEPT:
        _kept.pop(next(iter(_kept)), None)
    _kept[key] = (state, found)
    return found


def gather(records: Sequence[RunRecord], name: str) -> Study:
    """Return the study of ``name`` among these runs, read from their files; see `study`."""
    found = lineage_of(name, records).variants
    if found[0].folder:
        locate.at(found[0].folder)  # raises what is wrong with it
    finder = Finder(found)
    runs, others = benchmarks(records, finder)
    everything = (*found, *others)
    finder = Finder(everything)
    quality, tasks = perplexities_and_tasks(records, finder, found[0])
    belong = {v.record.id for v in found if v.record} | {b.id for b in runs}
    belong |= {q.run for q in quality} | {t.run for t in tasks}
    return Study(
        everything,
        tuple(quality),
        tuple(tasks),
        tuple(runs),
        tuple(r for r in records if r.id in belong),
        recoveries(found),
    )
