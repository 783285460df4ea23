"""Partial fine-tuning: which blocks train, what stays bit for bit, and what it is said to need."""

from __future__ import annotations

import pytest
import torch
from retrain_helpers import dies_after, execute, summary
from safetensors.torch import load_file

from core.errors import OptionError
from core.prune import depth
from core.retrain import estimate, partial
from core.retrain.spec import RetrainSpec


def spec_of(**options):
    given = {"checkpoint": "x", "data": "d", "out": "y", "method": "partial"}
    return RetrainSpec(**{**given, **options})


def test_the_last_blocks_and_those_before_the_seams(pruned, dense, tmp_path):
    # blocks 0, 2 and 4 of five were kept
    assert partial.trained_blocks(spec_of(last=2), 3, pruned) == (1, 2)
    assert partial.trained_blocks(spec_of(last=1, seams=True), 3, pruned) == (0, 1, 2)
    assert partial.trained_blocks(spec_of(last=9), 3, pruned) == (0, 1, 2)
    assert partial.blocks_of(spec_of(method="full"), 3, pruned) == (0, 1, 2)
    with pytest.raises(OptionError, match="does not name the blocks that were removed"):
        partial.trained_blocks(spec_of(seams=True), 5, dense)
    depth.prune(dense, (0, 4), tmp_path / "ends")
    with pytest.raises(OptionError, match="no block of .* stands before"):
        partial.trained_blocks(spec_of(seams=True), 3, tmp_path / "ends")


@pytest.fixture(scope="module")
def run(pruned, dense, tasks, tmp_path_factory):
    """The options and folder of a finished run that trained block 2 of 3."""
    out = tmp_path_factory.mktemp("runs") / "partial"
    options = {
        "checkpoint": str(pruned), "dense": str(dense), "data": tasks, "method": "partial",
        "last": 1, "template": "plain", "cutoff": 96, "steps": 4, "batch": 4, "micro_batch": 2,
        "lr": 3e-3, "holdout": 4, "eval_every": 2, "warmup": 0, "device": "cpu",
    }  # fmt: skip
    assert execute(**options, out=str(out)) == 0
    return options, out


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_only_the_last_block_and_the_head_change(run, pruned):
    _, out = run
    before, after = weights(pruned), weights(out / "merged")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    inside = {name for name in before if name.startswith("model.layers.2.")}
    head = {"lm_head.weight"} & set(before)
    assert changed == inside | head
    found = summary(out)
    assert found["trainable_parameters"] == sum(before[name].numel() for name in changed)
    assert found["heldout_loss_after"] < found["heldout_loss_before"]


def test_the_estimate_counts_what_trains(run):
    options, out = run
    plan = estimate.estimate(RetrainSpec(**options, out=str(out)))
    assert plan["trainable_parameters"] == summary(out)["trainable_parameters"]
    whole = estimate.estimate(RetrainSpec(**{**options, "method": "full"}, out=str(out)))
    assert plan["memory_bytes"]["optimiser"] < whole["memory_bytes"]["optimiser"]
    assert plan["memory_bytes"]["activations"] == pytest.approx(
        whole["memory_bytes"]["activations"] / 3, rel=1e-6
    )
    assert plan["flops"] < whole["flops"]


def test_resuming_gives_the_same_weights(run, tmp_path, monkeypatch):
    options, out = run
    again = {**options, "out": str(tmp_path / "again")}
    with monkeypatch.context() as patch:
        dies_after(patch, 3)
        assert execute(**again) == 1
    assert execute(**again, resume=True) == 0
    one, other = weights(out / "merged"), weights(tmp_path / "again" / "merged")
    assert all(torch.equal(one[name], other[name]) for name in one)
