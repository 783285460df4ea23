"""Training with ``--dtype float16``, as on a Turing GPU: the loss is scaled, checked on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from retrain_helpers import execute, summary

from core.retrain import trainer


@pytest.fixture
def options(pruned, dense, tasks, tmp_path):
    def made(name, **more):
        return {
            "checkpoint": str(pruned), "dense": str(dense), "data": tasks,
            "out": str(tmp_path / name), "template": "plain", "cutoff": 128, "steps": 4,
            "batch": 6, "micro_batch": 3, "lr": 5e-3, "holdout": 6, "warmup": 0, "dropout": 0.0,
            **more,
        }  # fmt: skip

    return made


def steps(folder):
    lines = (folder / ".run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "grad_norm" in row]


def test_float16_trains_as_float32_does(options, tmp_path):
    for dtype in ("float16", "float32"):
        assert execute(**options(dtype, method="lora", dtype=dtype)) == 0
    half, full = summary(tmp_path / "float16"), summary(tmp_path / "float32")
    assert (half["dtype"], half["compute_dtype"]) == ("float16", "float16")
    lost = full["heldout_loss_before"] - full["heldout_loss_after"]
    assert lost > 0.01
    assert half["heldout_loss_before"] - half["heldout_loss_after"] == pytest.approx(lost, rel=0.05)
    for one, other in zip(steps(tmp_path / "float16"), steps(tmp_path / "float32"), strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.03)  # unscaled


def test_gradients_that_float16_would_lose_are_kept(options, tmp_path, monkeypatch):
    """A loss of a millionth has gradients below float16's smallest number."""
    whole = trainer.Objective.__call__

    def small(self, model, batch):
        objective, loss = whole(self, model, batch)
        return objective * 1e-6, loss

    monkeypatch.setattr(trainer.Objective, "__call__", small)
    for dtype in ("float16", "float32"):
        assert execute(**options(dtype, method="full", dtype=dtype, steps=1)) == 0
    found = summary(tmp_path / "float16")
    assert (found["dtype"], found["compute_dtype"]) == ("float32", "float16")
    (one,), (other,) = steps(tmp_path / "float16"), steps(tmp_path / "float32")
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)


def test_an_overflow_skips_the_step_and_halves_the_scale(options, tmp_path, monkeypatch, capfd):
    made = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind: made(kind, init_scale=2.0**24))
    assert execute(**options("run", method="lora", dtype="float16", steps=10)) == 0
    taken = [row.get("grad_norm") is not None for row in steps(tmp_path / "run")]
    skipped = taken.index(True)
    assert 0 < skipped < 10
    assert taken == [False] * skipped + [True] * (10 - skipped)
    log = (tmp_path / "run" / ".run" / "log.txt").read_text() + capfd.readouterr().err
    assert f"Step {skipped} skipped: its gradients overflow float16" in log
    found = summary(tmp_path / "run")
    assert found["heldout_loss_after"] < found["heldout_loss_before"]
