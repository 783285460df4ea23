"""Comparison of two evaluated checkpoints: differences, their certainty, and flipped questions.

Both were evaluated on the same windows and the same questions, so differences are paired: the
common difficulty of a window or a question cancels out, and the standard error is that of the mean
difference. No torch here.
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
    """The second value minus the first, with the standard error of that difference."""

    value: float
    stderr: float | None
    pairs: int | None
    """Windows or questions compared one by one; None for an unpaired comparison."""

    @property
    def certain(self) -> bool:
        """Whether the difference is more than two standard errors from zero."""
        return self.stderr is not None and abs(self.value) > 2 * self.stderr


def perplexity_delta(first: Sequence[float], second: Sequence[float]) -> Delta | None:
    """Return the difference of perplexities from the mean losses of the same windows, in order.

    The standard error is first-order: perplexity is exp of the mean loss, so one window changes
    the difference by ppl2 * loss2 - ppl1 * loss1. Neighbouring windows of a text are not fully
    independent, so it is slightly too small. None if the windows cannot be paired.
    """
    if len(first) != len(second) or not first:
        return None
    before, after = (math.exp(statistics.fmean(losses)) for losses in (first, second))
    moved = [after * b - before * a for a, b in zip(first, second, strict=True)]
    return Delta(after - before, _error_of_mean(moved), len(moved))


def _error_of_mean(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired(
    first: Iterable[Sample], second: Iterable[Sample], task: str, metric: str = ""
) -> list[tuple[Sample, Sample]]:
    """Return the samples of ``task`` that both have: same index, filter and question.

    A ``metric`` that names its filter (``exact_match,strict-match``) has only that one's samples.
    """
    wanted = metric.partition(",")[2]

    def by_question(samples: Iterable[Sample]) -> dict[tuple[int, str, str], Sample]:
        mine = (s for s in samples if s.task == task and wanted in ("", s.filter))
        return {(s.index, s.filter, s.content): s for s in mine}

    before, after = by_question(first), by_question(second)
    return [(before[key], after[key]) for key in before if key in after]


def task_delta(
    first: Iterable[Sample], second: Iterable[Sample], task: str, metric: str
) -> Delta | None:
    """Return the mean difference of a metric over the questions that both were asked.

    None if they have no questions in common, or if the metric is not a number for each question,
    or not the mean of those numbers: a perplexity is not.
    """
    if not is_mean(metric):
        return None
    values = []
    for before, after in paired(first, second, task, metric):
        a, b = before.value(metric), after.value(metric)
        if a is None or b is None:
            return None
        values.append(b - a)
    if not values:
        return None
    return Delta(statistics.fmean(values), _error_of_mean(values), len(values))


def is_mean(metric: str) -> bool:
    """Whether a metric is the mean of its questions' values, as shares of right answers are."""
    return not any(word in metric for word in ("perplexity", "bits_per_byte"))


def unpaired_delta(first: tuple[float, float | None], second: tuple[float, float | None]) -> Delta:
    """Return the difference of two (value, standard error) that were measured independently."""
    errors = (first[1], second[1])
    known = [e for e in errors if e is not None]
    stderr = math.hypot(*known) if len(known) == 2 else None
    return Delta(second[0] - first[0], stderr, None)


@dataclass(frozen=True)
class Flip:
    """A question that only one of two checkpoints answers correctly."""

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
    """Return the questions whose value of ``metric`` (1 right, 0 wrong) differs."""
    found = []
    for before, after in paired(first, second, task, metric):
        a, b = before.value(metric), after.value(metric)
        if a is None or b is None or a == b:
            continue
        choices = _choices(before)
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


def right_in_words(sample: Sample) -> str:
    """Return the right answer of a question as text."""
    return _named(sample.target, _choices(sample))


def answer_in_words(sample: Sample, metric: str) -> str:
    """Return a model's answer to a question as text, as ``metric`` scores it."""
    return _named(_answer(sample, metric), _choices(sample))


def _choices(sample: Sample) -> tuple[str, ...]:
    return tuple(str(c).strip() for c in sample.choices or ())


def _answer(sample: Sample, metric: str) -> Any:
    """Return the answer that ``metric`` scores: acc_norm normalises by the choices' length."""
    likely = sample.loglikelihoods
    if metric != "acc_norm" or not likely:
        return sample.answer
    lengths = [max(1, len(choice)) for choice in sample.choices or ()]
    return max(range(len(likely)), key=lambda i: likely[i] / lengths[i])


def _named(answer: Any, choices: Sequence[str]) -> str:
    """Return an answer as text; the index of a choice becomes the choice."""
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    return choices[answer] if is_number and 0 <= answer < len(choices) else str(answer)


def sign_test(lost: int, gained: int) -> float:
    """Return the probability of a split at least this uneven if both were equally good.

    McNemar's exact test: each of the ``lost + gained`` flips is equally likely in either direction.
    """
    flipped = lost + gained
    tail = sum(math.comb(flipped, k) for k in range(max(lost, gained), flipped + 1))
    return min(1.0, 2 * tail / 2**flipped) if flipped else 1.0
