"""Leaving blocks out without copying, against really smaller checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.errors import OptionError, PlanError
from core.model import loading, precision
from core.model.blocks import MODULES, BlockView
from core.prune import depth

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["mha", "gqa", "tied", "llama3", "mistral", "qwen2", "qwen3"])
def test_skipping_equals_the_pruned_checkpoint(tiny_dir: Any, tmp_path: Any, variant: str) -> None:
    folder = tiny_dir(variant)
    view = BlockView(loading.load_model(folder, CPU, torch.float32))
    ids = torch.arange(5, 29)[None]
    before = view.model(ids, use_cache=False).logits
    for number, drop in enumerate([(1,), (0, 3), (2, 1)]):
        target = tmp_path / str(number)
        depth.prune(folder, drop, target)
        pruned = loading.load_model(target, CPU, torch.float32)
        with view.skip(drop) as skipped:
            torch.testing.assert_close(
                skipped(ids, use_cache=False).logits, pruned(ids, use_cache=False).logits
            )
            ours = skipped.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        theirs = pruned.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert ours.tolist() == theirs.tolist()
    torch.testing.assert_close(view.model(ids, use_cache=False).logits, before)


def test_blocks_one_by_one_equal_the_model(tiny_dir: Any) -> None:
    for variant in ("gqa", "qwen2", "qwen3", "mistral"):
        view = BlockView(loading.load_model(tiny_dir(variant), CPU, torch.float32))
        ids = torch.arange(5, 45)[None].repeat(2, 1)
        hidden = view.embed(ids)
        for block in range(len(view)):
            hidden = view.run_block(block, hidden)
        torch.testing.assert_close(view.finish(hidden), view.model(ids, use_cache=False).logits)


def test_a_failure_inside_puts_everything_back(tiny_gqa: Any) -> None:
    view = BlockView(loading.load_model(tiny_gqa, CPU, torch.float32))

    def fail() -> None:
        with view.skip([1]):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert len(view) == view.config.num_hidden_layers == 5
    assert [layer.self_attn.layer_idx for layer in view.blocks] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("drop", "says"), [([7], "Block 7"), (range(5), "All 5")])
def test_impossible_sets(tiny_gqa: Any, drop: Any, says: str) -> None:
    view = BlockView(loading.load_model(tiny_gqa, CPU, torch.float32))
    with pytest.raises(PlanError, match=says), view.skip(drop):
        pass


def test_nine_weights_in_a_block(tiny_gqa: Any) -> None:
    view = BlockView(loading.load_model(tiny_gqa, CPU, torch.float32))
    names = dict(view.model.named_parameters())
    for weight in view.weights(2):
        assert names[weight.name] is weight.tensor
    assert len(view.weights(2)) == len(MODULES) == 9


def test_devices_and_dtypes_by_name() -> None:
    assert precision.resolve_device("cpu") == CPU
    assert precision.decide("auto", CPU, "bfloat16", "blocks").weights == torch.bfloat16
    assert precision.decide("auto", CPU, "float16", "blocks").weights == torch.float32
    with pytest.raises(OptionError, match="abacus"):
        precision.resolve_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="CUDA"):
            precision.resolve_device("cuda:1")
