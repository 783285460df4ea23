"""Weights, gradients and optimiser states split among processes (FSDP2, gloo on the CPU)."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import pytest
import safetensors.torch
import torch
from retrain_helpers import execute, summary

from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.errors import OptionError
from core.prune import depth
from core.retrain import estimate, sharded, split_files
from core.retrain.spec import RetrainSpec, settings_of
from core.retrain.trainer import RetrainTrainer, StepWatcher
from core.runs import devices, processes
from core.runs.workspace import read_run

pytestmark = pytest.mark.usefixtures("prepared_runs", "place")

OPTIONS = {"batch": 4, "micro_batch": 1, "cutoff": 32, "steps": 4, "eval_every": 2, "lr": 1e-3}
"""With two processes, each computes two micro-batches of every step."""
SPLIT = {"processes": 2, "sharding": "fsdp"}


@pytest.fixture(scope="module")
def train(pruned, dense, texts, tmp_path_factory):
    """Train all weights in this process, the first of its run; return the folder."""
    root = tmp_path_factory.mktemp("sharded")

    def run(name, status=0, **options):
        out = root / name
        given = {"method": "full", "checkpoint": str(pruned), "dense": str(dense), "data": texts}
        got = execute(**{**given, **OPTIONS, **options, "out": str(out)})
        assert got == status, (out / ".run/log.txt").read_text()
        return out

    return run


@pytest.fixture(scope="module")
def alone(train):
    """The training by one process."""
    return train("alone", clip=0.5)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    every = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in every if ".run" not in path.parts}


def assert_same(one, two):
    """Check that steps, evaluations, files and the written weights agree."""
    before, after = lines(one), lines(two)
    assert len(before) == len(after) > 4
    for line, other in zip(before, after, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"time", "tokens_per_s", "memory_mib"}:
            value = line[name]
            same = pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
            assert other[name] == same, name
    assert summary(one)["heldout_loss_after"] < summary(one)["heldout_loss_before"]
    for name in ("dense", "before"):
        known = summary(one)[f"heldout_loss_{name}"]
        assert summary(two)[f"heldout_loss_{name}"] == pytest.approx(known, rel=1e-6)
    assert files(one) == files(two)
    first, second = (
        safetensors.torch.load_file(f / "merged/model.safetensors") for f in (one, two)
    )
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)
    configs = [json.loads((f / "merged/config.json").read_text()) for f in (one, two)]
    assert configs[0] == configs[1]


def held(patch):
    """Have a training record the bytes that the first process holds; return the record."""
    found = {}
    clip, ended = RetrainTrainer.clip, StepWatcher.on_step_end

    def clipping(self, most):
        weights = list(self.model.parameters())
        found["weights"] = sharded.held_bytes(weights)
        found["gradients"] = sharded.held_bytes(w.grad for w in weights)
        norm = clip(self, most)
        found["clipped"] = norm > most
        return norm

    def ending(self, *args, **more):
        states = self.trainer.optimizer.state.values()
        moments = (s[name] for s in states for name in ("exp_avg", "exp_avg_sq"))
        found["optimiser"] = sharded.held_bytes(moments)
        ended(self, *args, **more)

    patch.setattr(RetrainTrainer, "clip", clipping)
    patch.setattr(StepWatcher, "on_step_end", ending)
    return found


def test_numbers_are_those_of_one_process_and_half_the_memory_is_held(train, alone, monkeypatch):
    """Two micro-batches of each step, clipped; the same without splitting, for the memory."""
    memory = []
    for sharding in ("ddp", "fsdp"):
        with monkeypatch.context() as patch:
            found = held(patch)
            two = train(sharding, clip=0.5, processes=2, sharding=sharding)
        assert_same(alone, two)
        assert found.pop("clipped")
        assert summary(two)["sharding"] == sharding
        assert summary(two)["fused"]
        memory.append(found)
    whole, split = memory
    assert whole["optimiser"] == 2 * whole["weights"] == 2 * whole["gradients"]
    assert whole["weights"] == 4 * summary(alone)["parameters"]
    for name in whole:
        assert split[name] == pytest.approx(whole[name] / 2, rel=0.01), name
    log = (two / ".run/log.txt").read_text()
    assert "optimiser states are split among the processes (FSDP2): --sharding fsdp." in log
    told = (
        f"holds {split['weights'] / 2**20:,.1f} of {whole['weights'] / 2**20:,.1f} MiB of weights"
    )
    assert told in log


@pytest.mark.parametrize(
    ("variant", "way"),
    [
        ("tied", {"method": "continued", "loss": "kl", "gradient_checkpointing": "on"}),
        ("tied", {"loss": "both", "teacher_top_k": 0, "fused": "off", "retention": True}),
        ("gqa", {"batch": 3}),
    ],
    ids=["kept distributions, recomputed", "live teacher, stock layers", "three processes"],
)
def test_it_goes_with_distillation_recomputation_and_other_models(
    train, tiny_dir, tmp_path, variant, way
):
    """An embedding that is the output matrix too; blocks without attention or MLP."""
    dense, pruned = tiny_dir(variant), tmp_path / "pruned"
    depth.prune(dense, Removal((), (3,), (1,)), pruned)
    how = {"checkpoint": str(pruned), "dense": str(dense), "steps": 2, "eval_every": 1, **way}
    split = {**SPLIT, "processes": 3} if "batch" in way else SPLIT
    one, two = train(f"{tmp_path.name}-one", **how), train(f"{tmp_path.name}-two", **how, **split)
    assert_same(one, two)
    assert "merged/modeling_depthcut.py" in files(two)


@pytest.mark.parametrize(
    "way", [{"dtype": "bfloat16"}, {}, {"gradient_checkpointing": "on"}], ids=str
)
def test_bfloat16_goes_with_it(train, half, way):
    """In it, or (if the processor has instructions for it) with weights in float32."""
    one, two = (
        summary(
            train(
                f"{way}{len(how)}",
                checkpoint=str(half / "pruned"),
                steps=2,
                eval_every=2,
                **way,
                **how,
            )
        )
        for how in ({}, SPLIT)
    )
    assert two["dtype"] == way.get("dtype", "float32")
    assert two["compute_dtype"] == one["compute_dtype"]
    gain = one["heldout_loss_before"] - one["heldout_loss_after"]
    assert gain > 0.1
    assert two["heldout_loss_after"] == pytest.approx(one["heldout_loss_after"], abs=0.1 * gain)


def stops_after(patch, step):
    """Have a training asked to stop while it takes ``step``."""
    usual = StepWatcher.on_pre_optimizer_step

    def cancelling(self, args, state, control, **more):
        usual(self, args, state, control, **more)
        if state.global_step == step - 1 and self.ranks.is_first:
            (self.progress._run.book / "cancel").touch()

    patch.setattr(StepWatcher, "on_pre_optimizer_step", cancelling)


@pytest.mark.parametrize(
    ("first", "then"),
    [({**SPLIT, "processes": 3}, {"processes": 1}), ({"processes": 1}, SPLIT)],
    ids=["split, then alone", "alone, then split"],
)
def test_a_cancelled_run_goes_on_in_any_way(train, alone, monkeypatch, first, then):
    """Three processes do not divide the tensors evenly."""
    name = f"from {first['processes']}"
    with monkeypatch.context() as patch:
        stops_after(patch, 3)
        patch.setattr(split_files, "FILE_BYTES", 100_000)
        out = train(name, 130, clip=0.5, **first)
    assert summary(out)["state"] == "cancelled"
    (saved,) = (out / ".run/checkpoints").glob("checkpoint-3")
    divided = first["processes"] > 1
    stored = "model-00001-of-00002.safetensors" if divided else "model.safetensors"
    assert {stored, "optimizer.pt", "complete.json"} <= {p.name for p in saved.iterdir()}
    train(name, clip=0.5, resume=True, **then)
    assert_same(alone, out)


def test_a_cancel_request_during_an_evaluation_stops_all_processes(train, monkeypatch):
    evaluate, usual = StepWatcher.evaluate, sharded.Together.check_cancel

    def asked(self):
        (self.progress._run.book / "cancel").touch()
        usual(self)

    def evaluating(self, step):
        if step:
            monkeypatch.setattr(sharded.Together, "check_cancel", asked)
        evaluate(self, step)

    monkeypatch.setattr(StepWatcher, "evaluate", evaluating)
    out = train("asked", 130, **SPLIT)
    assert (summary(out)["state"], summary(out)["steps"]) == ("cancelled", 2)


def test_a_training_that_diverges_keeps_the_last_good_state(train, alone, monkeypatch):
    """Also if the loss is not a number in one process alone."""
    usual = RetrainTrainer.join

    def joining(self):
        if self.state.global_step == 3:
            self.step_loss.fill_(float("nan"))
        usual(self)

    monkeypatch.setattr(RetrainTrainer, "join", joining)
    out = train("nan", 1, clip=0.5, **SPLIT)
    assert (summary(out)["state"], summary(out)["kept_step"]) == ("stopped", 2)
    assert summary(out)["merged"]["heldout_loss"] == pytest.approx(
        next(x["heldout_loss"] for x in lines(alone) if x["step"] == 2 and "heldout_loss" in x),
        abs=1e-4,
    )


@pytest.mark.parametrize("when", ["while it loads", "while it trains", "while it writes"])
def test_a_killed_process_ends_the_run_with_its_reason(train, monkeypatch, when):
    from core.runs.rank_start import _Team

    teams, start = [], _Team.start
    owner, name, turn = {
        "while it loads": (split_files, "read", 2),  # the dense model is the first
        "while it trains": (StepWatcher, "on_step_end", 2),
        "while it writes": (split_files, "write_optimiser", 1),
    }[when]
    usual, calls = getattr(owner, name), []

    def starting(self):
        teams.append(self)
        start(self)

    def killing(*args, **more):
        calls.append(name)
        if len(calls) == turn:
            os.kill(teams[0].others[0].process.pid, signal.SIGKILL)
        return usual(*args, **more)

    monkeypatch.setattr(_Team, "start", starting)
    monkeypatch.setattr(owner, name, killing)
    out = train(f"killed {when}", 1, **SPLIT)
    pid = teams[0].others[0].process.pid
    assert f"Process 2 of 2 (pid {pid}, cpu) was ended by SIGKILL." in read_run(out).error
    assert processes.start_time(pid) is None
    with contextlib.suppress(FileNotFoundError):
        assert not list((out / "merged").iterdir())


def test_what_cannot_be_split_is_refused_before_anything_is_loaded(train):
    refused = {
        "--method lora trains adapters": {"method": "lora"},
        "--method partial trains only some blocks": {"method": "partial"},
        "--processes is 1": {"processes": 1},
        "does not train in float16": {"dtype": "float16"},
    }
    for expected, options in refused.items():
        made = {"checkpoint": "x", "data": "x", "out": "x", "method": "full", **SPLIT, **options}
        with pytest.raises(OptionError, match=expected) as error:
            settings_of(RetrainSpec(**made), 1)
        assert error.value.hint
    out = train("refused", 2, **{**SPLIT, "method": "lora"})
    assert "--method lora trains adapters" in read_run(out).error
    assert "Dense model" not in (out / ".run/log.txt").read_text()


def test_the_estimate_decides_and_counts_a_part_of_each(pruned, dense, texts, monkeypatch):
    def planned(free, device="cuda:0", **options):
        monkeypatch.setattr(devices, "free_bytes", lambda name: (device, free))
        made = {"checkpoint": str(pruned), "data": texts, "out": "x", "method": "full", **options}
        return estimate.estimate(RetrainSpec(**{"processes": 2, "batch": 8, **made}))

    plenty = planned(2**40)
    assert plenty["sharding"] == "ddp"
    assert "replicas need an estimated" in plenty["sharding_because"]
    whole = plenty["memory_bytes"]
    assert "gathered" not in whole
    least = {"micro_batch": 1, "gradient_checkpointing": "on"}
    smallest = planned(2**40, **least)["memory_bytes"]["total"]
    assert planned(int(smallest / estimate.ROOM) + 1, **least)["sharding"] == "ddp"
    tight = planned(int(smallest / estimate.ROOM) - 1, **least)
    assert tight["sharding"] == "fsdp"
    each = tight["memory_bytes"]["total"] / 2**20
    assert f"MiB free; split, each needs an estimated {each:,.0f} MiB" in tight["sharding_because"]
    assert "more --processes or --method lora" in " ".join(planned(2**16, **least)["warnings"])
    # also where recomputation and fewer sequences are for the estimate to choose
    assert planned(int(smallest / estimate.ROOM) - 1)["sharding"] == "fsdp"
    assert planned(int(smallest / estimate.ROOM) + 1)["sharding"] == "ddp"
    split = planned(2**40, sharding="fsdp", processes=4)
    assert split["sharding_because"] == "--sharding fsdp"
    for name in ("weights", "gradients", "optimiser"):
        assert split["memory_bytes"][name] == -(-whole[name] // 4)
    info = headers.inspect(pruned)
    outside = info.parameters - info.parts["blocks"]
    gathered = 2 * 4 * (2 * max(info.block_parameters) + outside)
    assert split["memory_bytes"]["gathered"] == gathered
    distilled = {"loss": "both", "teacher_top_k": 0, "sharding": "fsdp", "dense": str(dense)}
    live = planned(2**40, processes=4, **distilled)["memory_bytes"]
    assert live["teacher"] == 2 * info.parameters // 4  # in bfloat16
    assert live["gathered"] == gathered * (4 + 4 + 2) // (4 + 4)
    total = split["memory_bytes"]["total"]
    assert total == sum(v for k, v in split["memory_bytes"].items() if k != "total")
    assert planned(2**20, "cpu")["sharding"] == "ddp"
    assert "--sharding fsdp or --method lora" in " ".join(planned(2**16, "cpu")["warnings"])
    assert planned(None)["sharding"] == "ddp"
    assert planned(2**16, dtype="float16")["sharding"] == "ddp"
    for options in ({"processes": 1}, {"method": "lora"}):
        assert "sharding" not in planned(2**16, **options)
