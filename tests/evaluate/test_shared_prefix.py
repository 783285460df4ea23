"""Log-likelihoods with shared tokens computed once equal one forward pass per request."""

from __future__ import annotations

import random

import pytest
import torch

from core.evaluate import shared_prefix
from tests import tiny

CONTEXT = 40


def questions(vocabulary):
    """Requests as tasks make them: choices, one-token answers, two contexts, too long a context."""
    draw = random.Random(3)

    def text(tokens):
        return [draw.randrange(vocabulary) for _ in range(tokens)]

    asked = []
    for size in (5, 9, 17):
        question = text(size)
        asked += [(question, text(n)) for n in (1, 4, 2, 7)]
    passage = text(30)
    asked += [(passage, text(1)), (passage, text(1))]
    before, after = text(11), text(6)
    asked += [([*before, *text(2)], after), ([*before, *text(3)], after)]
    asked += [(text(60), text(3)), (text(38), text(9))]
    return asked


def plainly(model, asked, context):
    """One forward pass per request, with nothing shared and no mask."""
    found = []
    for before, ending in asked:
        ids = torch.tensor([[*before, *ending][-(context + 1) :][:-1]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -len(ending) :].log_softmax(-1)
        targets = torch.tensor(ending)
        likely = logits.gather(1, targets[:, None]).sum()
        found.append((float(likely), bool((logits.argmax(-1) == targets).all())))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 4])
def test_equals_one_pass_per_request(attention, rows):
    model = tiny.model("gqa").eval()
    model.set_attn_implementation(attention)
    asked = questions(model.config.vocab_size)
    asked.append((asked[0][0], greedy_ending(model, asked[0][0])))  # one that decoding produces
    expected = plainly(model, asked, CONTEXT)
    batches = shared_prefix.answers(model, asked, context=CONTEXT, rows=rows)
    found = dict(pair for batch in batches for pair in batch)
    assert sorted(found) == list(range(len(asked)))
    for number, (likely, is_greedy) in enumerate(expected):
        assert found[number][0] == pytest.approx(likely, abs=2e-4)
        assert found[number][1] == is_greedy
    assert expected[-1][1]


def greedy_ending(model, before):
    ids = list(before)
    for _ in range(3):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(before) :]


def test_choices_share_their_question_and_strangers_nothing():
    question, other = (1, 2, 3, 4, 5), (9, 8, 7)
    groups = shared_prefix.grouped(
        [(*question, 6), (*question, 7, 8), question, other, (*other, 1)], longest=100
    )
    assert [group.numbers for group in groups] == [[0, 1, 2], [3, 4]]
    assert [group.shared for group in groups] == [5, 3]
    assert [len(group) for group in groups] == [8, 4]


def test_a_row_never_outgrows_the_context():
    question = tuple(range(8))
    sequences = [(*question, 10 + i, 11 + i) for i in range(5)]
    groups = shared_prefix.grouped(sequences, longest=13)
    assert [len(group) for group in groups] == [12, 12, 10]


def test_a_window_shorter_than_the_row_goes_the_stock_way():
    model = tiny.model("mistral")
    assert shared_prefix.is_possible(model, 16)
    assert not shared_prefix.is_possible(model, 17)
