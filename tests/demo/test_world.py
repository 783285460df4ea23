"""The generator: determinism, disjoint splits, and truth checked by reading the text anew."""

import functools
import math
import re
from pathlib import Path

import pytest

from core.demo import questions as questions_module
from core.demo.lexicon import COUNTABLES, NEEDS, NUMBERS, OPPOSITES
from core.demo.questions import CHANCE, CHOICES, SKILLS, questions
from core.demo.world import BUCKETS, Teller, entropy, instructions, stories, tell

SINGULAR = {plural: noun for noun, plural in COUNTABLES.items()}
PLACE = r"((?:in|at|by|on) the \w+)"


def test_same_seed_same_stories_and_another_seed_others():
    first = stories(20, 3, "train")
    assert first == stories(20, 3, "train")
    assert first[:5] == stories(5, 3, "train")
    assert not set(first) & set(stories(20, 4, "train"))


def test_splits_share_no_story():
    texts = {split: set(stories(100, 1, split)) for split in BUCKETS}
    for one in BUCKETS:
        assert len(texts[one]) == 100
        for two in BUCKETS:
            assert one == two or not texts[one] & texts[two]


def test_question_contexts_are_no_beginning_of_a_training_story():
    train = "\n" + "\n".join(stories(500, 1234, "train"))
    for skill in SKILLS:
        assert not any("\n" + one["context"] in train for one in questions(skill, 8, 0))


def test_an_unknown_split_or_skill_is_named():
    with pytest.raises(ValueError, match="no split 'test'"):
        stories(1, 0, "test")
    with pytest.raises(ValueError, match="Unknown skill 'flying'"):
        questions("flying", 1, 0)


def test_stories_are_single_lines_of_plain_text():
    for text in stories(60, 2, "heldout"):
        assert "\n" not in text
        assert "  " not in text
        assert text.endswith("The end.")
        assert text.isascii()
        assert 50 < len(text.split()) < 350


def test_entropy_counts_the_choices(monkeypatch):
    """An independent count: the logarithm of every draw that ``Teller.pick`` makes."""
    drawn = []
    pick = Teller.pick

    def spy(self, options):
        option = pick(self, options)
        same = sum(1 for other in options if other == option)
        drawn.append(math.log(len(options)) - math.log(same))
        return option

    monkeypatch.setattr(Teller, "pick", spy)
    story = next(tell(5, "train"))
    total = 0.0
    for nats in reversed(drawn):
        total += nats
        if total >= story.nats - 1e-9:
            break
    assert total == pytest.approx(story.nats)
    assert entropy(50, 0) == pytest.approx(
        sum(s.nats for s, _ in zip(tell(0, "heldout"), range(50), strict=False)) / 50
    )


def test_questions_are_deterministic_and_well_formed():
    assert len(SKILLS) >= 5
    for skill in SKILLS:
        some = questions(skill, 12, 9)
        assert some == questions(skill, 12, 9)
        assert len({one["context"] for one in some}) == 12
        for one in some:
            assert set(one) == {"skill", "context", "choices", "answer"}
            assert one["skill"] == skill
            assert len(set(one["choices"])) == CHOICES[skill] == round(1 / CHANCE[skill])
            assert 0 <= one["answer"] < CHOICES[skill]
            assert all(choice.startswith(" ") for choice in one["choices"])
            assert not one["context"].endswith(" ")


@functools.cache
def drawn(skill):
    """Questions that two tests look at."""
    return questions(skill, 120, 11)


@pytest.mark.parametrize("skill", SKILLS)
def test_right_answers_stand_at_every_position(skill):
    places = [one["answer"] for one in drawn(skill)]
    for place in range(CHOICES[skill]):
        assert places.count(place) > 120 / CHOICES[skill] * 0.5


# Answers found by reading the text, with nothing of the simulation.


def owner(text, thing):
    """Return who has a thing at the end of a text."""
    noun = thing.split()[-1]
    holder = None
    pattern = (
        rf"(?P<giver>\w+) (?:gave|handed|passed) the {thing} to (?P<taker>\w+)"
        rf"|(?P<finder>\w+) found an? {thing} "
        rf"|(?P<first>\w+) had an? {thing}\."
        rf"|There (?P<picker>\w+) picked up the {thing}"
        rf"|(?P<loser>\w+) (?:left|forgot) the {thing} "
    )
    assert noun
    for match in re.finditer(pattern, text):
        groups = match.groupdict()
        holder = groups["taker"] or groups["finder"] or groups["first"] or groups["picker"]
    return holder


def place_of_thing(text, thing):
    """Return where a thing was left last."""
    return re.findall(rf"(?:left|forgot) the {thing} {PLACE}", text)[-1]


def way(text, name):
    """Return the places where a child was, in order, by their nouns."""
    pattern = rf"\b{name} (?:was (?:in|at|by|on)|(?:went|walked|ran|came) to) the (\w+)"
    return re.findall(pattern, text)


def tally(text, name, noun):
    """Return how many a child has at the end of a text."""
    total = None
    for sentence in re.split(r'(?<=[.!?])"? ', text):
        one = COUNTABLES[noun]
        start = re.fullmatch(rf"{name} had (\w+) {one} in a \w+\.", sentence)
        more = re.fullmatch(rf"(?:{name} found|\w+ gave {name}) (\w+) more\.", sentence)
        less = re.fullmatch(rf"{name} (?:ate|lost) (\w+) (?:{one}|{noun})\.", sentence)
        if start:
            total = NUMBERS.index(start[1])
        elif more:
            total += NUMBERS.index(more[1])
        elif less:
            total -= NUMBERS.index(less[1])
    return total


def collection(text, name):
    """Return the noun that a child collects."""
    return SINGULAR[re.search(rf"\b{name} had \w+ (\w+) in a \w+\.", text)[1]]


def read_possession(text):
    return owner(text, re.findall(r'Who has the (\w+ \w+)\?"', text)[-1])


def read_counting(text, asked):
    noun = SINGULAR[asked]
    name = re.search(rf"(\w+) had \w+ {asked} in a", text)[1]
    return NUMBERS[tally(text, name, noun)]


def read_location(text):
    asked = re.findall(r'"Where is ([\w ]+)\?"', text)[-1]
    if asked.startswith("the "):
        return place_of_thing(text, asked[4:])
    return way(text, asked)[-1]


def read_colour(text):
    noun = re.findall(r'"What colour is the (\w+)\?"', text)[-1]
    return re.search(rf"(?:had|found) an? (\w+) {noun}\b", text)[1]


def read_order(text):
    name = re.findall(r'you came to the \w+, (\w+)\?"', text)[-1]
    return way(text, name)[-2]


def read_cause(text):
    done = {did: feeling for feeling, (did, _) in NEEDS.items()}
    why = re.search(r'\w+ ([\w ]+)\. "Why did you [\w ]+\?" asked [\w ]+\. "I was$', text)
    if why:
        return done[why[1]]
    feeling = re.findall(r"(?:was very|I am so) (\w+),", text)[-1]
    return NEEDS[feeling][0]


def read_opposite(text):
    word = re.findall(r"No, it is not (\w+)\. It is$", text)[-1]
    return {**OPPOSITES, **{b: a for a, b in OPPOSITES.items()}}[word]


def read_compare(text):
    names = re.findall(r"(\w+) had \w+ and (\w+) had \w+, so the one who had more was$", text)[-1]
    return max(names, key=lambda name: tally(text, name, collection(text, name)))


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_right_by_reading_the_text(skill):
    for one in drawn(skill)[:60]:
        text = one["context"]
        right = one["choices"][one["answer"]].strip()
        if skill == "counting":
            asked = re.findall(r'"How many (\w+) do you have now', text)[-1]
            found = read_counting(text, asked)
        else:
            found = globals()[f"read_{skill}"](text)
        if skill in ("location", "order"):
            found, right = found.split()[-1], right.split()[-1]
        assert found == right, text


def test_instructions_are_deterministic_and_mixed():
    tasks = instructions(100, 4, "train")
    assert tasks == instructions(100, 4, "train")
    assert {tuple(task) for task in tasks} == {("instruction", "input", "output")}
    lengths = [len(task["output"].split()) for task in tasks]
    assert min(lengths) < 5
    assert max(lengths) > 100
    assert len({task["instruction"].split()[0] for task in tasks}) == 4
    assert all(task["output"] and task["output"] == task["output"].strip() for task in tasks)
    texts = {task["output"] for task in tasks if task["instruction"].startswith("Write")}
    assert texts
    heldout = instructions(100, 4, "heldout")
    assert not texts & {task["output"] for task in heldout}


def test_module_says_what_each_skill_asks():
    documented = Path(questions_module.__file__).read_text()
    assert all(f"{skill}:" in documented for skill in SKILLS)
