"""Partial fine-tuning: which blocks train, what stays bit for bit, and what it is said to need."""

from __future__ import annotations

import pytest
import torch
from retrain_helpers import dies_after, execute, summary
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.checkpoint import locate
from core.errors import OptionError
from core.prune import depth
from core.retrain import caches, estimate, partial, states
from core.retrain.rows import Row
from core.retrain.spec import RetrainSpec
from core.runs.progress import SILENT


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


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of the caches, empty."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    return tmp_path / "workspace" / caches.FOLDER


@pytest.mark.parametrize("layout", ["grouped", "packed"])
def test_kept_states_train_as_all_blocks_do(run, kept, tmp_path, monkeypatch, layout):
    options = {**run[0], "steps": 40, "layout": layout, "loss": "kl", "teacher_top_k": 0}
    calls = []
    usual = states.write
    monkeypatch.setattr(states, "write", lambda *given: (calls.append(1), usual(*given))[1])
    for name, keep in (("kept", "auto"), ("again", "auto"), ("off", "off")):
        assert execute(**options, keep_states=keep, out=str(tmp_path / name)) == 0
    assert calls == [1]  # shared by both runs
    assert len(list(kept.iterdir())) == 1
    one, again, other = (weights(tmp_path / n / "merged") for n in ("kept", "again", "off"))
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(one[name], again[name])
    found = [summary(tmp_path / name)["heldout_loss_after"] for name in ("kept", "off")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_states_are_what_enters_the_block_and_are_kept_for_these_rows_alone(
    pruned, kept, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(pruned).eval()
    made = [Row(tuple(ids), tuple(ids)) for ids in ([5, 9, 30, 7], [8, 6], [40, 41, 42])]
    entered = {}
    model.model.layers[2].register_forward_pre_hook(
        lambda _, given: entered.update(x=given[0].clone())
    )
    folder = kept / "key"
    cpu = torch.device("cpu")
    found = states.write(folder, model, made, 2, 1, (cpu, None), SILENT)
    assert len(model.model.layers) == 3
    batch = found.of([(made[0],), (made[1], made[2])])
    assert batch["states"].shape == (2, 5, model.config.hidden_size)
    assert batch["states"][0, 4].abs().max() == 0
    for at, row in (((0, 0), made[0]), ((1, 0), made[1]), ((1, 2), made[2])):
        with torch.no_grad():
            model(input_ids=torch.tensor([row.ids]), use_cache=False)
        mine = batch["states"][at[0], at[1] : at[1] + len(row.ids)]
        torch.testing.assert_close(mine, entered["x"][0], rtol=1e-5, atol=1e-6)
    opened = locate.open(str(pruned))
    keys = {
        states.key_of(opened, rows, first, about)
        for rows in (made, made[:2], made[::-1])
        for first in (1, 2)
        for about in (["float32"], ["bfloat16"])
    }
    assert len(keys) == 12
    assert states.find(folder, made, 2)
    assert states.find(folder, made[:2], 2) is None


def test_states_that_are_used_once_or_do_not_fit_are_not_kept(run, kept, tmp_path, monkeypatch):
    assert execute(**run[0], out=str(tmp_path / "once")) == 0
    monkeypatch.setattr(caches, "has_room", lambda _: False)
    assert execute(**{**run[0], "steps": 40}, out=str(tmp_path / "full")) == 0
    assert not kept.exists()


def test_resuming_gives_the_same_weights(run, tmp_path, monkeypatch):
    options, out = run
    again = {**options, "out": str(tmp_path / "again")}
    with monkeypatch.context() as patch:
        dies_after(patch, 3)
        assert execute(**again) == 1
    assert execute(**again, resume=True) == 0
    one, other = weights(out / "merged"), weights(tmp_path / "again" / "merged")
    assert all(torch.equal(one[name], other[name]) for name in one)
