"""The short test of learning rates: each rate is what a training with it gives."""

from __future__ import annotations

import pytest
from retrain_helpers import execute, summary

from core.retrain import spec as specs
from core.retrain.results import Rate

OPTIONS = {
    "template": "plain", "cutoff": 96, "steps": 6, "batch": 4, "micro_batch": 2, "warmup": 2,
    "holdout": 6, "dropout": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("options", [{"method": "lora"}, {"method": "partial", "loss": "kl"}])
def test_a_rate_gives_what_a_training_with_it_gives(pruned, tasks, tmp_path, monkeypatch, options):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    about = {**OPTIONS, **options, "checkpoint": str(pruned), "data": tasks, "last": 1}
    assert execute(**about, out=str(tmp_path / "range"), lr_range_test=True) == 0
    rows = Rate.read(tmp_path / "range")
    tried = specs.RANGES["lora" if options["method"] == "lora" else "weights"]
    assert [row.rate for row in rows] == list(tried)
    third = rows[3]
    assert execute(**about, out=str(tmp_path / "one"), lr=third.rate, eval_every=6) == 0
    found = summary(tmp_path / "one")
    assert third.heldout_loss == pytest.approx(found["heldout_loss_after"], rel=1e-5)
    assert third.heldout_kl == pytest.approx(found["heldout_kl_after"], rel=1e-4)
    told = summary(tmp_path / "range")
    value = (lambda row: row.heldout_kl) if "loss" in options else (lambda row: row.heldout_loss)
    assert told["settings"]["lr"] == min(rows, key=value).rate
    assert not (tmp_path / "range" / "adapter").exists()


def test_a_rate_that_diverges_is_never_the_best():
    rows = [
        Rate(rate=1e-4, heldout_loss=2.0, heldout_kl=0.3),
        Rate(rate=1e-3, heldout_loss=1.9, heldout_kl=0.4),
        Rate(rate=1e-2, heldout_loss=float("nan"), heldout_kl=float("nan")),
    ]
    assert Rate.best(rows, by_kl=False).rate == 1e-3
    assert Rate.best(rows, by_kl=True).rate == 1e-4
    assert Rate.best(rows[2:], by_kl=False) is None
