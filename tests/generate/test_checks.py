"""Which of a model's own answers are kept."""

from __future__ import annotations

import pytest

from core.data.diversity import Diversity, diversity_of, loops, repetition
from core.generate.checks import answers, final_answer, problem

WORK = "She sells 16 - 7 = 9 eggs.\n#### 18"
LONG = "The quick brown fox jumps over the lazy dog near the river bank."


def why(own, reference="", check="answer", how="end", ids=None, open_ended=False):
    ids = list(range(len(own.split()))) if ids is None else ids
    return problem(own, ids, how, reference, check, open_ended=open_ended)


@pytest.mark.parametrize(
    ("own", "reference", "found"),
    [
        ("9 times 2 is $18.", WORK, ""),
        ("So it is 18.00 dollars", WORK, ""),
        ("#### 18", WORK, ""),
        ("First 18, then 19.", WORK, "other"),
        ("I do not know.", WORK, "other"),
        ("It is \\boxed{1,000}.", "Thus \\boxed{1000}", ""),
        ("The answer is 7 apples.", "The answer is 7.", ""),
        ("Ben.", "ben", ""),
        ("Well. The scarf was with Ben.", "Ben", ""),
        ("The scarf was with Bob.", "Ben", "other"),
        ("Benjamin", "Ben", "other"),
        ("  ", "Ben", "empty"),
    ],
)
def test_the_final_answer_decides_if_the_reference_has_one(own, reference, found):
    assert why(own, reference) == found


def test_without_a_final_answer_length_and_repetition_decide():
    assert final_answer(LONG) == ""
    assert why("A fox jumps over a dog by the river.", LONG) == ""
    assert why("A fox.", LONG) == "short"
    assert why(" ".join(f"word{i}" for i in range(60)), LONG) == "long"
    assert why(LONG, LONG, how="limit") == "endless"
    assert why(LONG, LONG, how="limit", open_ended=True) == ""
    assert why(LONG, LONG, how="loop") == "repeats"
    assert why(LONG, LONG, ids=[1, 2, 3, 4] * 5) == "repeats"


def test_no_check_keeps_whatever_is_not_empty():
    for how in ("limit", "loop"):
        assert why("x x x x", LONG, "none", how) == ""
    assert why(" ", LONG, "none") == "empty"


def test_the_length_check_does_not_look_at_the_final_answer():
    assert why("First 18, then 19.", WORK, "length") == ""


def test_a_number_is_not_part_of_another():
    assert answers("118", "18") is False
    assert answers("It costs -3.50", "-3.5")


def test_length_variety_and_repetition_by_hand():
    assert diversity_of([]) == Diversity()
    found = diversity_of(["a b a b a b", "c"])
    assert (found.texts, found.words) == (2, 3.5)
    assert found.distinct_1 == 3 / 7
    assert found.distinct_2 == 2 / 5
    assert found.distinct_3 == 2 / 4
    assert found.repetition == repetition("ababab") == 1 - 2 / 3
    assert repetition("abc") is None


def test_a_loop_is_an_exact_repetition_at_the_end():
    assert loops([9, 9, *[1, 2, 3] * 16])
    assert not loops([*[1, 2, 3] * 16, 4])
    assert not loops([1, 2, 3] * 15)
    assert not loops(list(range(17)) * 4)
