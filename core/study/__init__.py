"""A study: a dense checkpoint and every run of a workspace descended from it.

``study(Workspace(), "demo")`` gathers the variants (dense, depth, width, retrained), and what runs
measured about them: perplexities, task scores, benchmark points, and the perplexities of plans
that were never written as checkpoints (importance and curve runs). Everything is read from run
directories; nothing is loaded, and torch is not needed.

A perplexity is only comparable with others of the same `Protocol`: the same text, window and BOS.
"""

from __future__ import annotations

from core.runs.workspace import Workspace
from core.study import variants
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
from core.study.lineage import checkpoints, root_of
from core.study.measured import benchmarks, perplexities_and_tasks, read_rows
from core.study.tokenizers import tokenizer_conflict, tokenizer_key

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
    "tokenizer_key",
]


def study(where: Workspace, name: str) -> Study:
    """Gather the study that checkpoint ``name`` (dense, or any variant of it) belongs to.

    Raises `CheckpointError` where a local checkpoint cannot be read.
    """
    records = [r for r in where.runs() if r.state == "done"]
    root = root_of(variants.tree(records), name)
    found = checkpoints(root)
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
    )
