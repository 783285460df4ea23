"""Decoding in batches against transformers' generate, and against one prompt at a time."""

from __future__ import annotations

import pytest
import torch

from core.errors import NotFiniteError
from core.model import decode
from core.model.loading import load_model

PROMPTS = [[1, 40, 41, 42, 43, 44, 45, 46, 47], [1, 50], [1, 60, 61, 62, 63], [1, 7]]
MOST = 40


@pytest.fixture(scope="module", params=["gqa", "mistral", "qwen2", "qwen3"])
def model(request, tiny_dir):
    """A tiny model; all but the first have blocks with a sliding window of 16 tokens."""
    return load_model(tiny_dir(request.param), torch.device("cpu"), torch.float32)


def stock(model, prompts, most=MOST, ends=()):
    """What transformers' generate writes after each prompt, one prompt at a time."""
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=most, do_sample=False, pad_token_id=0,
            eos_token_id=list(ends) or None,
        )  # fmt: skip
        new = out[0, len(prompt) :].tolist()
        found.append(new[:-1] if new and new[-1] in ends else new)
    return found


def test_greedy_text_is_that_of_transformers(model):
    model.generation_config.eos_token_id = None
    plain = stock(model, PROMPTS)
    # an end token that some rows write early, so that rows leave the batch at different times
    end = plain[0][5]
    for ends in (set(), {end}):
        found = decode.decode(model, PROMPTS, most=MOST, ends=ends)
        assert [list(one.ids) for one in found] == stock(model, PROMPTS, ends=ends)
        assert {one.why for one in found} <= {"end", "limit"}
    assert found[0].why == "end"
    assert len(found[0].ids) <= 5


def test_drawn_tokens_do_not_depend_on_the_rows_beside_them(model):
    def write(numbers):
        pick = decode.sampler(0.8, 3, numbers)
        prompts = [PROMPTS[number] for number in numbers]
        return [one.ids for one in decode.decode(model, prompts, most=12, ends=(), pick=pick)]

    together = write([0, 1, 2, 3])
    assert [write([number])[0] for number in range(4)] == together
    assert together != [one.ids for one in decode.decode(model, PROMPTS, most=12, ends=())]


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    rows = 4000
    pick = decode.sampler(2.0, 1, range(rows))
    found = pick(logits.expand(rows, -1), range(rows))
    shares = torch.bincount(found, minlength=4) / rows
    assert torch.allclose(shares, torch.softmax(logits[0] / 2, -1), atol=0.03)
    assert shares[3] == 0


def test_a_row_that_is_stopped_leaves_and_the_others_go_on(tiny_dir):
    model = load_model(tiny_dir("gqa"), torch.device("cpu"), torch.float32)

    def stop(row, ids):
        return "loop" if row == 1 and len(ids) == 3 else ""

    found = decode.decode(model, PROMPTS, most=10, ends=(), stop=stop)
    assert [len(one.ids) for one in found] == [10, 3, 10, 10]
    assert [one.why for one in found] == ["limit", "loop", "limit", "limit"]
    assert list(found[2].ids) == stock(model, PROMPTS, most=10)[2]


def test_a_broken_model_is_an_error(tiny_dir):
    model = load_model(tiny_dir("gqa"), torch.device("cpu"), torch.float32)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        decode.decode(model, PROMPTS, most=2, ends=())
