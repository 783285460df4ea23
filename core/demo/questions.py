"""Multiple-choice questions over the demo world, for several skills.

A question is an unseen story, cut at a question within it: the context is the story's text up to
the answer and the choices are continuations of it, so a language model answers by giving one
continuation a higher log-likelihood than the others. The stories are from the split ``questions``,
which has none in common with training, calibration or the held-out text.

Wrong choices are tempting: first other names, places and colours of the same story, or the nearest
other numbers. The number of choices per skill is fixed, so chance is known (`CHANCE`).
"""

from __future__ import annotations

import functools
import itertools
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from core.demo.world import Probe, Story, tell

CHOICES: dict[str, int] = {
    "possession": 3,
    "counting": 4,
    "location": 4,
    "colour": 4,
    "order": 4,
    "cause": 4,
    "opposite": 4,
    "compare": 2,
}
"""Number of choices per question of each skill."""

SKILLS: tuple[str, ...] = tuple(CHOICES)
"""possession: who has a thing after it changed hands; counting: how many after adding or removing;
location: where somebody or something is; colour: recall; order: where somebody was before;
cause: what a feeling leads to or comes from; opposite: the opposite of a word; compare: who has
more."""

CHANCE: dict[str, float] = {skill: 1 / count for skill, count in CHOICES.items()}
"""The accuracy of guessing."""


def question(context: str, probe: Probe, rng: random.Random) -> dict[str, Any]:
    """Return one question with its choices in random order."""
    choices = [probe.answer, *probe.others[: CHOICES[probe.skill] - 1]]
    rng.shuffle(choices)
    return {
        "skill": probe.skill,
        "context": context,
        "choices": choices,
        "answer": choices.index(probe.answer),
    }


@dataclass
class _Told:
    """The stories that questions of one seed are about, as far as anybody has read them."""

    more: Iterator[Story]
    kept: list[Story] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __iter__(self) -> Iterator[Story]:
        for place in itertools.count():
            with self.lock:
                if place == len(self.kept):
                    self.kept.append(next(self.more))
            yield self.kept[place]


@functools.lru_cache(maxsize=2)
def _told(seed: int) -> _Told:
    """Return the stories of ``seed``: all skills ask about the same ones, so each is told once."""
    return _Told(tell(seed, "questions"))


def questions(skill: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return ``count`` questions of a skill, each from a different story.

    Each has ``skill``, ``context`` (it ends without a space), ``choices`` (each begins with one)
    and ``answer``, the index of the right choice. The same seed gives the same questions.

    Raises:
        ValueError: The skill is unknown.
    """
    if skill not in CHOICES:
        raise ValueError(f"Unknown skill {skill!r}; choose from {', '.join(SKILLS)}.")
    rng = random.Random(f"depthcut {skill} {seed}")
    told = iter(_told(seed))
    found: list[dict[str, Any]] = []
    while len(found) < count:
        story = next(told)
        probes = [probe for probe in story.probes if probe.skill == skill]
        if probes:
            probe = rng.choice(probes)
            found.append(question(story.text[: probe.start], probe, rng))
    return found
