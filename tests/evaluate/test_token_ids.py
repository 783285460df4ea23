"""Ids beyond the embedding end in one sentence before they reach a device; MPS has no float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode

from core.errors import DataError
from core.evaluate import zero_shot
from core.evaluate.perplexity import window_losses
from core.live.writing import prompt_ids
from core.model.tokens import check_ids, pad_id
from core.retrain.loss import row_losses
from core.retrain.rows import Row

OUTSIDE = "Token id 320 is outside the model's vocabulary of 320"


@pytest.fixture
def model():
    return tiny.model("gqa", vocab_size=320).eval()


def test_ids_are_checked_at_both_ends():
    check_ids([[0, 319], []], 320)
    with pytest.raises(DataError, match=OUTSIDE):
        check_ids([[1, 2], [3, 320]], 320)
    with pytest.raises(DataError, match="Token id -1 is outside"):
        check_ids([[-1, 2]], 320)


def test_filling_up_takes_an_id_that_the_model_has():
    bare = SimpleNamespace(pad_token_id=320, eos_token_id=2)
    assert pad_id(bare, 320) == 2
    assert pad_id(bare, 321) == 320
    assert pad_id(SimpleNamespace(pad_token_id=None, eos_token_id=None), 320) == 0


@pytest.fixture
def unasked(model):
    """A model whose forward pass must not be reached."""

    def forward(*_, **__):
        raise AssertionError("the ids reached the model")

    model.model.forward = forward
    return model


def test_perplexity_checks_before_the_device(unasked):
    with pytest.raises(DataError, match=OUTSIDE):
        window_losses(unasked, [[1, 320, 5, 6]])


def test_tasks_check_before_the_device(unasked):
    lm = zero_shot.harness_model(unasked, tiny.tokenizer(320), 2)
    lm.label = "demo"
    with pytest.raises(DataError, match=OUTSIDE):
        lm._loglikelihood_tokens([(("a", "b"), [1, 2], [320])])


def test_prompts_check_before_the_device(model):
    loaded = SimpleNamespace(
        tokenizer=SimpleNamespace(encode=lambda _: [1, 320]),
        info=SimpleNamespace(context=64),
        view=SimpleNamespace(model=model),
        name="tiny",
    )
    with pytest.raises(DataError, match=OUTSIDE):
        prompt_ids(loaded, SimpleNamespace(prompt="Ann", chat=False, max_tokens=4))


class OnMps(TorchFunctionMode):
    """Tensors are on a device without float64, until they are copied to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double and not hasattr(args[0], "on_cpu"):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            result = result.clone()
            result.on_cpu = True
        return result


def test_losses_are_summed_without_float64_on_the_device(model):
    rows = [Row((1, 5, 9, 7), (-100, 5, 9, 7))]
    windows = [[1, 5, 9, 7]]
    plain = window_losses(model, windows).nll, row_losses(model, rows, torch.device("cpu"))
    with pytest.raises(TypeError, match="float64"), OnMps():
        torch.ones(1).double()
    with OnMps():
        found = window_losses(model, windows).nll, row_losses(model, rows, torch.device("cpu"))
    assert found == plain
