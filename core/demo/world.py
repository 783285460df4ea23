"""Stories of a small world, generated: who has what, where, how many, and why.

A story is the log of a simulation. Three children walk about, find, give, lose and count things;
what the text says is always true of the simulated state, and now and then somebody asks about
that state (a *probe*: the place in the text where the answer can be worked out from what came
before). `core.demo.questions` turns the probes of unseen stories into multiple-choice questions.

Every random choice is uniform over options that are listed, so the log-probability of the path
of choices is known exactly (`Story.nats`). The text is a function of the path, so the mean of
``nats`` is an upper bound on the entropy of the text, and equals it where no two paths give the
same text.

Splits are disjoint by construction: a story belongs to the split that its text hashes to
(`bucket`), and each split throws away what hashes elsewhere. The seeds differ too.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from core.demo.lexicon import (
    ADULTS,
    ANIMALS,
    ANTICS,
    BOYS,
    COLOURS,
    COUNTABLES,
    DESCRIBED,
    EDIBLE,
    ENDINGS,
    GIRLS,
    NEEDS,
    NUMBERS,
    OPPOSITES,
    PETS,
    PLACES,
    SIGHTS,
    SIZES,
    SPOTS,
    THANKS,
    THINGS,
    TRAITS,
    WEATHER,
)

Split = Literal["train", "calibration", "heldout", "questions"]
BUCKETS: dict[str, range] = {
    "train": range(0, 88),
    "calibration": range(88, 92),
    "heldout": range(92, 96),
    "questions": range(96, 100),
}
"""Which hundredths of the hash space each split owns."""

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """A position in a story at which the text asks about the state of the world."""

    skill: str
    start: int
    """Offset of the answer in the story's text; what comes before is the context."""
    answer: str
    """The right continuation, with its leading space."""
    others: tuple[str, ...]
    """Wrong continuations, the most tempting (those seen in this story) first."""


@dataclass
class Child:
    """The state of one child in the simulation."""

    name: str
    girl: bool
    place: str
    before: str = ""
    kind: str = ""
    """The kind of countable thing that this child collects."""
    count: int = 0

    @property
    def he(self) -> str:
        """Return the pronoun of the subject."""
        return "she" if self.girl else "he"

    @property
    def him(self) -> str:
        """Return the pronoun of the object."""
        return "her" if self.girl else "him"

    @property
    def his(self) -> str:
        """Return the possessive pronoun."""
        return "her" if self.girl else "his"


@dataclass
class Thing:
    """One coloured thing; it has an owner, or lies at a place."""

    noun: str
    colour: str
    owner: Child | None = None
    place: str = ""

    @property
    def name(self) -> str:
        """Return the thing's full name, such as ``red ball``."""
        return f"{self.colour} {self.noun}"


@dataclass
class Story:
    """A story with the log-probability of its choices and its probes."""

    text: str = ""
    nats: float = 0.0
    """Negative log-probability of the path of choices."""
    probes: list[Probe] = field(default_factory=list)
    subject: str = ""
    """What the story is about, in a few words."""


def at(place: str) -> str:
    """Return a place with its preposition, such as ``in the garden``."""
    return f"{PLACES[place]} the {place}"


def a(words: str) -> str:
    """Return the words with the right indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def counted(number: int, noun: str) -> str:
    """Return a count with its noun, e.g. ``three apples``, ``one apple`` or ``no apples``."""
    if number == 1:
        return f"one {noun}"
    return f"{NUMBERS[number] if number else 'no'} {COUNTABLES[noun]}"


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[0].upper() + text[1:]


class Teller:
    """Tells one story. Every scene reads and changes the state, and narrates it."""

    def __init__(self, rng: random.Random) -> None:
        """Start with an empty page."""
        self.rng = rng
        self.story = Story()
        self.children: list[Child] = []
        self.things: list[Thing] = []
        self.asked: set[str] = set()

    # Choices and text.

    def pick(self, options: Sequence[T]) -> T:
        """Draw one option uniformly (duplicates count) and add its negative log-probability."""
        option = options[self.rng.randrange(len(options))]
        self.story.nats += math.log(len(options) / options.count(option))
        return option

    def say(self, *sentences: str) -> None:
        """Append sentences, separated by spaces."""
        for sentence in sentences:
            self.story.text += (" " if self.story.text else "") + sentence

    def ask(self, skill: str, before: str, answer: str, after: str, others: Sequence[str]) -> None:
        """Append a question with its answer, and remember where the answer starts."""
        self.say(before)
        wrong = tuple(f" {other}" for other in dict.fromkeys(others) if other != answer)
        self.story.probes.append(Probe(skill, len(self.story.text), f" {answer}", wrong))
        self.story.text += f" {answer}{after}"

    def other(self, *known: Child) -> Child:
        """Return a child that is not one of those known."""
        return self.pick([child for child in self.children if child not in known])

    def asker(self, *known: Child) -> str:
        """Return who asks: an adult, or a child that is not one of those known."""
        return self.pick([c.name for c in self.children if c not in known] + ADULTS[:3])

    def names(self) -> list[str]:
        """Return the names of the children."""
        return [child.name for child in self.children]

    def places(self) -> list[str]:
        """Return all places with prepositions, those of this story first."""
        seen = [at(p) for c in self.children for p in (c.place, c.before) if p]
        return seen + [at(place) for place in PLACES]

    def colours(self) -> list[str]:
        """Return all colours, those of this story first."""
        return [thing.colour for thing in self.things] + COLOURS

    # The beginning.

    def open(self) -> None:
        """Introduce the children, where they are, and what they have."""
        for _ in range(3):
            taken = self.names()
            name = self.pick([n for n in GIRLS + BOYS if n not in taken])
            self.children.append(Child(name, name in GIRLS, ""))
        first, second, third = self.children
        kind = "girl" if first.girl else "boy"
        trait = self.pick(TRAITS)
        self.say(
            self.pick(
                [
                    f"Once upon a time there was a {trait} {kind} named {first.name}.",
                    f"There was once a {trait} {kind} who was called {first.name}.",
                    f"This is the story of {first.name}, a {trait} {kind}.",
                ]
            ),
            self.pick(
                [
                    f"{capital(first.his)} best friends were {second.name} and {third.name}.",
                    f"{first.name} liked to play with {second.name} and {third.name}.",
                ]
            ),
            self.pick(WEATHER),
        )
        for child in self.children:
            child.place = self.pick(list(PLACES))
            there = [c.name for c in self.children[:3] if c is not child and c.place == child.place]
            too = f" with {there[0]}" if there else ""
            self.say(f"{child.name} was {at(child.place)}{too}.")
        self.gain(first, f"{first.name} had")
        self.gain(self.pick([second, third]), "")
        self.story.subject = f"{first.name} and {a(self.things[0].name)}"

    def gain(self, child: Child, start: str) -> None:
        """Give a child a new thing, and narrate it."""
        nouns = [thing.noun for thing in self.things]
        noun = self.pick([n for n in THINGS if n not in nouns])
        thing = Thing(noun, self.pick(COLOURS), child)
        self.things.append(thing)
        self.say(f"{start or child.name + ' had'} {a(thing.name)}.")

    # Scenes. Each returns False if the state does not allow it.

    def walk(self, child: Child | None = None, place: str = "") -> bool:
        """Let a child go somewhere else."""
        child = child or self.pick(self.children)
        place = place or self.pick([p for p in PLACES if p != child.place])
        child.before, child.place = child.place, place
        verb = self.pick(["went", "walked", "ran", "came"])
        self.say(f"{self.pick(['Then', 'Soon', 'After that'])} {child.name} {verb} to the {place}.")
        if self.pick([True, False]):
            self.say(self.pick(SIGHTS[place]))
        return True

    def meet(self, child: Child, host: Child) -> None:
        """Bring a child to where another is."""
        if child.place == host.place:
            self.say(f"{child.name} looked at {host.name} and smiled.")
            return
        self.walk(child, host.place)
        self.say(f"{child.name} saw {host.name} there.")

    def find(self) -> bool:
        """Let a child find a new thing."""
        if len(self.things) > 4:
            return False
        child = self.pick(self.children)
        nouns = [thing.noun for thing in self.things]
        thing = Thing(self.pick([n for n in THINGS if n not in nouns]), self.pick(COLOURS), child)
        self.things.append(thing)
        self.say(
            f"{capital(at(child.place))}, {child.name} found {a(thing.name)} {self.pick(SPOTS)}.",
            self.pick(
                [
                    f"{capital(child.he)} took the {thing.noun} and looked at it.",
                    f'"What a nice {thing.noun}!" said {child.name}, and {child.he} kept it.',
                ]
            ),
        )
        return True

    def give(self) -> bool:
        """Let the owner of a thing give it to somebody."""
        owned = [thing for thing in self.things if thing.owner]
        if not owned:
            return False
        thing = self.pick(owned)
        giver = thing.owner
        assert giver is not None
        taker = self.other(giver)
        self.meet(giver, taker)
        verb = self.pick(["gave", "handed", "passed"])
        self.say(f"{giver.name} {verb} the {thing.name} to {taker.name}.")
        thing.owner = taker
        if self.pick([True, False]):
            self.say(f'"{self.pick(THANKS)}!" said {taker.name}.')
        self.asked.discard(thing.noun)
        return True

    def leave(self) -> bool:
        """Let a child put a thing down where it is."""
        owned = [thing for thing in self.things if thing.owner]
        if not owned:
            return False
        thing = self.pick(owned)
        child = thing.owner
        assert child is not None
        thing.owner, thing.place = None, child.place
        self.say(
            self.pick(
                [
                    f"{child.name} left the {thing.name} {at(child.place)}.",
                    f"{child.name} forgot the {thing.name} {at(child.place)}.",
                ]
            )
        )
        self.asked.discard(thing.noun)
        return self.walk(child)

    def fetch(self) -> bool:
        """Let a child pick up a thing that lies somewhere."""
        lying = [thing for thing in self.things if not thing.owner]
        if not lying:
            return False
        thing, child = self.pick(lying), self.pick(self.children)
        if child.place != thing.place:
            self.walk(child, thing.place)
        self.say(f"There {child.name} picked up the {thing.name}.")
        thing.owner, thing.place = child, ""
        self.asked.discard(thing.noun)
        return True

    def collect(self, child: Child) -> None:
        """Start a collection for a child that has none."""
        if child.kind:
            return
        used = [c.kind for c in self.children]
        child.kind = self.pick([k for k in COUNTABLES if k not in used])
        child.count = self.pick(range(2, 7))
        box = self.pick(["in a bag", "in a jar", "in a basket"])
        self.say(f"{child.name} had {counted(child.count, child.kind)} {box}.")

    def count(self) -> bool:
        """Let a child's collection grow or shrink, then ask how many there are."""
        child = self.pick(self.children)
        self.collect(child)
        change = self.pick([1, 2, 3])
        less = child.count - change >= 1 and (child.count + change > 12 or self.pick([True, False]))
        if not less and child.count + change > 12:
            return False
        if less:
            verb = "ate" if child.kind in EDIBLE and self.pick([True, False]) else "lost"
            self.say(f"{child.name} {verb} {counted(change, child.kind)}.")
            child.count -= change
        else:
            gain = self.pick(
                [
                    f"{child.name} found {NUMBERS[change]} more.",
                    f"{self.other(child).name} gave {child.name} {NUMBERS[change]} more.",
                ]
            )
            self.say(gain)
            child.count += change
        noun = COUNTABLES[child.kind] if child.count != 1 else child.kind
        near = sorted(range(1, 13), key=lambda n: (abs(n - child.count), n))
        self.ask(
            "counting",
            f'"How many {COUNTABLES[child.kind]} do you have now?" asked {self.asker(child)}. '
            '"I have',
            NUMBERS[child.count],
            f' {noun}," said {child.name}.',
            [NUMBERS[n] for n in near],
        )
        return True

    def compare(self) -> bool:
        """Ask which of two children has more."""
        one = self.pick(self.children)
        two = self.other(one)
        if one.count == two.count and one.count:
            return False
        self.collect(one)
        self.collect(two)
        if one.count == two.count:
            return False
        more, less = (one, two) if one.count > two.count else (two, one)
        self.ask(
            "compare",
            f"{one.name} had {NUMBERS[one.count]} and {two.name} had {NUMBERS[two.count]}, "
            "so the one who had more was",
            more.name,
            ".",
            [less.name],
        )
        return True

    def need(self) -> bool:
        """Let a feeling have its consequence, and sometimes ask why."""
        child = self.pick(self.children)
        feeling = self.pick(list(NEEDS))
        did, do = NEEDS[feeling]
        wrong = [f for f in NEEDS if f != feeling]
        self.rotate(wrong)
        form = self.pick(range(3))
        if form == 0:
            self.ask(
                "cause",
                f"{child.name} was very {feeling}, so {child.he}",
                did,
                ".",
                [NEEDS[f][0] for f in wrong],
            )
        elif form == 1:
            self.ask(
                "cause",
                f'{child.name} {did}. "Why did you {do}?" asked {self.asker(child)}. "I was',
                feeling,
                f'," said {child.name}.',
                wrong,
            )
        else:
            self.ask(
                "cause",
                f'"I am so {feeling}," said {child.name}. Then {child.he}',
                did,
                ".",
                [NEEDS[f][0] for f in wrong],
            )
        return True

    def rotate(self, options: list[T]) -> None:
        """Rotate a list of wrong answers by an amount that depends only on the text."""
        turn = len(self.story.text) % len(options)
        options[:] = options[turn:] + options[:turn]

    def opposite(self) -> bool:
        """Ask about a quality, and answer with its opposite."""
        noun = self.pick(list(DESCRIBED))
        word = self.pick(DESCRIBED[noun])
        if self.pick([True, False]):
            word, answer = OPPOSITES[word], word
        else:
            answer = OPPOSITES[word]
        child = self.pick(self.children)
        wrong = [w for pair in OPPOSITES.items() for w in pair if w not in (word, answer)]
        self.rotate(wrong)
        self.ask(
            "opposite",
            f'"Is the {noun} {word}?" asked {self.asker(child)}. "No, it is not {word}. It is',
            answer,
            f'," said {child.name}.',
            wrong,
        )
        return True

    def who(self) -> bool:
        """Ask who has a thing."""
        owned = [t for t in self.things if t.owner and t.noun not in self.asked]
        if not owned:
            return False
        thing = self.pick(owned)
        assert thing.owner is not None
        self.asked.add(thing.noun)
        self.ask(
            "possession",
            f'"Who has the {thing.name}?" asked {self.pick(ADULTS)}. The {thing.noun} was with',
            thing.owner.name,
            ".",
            self.names(),
        )
        return True

    def where(self) -> bool:
        """Ask where a child is, or a thing that lies somewhere."""
        lying = [thing for thing in self.things if not thing.owner]
        if bool(lying) and self.pick([True, False]):
            thing = self.pick(lying)
            question, place = f"the {thing.name}", thing.place
        else:
            child = self.pick(self.children)
            question, place = child.name, child.place
        self.ask(
            "location",
            f'"Where is {question}?" asked {self.pick(ADULTS)}. They all looked',
            at(place),
            ".",
            self.places(),
        )
        return True

    def colour(self) -> bool:
        """Ask for a thing's colour."""
        thing = self.pick(self.things)
        child = self.pick(self.children)
        self.ask(
            "colour",
            f'"What colour is the {thing.noun}?" asked {self.asker(child)}. "It is',
            thing.colour,
            f'," said {child.name}.',
            self.colours(),
        )
        return True

    def order(self) -> bool:
        """Ask where a child was before it came to where it is."""
        moved = [child for child in self.children if child.before]
        if not moved:
            return False
        child = self.pick(moved)
        self.ask(
            "order",
            f'"Where were you before you came to the {child.place}, {child.name}?" '
            f'asked {self.asker(child)}. "I was',
            at(child.before),
            '."',
            [at(child.place), *self.places()],
        )
        return True

    def animal(self) -> bool:
        """Let an animal pass by."""
        if "animal" in self.asked:
            return False
        self.asked.add("animal")
        child, kind = self.pick(self.children), self.pick(ANIMALS)
        coat = f"{self.pick(SIZES)} {self.pick(COLOURS)} {kind}"
        pet, antic = self.pick(PETS), self.pick(ANTICS)
        self.say(
            f"{child.name} met {a(coat)} whose name was {pet}.",
            f"The {kind} {antic}.",
            self.pick(
                [
                    f'"Look at {pet}!" said {child.name}, and everyone laughed.',
                    f"{child.name} liked the {kind} very much and called {pet} again.",
                    f'"Good {kind}," said {child.name}.',
                ]
            ),
        )
        return True

    def close(self) -> None:
        """Sum up who has what, and end."""
        child = self.pick(self.children)
        have = [thing.name for thing in self.things if thing.owner is child]
        had = " and ".join(f"the {name}" for name in have) if have else "nothing to carry"
        self.say(f"In the evening {child.name} had {had}.", self.pick(ENDINGS), "The end.")

    def tell(self) -> Story:
        """Tell the whole story: an opening, some scenes with questions, an end."""
        self.open()
        scenes: list[Callable[[], bool]] = [
            self.walk, self.find, self.give, self.leave, self.fetch, self.count, self.count,
            self.animal, self.need,
        ]  # fmt: skip
        questions: list[Callable[[], bool]] = [
            self.who, self.who, self.where, self.colour, self.order, self.opposite, self.compare,
        ]  # fmt: skip
        for _ in range(self.pick([3, 4, 5])):
            if self.pick(scenes)():
                self.pick(questions)()
        self.close()
        return self.story


def bucket(text: str) -> int:
    """Return the hundredth of the hash space that a text falls into."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


def tell(seed: int, split: Split) -> Iterator[Story]:
    """Yield the stories of a split without end; the same seed gives the same stories.

    Raises:
        ValueError: There is no such split.
    """
    if split not in BUCKETS:
        raise ValueError(f"There is no split {split!r}; there are {', '.join(BUCKETS)}.")
    rng = random.Random(f"depthcut {split} {seed}")
    while True:
        story = Teller(rng).tell()
        if bucket(story.text) in BUCKETS[split]:
            yield story


def stories(count: int, seed: int, split: Split = "train") -> list[str]:
    """Return the texts of ``count`` stories, one line each."""
    told = tell(seed, split)
    return [next(told).text for _ in range(count)]


def entropy(count: int, seed: int, split: Split = "heldout") -> float:
    """Return the mean of minus the log-probability of a story's choices, in nats per story.

    It bounds the entropy of a story from above. Sorting into splits changes it by next to
    nothing: a split holds a random share of all stories, whatever their probability.
    """
    told = tell(seed, split)
    return sum(next(told).nats for _ in range(count)) / count


def instructions(count: int, seed: int, split: Split = "train") -> list[dict[str, str]]:
    """Return tasks over the same world with their answers, short and long ones mixed.

    Each has ``instruction``, ``input`` and ``output``: questions about a story, the wording of
    the story cut before the answer; the rest of a story; a new story on a subject; a word's
    opposite.
    """
    told = tell(seed, split)
    rng = random.Random(f"depthcut instructions {split} {seed}")
    tasks: list[dict[str, str]] = []
    while len(tasks) < count:
        story = next(told)
        kind = rng.choice(["question", "question", "continue", "story", "opposite"])
        if kind == "question" and story.probes:
            probe = rng.choice(story.probes)
            given = story.text[: probe.start]
            rest = story.text[probe.start :].strip()
            tasks.append(
                {
                    "instruction": "Complete the last sentence of the story.",
                    "input": given,
                    "output": rest[: rest.find(".") + 1],
                }
            )
        elif kind == "continue":
            cut = story.text.find(". ", len(story.text) // 2) + 1
            tasks.append(
                {
                    "instruction": "Finish the story.",
                    "input": story.text[:cut],
                    "output": story.text[cut:].strip(),
                }
            )
        elif kind == "story":
            tasks.append(
                {
                    "instruction": f"Write a story about {story.subject}.",
                    "input": "",
                    "output": story.text,
                }
            )
        elif kind == "opposite":
            pair = list(rng.choice(list(OPPOSITES.items())))
            rng.shuffle(pair)
            tasks.append(
                {
                    "instruction": f"What is the opposite of {pair[0]}?",
                    "input": "",
                    "output": f"It is {pair[1]}.",
                }
            )
    return tasks
