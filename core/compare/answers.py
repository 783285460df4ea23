"""What variants answer on tasks, in plain words: 41 of 50 science questions, 44 before."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.evaluate import suites
from core.evaluate.questions import MEANS
from core.study import Study, Task

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are the share of right answers."""
WORDS = {
    "arc_easy": "science questions",
    "arc_challenge": "hard science questions",
    "sciq": "science exam questions",
    "openbookqa": "questions on elementary science",
    "boolq": "yes-or-no questions",
    "piqa": "questions on everyday physics",
    "hellaswag": "stories to continue",
    "winogrande": "pronouns to resolve",
    "copa": "questions on cause and effect",
    "gsm8k": "school maths problems",
    "logiqa": "logic puzzles",
    "commonsense_qa": "questions of common sense",
    "medmcqa": "medical exam questions",
    "pubmedqa": "questions on medical papers",
    "demo_possession": "questions on who has what",
    "demo_counting": "counting questions",
    "demo_location": "questions on where things are",
    "demo_colour": "questions on colours",
    "demo_order": "questions on what came first",
    "demo_cause": "questions on causes",
    "demo_opposite": "questions on opposites",
    "demo_compare": "questions on who has more",
}
"""What the questions of a task are, for people who do not know its name."""


@dataclass(frozen=True)
class Answers:
    """How many questions of one task a variant answers correctly, and the dense model did."""

    task: str
    right: float
    """Share of right answers."""
    before: float
    """The dense model's share, of the same questions."""
    count: int
    """Questions."""

    @property
    def words(self) -> str:
        """What the questions are, in plain words."""
        return WORDS.get(self.task, f"questions of {self.task}")

    @property
    def sentence(self) -> str:
        """The counts in plain words; a share if there are too many questions to picture."""
        right, before = round(self.right * self.count), round(self.before * self.count)
        return f"{right:,} of {self.count:,} {self.words}, {before:,} before"


def answers_of(study: Study, variant: str, wanted: Sequence[str] = ()) -> tuple[Answers, ...]:
    """Return what a variant answers on the tasks that the dense model was asked in the same way.

    ``wanted``: tasks or presets; if none of them was asked, all that were. Means and tasks that
    are not scored by right answers are left out.
    """
    own, dense = _newest(study, variant), _newest(study, study.dense.id)
    found = []
    for key, mine in own.items():
        base = dense.get(key)
        if base and mine.samples and mine.samples == base.samples:
            found.append(Answers(mine.task, mine.value, base.value, mine.samples))
    names = suites.expand(tuple(wanted))
    chosen = [a for a in found if a.task in names] or found
    return tuple(sorted(chosen, key=lambda a: a.task))


def _newest(study: Study, variant: str) -> Mapping[tuple[str, str, str], Task]:
    """Return the newest score of each task by its own metric and prompting."""
    by_task: dict[tuple[str, str], dict[str, Task]] = {}
    for row in sorted(study.tasks, key=lambda t: t.started):
        if row.variant == variant and row.metric in SHARES and row.task not in MEANS.values():
            by_task.setdefault((row.task, row.prompting), {})[row.metric] = row
    found = {}
    for (task, prompting), rows in by_task.items():
        metric = suites.metric_of(task, list(rows))
        found[task, metric, prompting] = rows[metric]
    return found


def mean(found: Sequence[Answers]) -> tuple[float, float] | None:
    """Return the plain means of a variant's and the dense model's shares; None without tasks."""
    if not found:
        return None
    return statistics.fmean(a.right for a in found), statistics.fmean(a.before for a in found)


def in_words(found: Sequence[Answers]) -> str:
    """Return all tasks together: 301 of 400 questions of 8 tasks, 322 before."""
    if len(found) == 1:
        return found[0].sentence
    count = sum(a.count for a in found)
    right, before = (
        round(sum(getattr(a, n) * a.count for a in found)) for n in ("right", "before")
    )
    return f"{right:,} of {count:,} questions of {len(found)} tasks, {before:,} before"
