"""What variants answer on tasks, in plain words: 41 of 50 science questions, 44 before."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.evaluate import suites
from core.evaluate.compare import answer_in_words, paired, right_in_words
from core.evaluate.questions import MEANS
from core.evaluate.results import read_samples
from core.study import Study, Task

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are the share of right answers."""
FLEXIBLE = "exact_match,flexible-extract"
"""Of a written answer, preferred: it looks at the answer, whatever its layout."""
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
    "lambada_openai": "passages without their last word",
    "arithmetic": "sums and products",
    "demo_open": "open questions about stories",
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
    metric: str = ""
    run: str = ""
    """The run that asked the variant."""
    dense_run: str = ""
    is_written: bool = False
    """Whether the model writes the answer itself, instead of choosing one of several."""

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

    With as many questions, the most that both were asked.
    ``wanted``: tasks or presets; if none of them was asked, all that were. Written answers are
    always among them. Means and tasks that are not scored by right answers are left out.
    """
    own, dense = _newest(study, variant), _newest(study, study.dense.id)
    most: dict[str, Answers] = {}
    for key, mine in own.items():
        base = dense.get(key)
        count = mine.samples or 0
        if base and count > (most[mine.task].count if mine.task in most else 0):
            most[mine.task] = Answers(
                mine.task, mine.value, base.value, count, metric=mine.metric, run=mine.run,
                dense_run=base.run, is_written=mine.is_written,
            )  # fmt: skip
    found = list(most.values())
    names = suites.expand(tuple(wanted))
    chosen = [a for a in found if a.task in names]
    if chosen:
        chosen += [a for a in found if a.is_written and a not in chosen]
    chosen = chosen or found
    return tuple(sorted(chosen, key=lambda a: a.task))


def _by_variant(study: Study) -> Mapping[str, list[Task]]:
    """Return the scores of each variant that are shares of right answers, the oldest first."""
    for tasks, index in tuple(_kept):
        if tasks is study.tasks:
            return index
    found: dict[str, list[Task]] = {}
    for row in sorted(study.tasks, key=lambda t: t.started):
        if row.metric.partition(",")[0] in SHARES and row.task not in MEANS.values():
            found.setdefault(row.variant, []).append(row)
    _kept.append((study.tasks, found))
    return found


_kept: deque[tuple[Sequence[Task], Mapping[str, list[Task]]]] = deque(maxlen=16)
"""The scores by variant of the studies seen last."""


def _newest(study: Study, variant: str) -> Mapping[tuple[str, str, str, int | None], Task]:
    """Return the newest score of each task by its own metric, prompting and number of questions."""
    by_task: dict[tuple[str, str, int | None], dict[str, Task]] = {}
    for row in _by_variant(study).get(variant, ()):
        by_task.setdefault((row.task, row.prompting, row.samples), {})[row.metric] = row
    found = {}
    for (task, prompting, samples), rows in by_task.items():
        metric = FLEXIBLE if FLEXIBLE in rows else suites.metric_of(task, list(rows))
        found[task, metric, prompting, samples] = rows[metric]
    return found


def chosen(found: Sequence[Answers]) -> tuple[Answers, ...]:
    """Return those that were chosen among given ones."""
    return tuple(a for a in found if not a.is_written)


def written(found: Sequence[Answers]) -> tuple[Answers, ...]:
    """Return those that the model wrote itself."""
    return tuple(a for a in found if a.is_written)


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


@dataclass(frozen=True)
class Example:
    """One question of a task, and what both models answered."""

    words: str
    """What kind of question it is."""
    question: str
    right: str
    before: str
    """The dense model's answer."""
    after: str
    was_right: bool
    """Whether the dense model was right."""
    is_right: bool
    """Whether the variant is right."""


SHOWN = 400
"""Characters of a question that are shown: its end, which asks."""


def examples(study: Study, found: Sequence[Answers]) -> list[Example]:
    """Return up to two questions: the first that both models answer, the first that was lost.

    From the samples that the evaluate runs kept; empty if they kept none.
    """
    folders = {record.id: record.path for record in study.runs}
    both: Example | None = None
    lost: Example | None = None
    for one in found:
        if one.run not in folders or one.dense_run not in folders or (both and lost):
            continue
        dense, own = (read_samples(folders[run]) for run in (one.dense_run, one.run))
        for before, after in paired(dense, own, one.task, one.metric):
            text = before.question.strip()
            made = Example(
                one.words,
                _end(text),
                right_in_words(before).strip(),
                answer_in_words(before, one.metric).strip(),
                answer_in_words(after, one.metric).strip(),
                before.value(one.metric) == 1,
                after.value(one.metric) == 1,
            )
            if text and made.was_right:
                both = both or (made if made.is_right else None)
                lost = lost or (None if made.is_right else made)
            if both and lost:
                break
    return [example for example in (both, lost) if example]


def _end(text: str) -> str:
    """Return the end of a long question, from the beginning of a sentence if it has one."""
    if len(text) <= SHOWN:
        return text
    tail = text[-SHOWN:]
    start = tail.find(". ")
    return f"… {tail[start + 2 :] if 0 <= start < SHOWN // 2 else tail.partition(' ')[2]}"
