"""The loss in pieces against the loss of all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from core.retrain import head, layers, loss, teacher
from core.retrain.rows import Row
from core.retrain.spec import Goal
from core.retrain.trainer import Objective

CPU = torch.device("cpu")
GOALS = {
    "ce": Goal(True, 0.0, 0),
    "kl": Goal(False, 1.0, 16),
    "both": Goal(True, 0.5, 16),
    "live": Goal(False, 1.0, 0),
}


@pytest.fixture(scope="module")
def pair(tiny_dir):
    """A model, and another one in the role of the dense model."""
    return [
        AutoModelForCausalLM.from_pretrained(tiny_dir(name)).train() for name in ("gqa", "tied")
    ]


@pytest.fixture
def batch():
    chance = torch.Generator().manual_seed(8)
    lengths = (9, 30, 17)
    ids = [torch.randint(5, 250, (length,), generator=chance).tolist() for length in lengths]
    made = loss.collate([(Row(tuple(row), tuple(row)),) for row in ids])
    return made | {"items": 70}


def outcome(model, batch, objective):
    model.zero_grad()
    found, reported = objective(model, batch)
    (3 * found).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found.detach(), reported, gradients


@pytest.mark.parametrize("name", GOALS)
@pytest.mark.parametrize("frozen", [False, True])
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(
    pair, batch, monkeypatch, name, frozen
):
    model, dense = pair
    model.lm_head.requires_grad_(not frozen)
    with torch.no_grad():
        kept = teacher.largest(loss.predicted_logits(dense, batch)[0], 16)
    batch |= dict(zip(teacher.NAMES, kept, strict=True))
    live = dense if name == "live" else None
    objective = Objective(CPU, None, live, GOALS[name])
    monkeypatch.setattr(layers, "PIECE_BYTES", 4 * model.config.vocab_size * 13)
    mine = outcome(model, batch, objective)
    monkeypatch.setattr(head, "in_pieces", lambda *_: None)
    whole = outcome(model, batch, objective)
    for one, other in zip(mine[:2], whole[:2], strict=True):
        torch.testing.assert_close(one, other)
    assert mine[2].keys() == whole[2].keys()
    assert ("lm_head.weight" in mine[2]) is not frozen
    for key, gradient in whole[2].items():
        most = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(mine[2][key], gradient, rtol=1e-4, atol=most, msg=key)


def test_a_bias_has_its_gradient(monkeypatch):
    monkeypatch.setattr(layers, "PIECE_BYTES", 4 * 11 * 3)
    output, states = nn.Linear(5, 11), torch.randn(8, 5, requires_grad=True)
    targets = torch.arange(8)

    def of(logits, piece):
        found = nn.functional.cross_entropy(logits, targets[piece], reduction="sum")
        return found, found

    objective, _ = head.in_pieces(states, output, of, None)
    wanted = [states, output.weight, output.bias]
    mine = torch.autograd.grad(objective, wanted)
    whole = torch.autograd.grad(of(output(states), slice(None))[0], wanted)
    for one, other in zip(mine, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_not_a_plain_matrix_is_left_to_the_caller():
    states = torch.randn(8, 5)
    assert head.in_pieces(states, nn.Bilinear(5, 5, 11), None, None) is None
    assert head.in_pieces(states, nn.Linear(5, 11), None, torch.float16) is None
