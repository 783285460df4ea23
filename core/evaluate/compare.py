"""Two evaluated checkpoints beside each other: how they differ, how sure that is, which questions.

Both were judged on the same windows and the same questions, so differences are taken pair by pair:
what makes a window or a question hard for both drops out, and the standard error is that of the
mean difference. No torch here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from core.evaluate.results import Sample


@dataclass(frozen=True)
class Delta:
    """The second's value less the first's, with the standard error of that difference."""

    value: float
    stderr: float | None
    pairs: int | None
    """Windows or questions compared one by one; None where the two were compared as a whole."""

    @property
    def certain(self) -> bool:
        """Whether the difference is more than two standard errors from zero."""
        return self.stderr is not None and abs(self.value) > 2 * self.stderr


def perplexity_delta(first: Sequence[float], second: Sequence[float]) -> Delta | None:
    """Return the difference of perplexities from the mean losses of the same windows, in order.

    The standard error is first-order: perplexity is exp of the mean loss, so one window moves the
    difference by ppl2 * loss2 - ppl1 * loss1. Neighbouring windows of one text are not quite
    independent, so it is a little too small. None where the windows do not pair.
    """
    if len(first) != len(second) or not first:
        return None
    before, after = (math.exp(statistics.fmean(losses)) for losses in (first, second))
    moved = [after * b - before * a for a, b in zip(first, second, strict=True)]
    return Delta(after - before, _error_of_mean(moved), len(moved))


def _error_of_mean(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired(
    first: Iterable[Sample], second: Iterable[Sample], task: str
) -> list[tuple[Sample, Sample]]:
    """Return the samples of ``task`` that both have: same number, filter and question."""

    def by_question(samples: Iterable[Sample]) -> dict[tuple[int, str, str], Sample]:
        return {(s.index, s.filter, s.content): s for s in samples if s.task == task}

    before, after = by_question(first), by_question(second)
    return [(before[key], after[key]) for key in before if key in after]


def task_delta(
    first: Iterable[Sample], second: Iterable[Sample], task: str, metric: str
) -> Delta | None:
    """Return the mean difference of a metric over the questions that both were asked.

    None where they share none, or the metric is no number for each question.
    """
    values = []
    for before, after in paired(first, second, task):
        a, b = before.value(metric), after.value(metric)
        if a is None or b is None:
            return None
        values.append(b - a)
    if not values:
        return None
    return Delta(statistics.fmean(values), _error_of_mean(values), len(values))


def unpaired_delta(first: tuple[float, float | None], second: tuple[float, float | None]) -> Delta:
    """Return the difference of two (value, standard error) that were measured independently."""
    errors = (first[1], second[1])
    known = [e for e in errors if e is not None]
    stderr = math.hypot(*known) if len(known) == 2 else None
    return Delta(second[0] - first[0], stderr, None)


@dataclass(frozen=True)
class Flip:
    """A question that one of two checkpoints answers rightly and the other does not."""

    task: str
    index: int
    kind: str
    """lost: the first was right, the second is wrong; gained: the other way round."""
    question: str
    choices: tuple[str, ...]
    target: str
    first: str
    second: str


def flips(first: Iterable[Sample], second: Iterable[Sample], task: str, metric: str) -> list[Flip]:
    """Return the questions whose judgement by ``metric`` (1 right, 0 wrong) is not the same."""
    found = []
    for before, after in paired(first, second, task):
        a, b = before.value(metric), after.value(metric)
        if a is None or b is None or a == b:
            continue
        choices = tuple(str(c).strip() for c in before.choices or ())
        found.append(
            Flip(
                task,
                before.index,
                "lost" if a > b else "gained",
                before.question,
                choices,
                _named(before.target, choices),
                _named(_answer(before, metric), choices),
                _named(_answer(after, metric), choices),
            )
        )
    return found


def _answer(sample: Sample, metric: str) -> Any:
    """Return the answer that ``metric`` judges: acc_norm weighs the choices by their length."""
    likely = sample.loglikelihoods
    if metric != "acc_norm" or not likely:
        return sample.answer
    lengths = [max(1, len(choice)) for choice in sample.choices or ()]
    return max(range(len(likely)), key=lambda i: likely[i] / lengths[i])


def _named(answer: Any, choices: Sequence[str]) -> str:
    """Return an answer as text; a choice's number as the choice."""
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    return choices[answer] if is_number and 0 <= answer < len(choices) else str(answer)


def sign_test(lost: int, gained: int) -> float:
    """Return the probability of a split at least this uneven if both were equally good.

    McNemar's exact test: of ``lost + gained`` questions that flipped, each way is as likely.
    """
    flipped = lost + gained
    tail = sum(math.comb(flipped, k) for k in range(max(lost, gained), flipped + 1))
    return min(1.0, 2 * tail / 2**flipped) if flipped else 1.0
