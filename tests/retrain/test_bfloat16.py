"""Training in bfloat16 on a CPU that has instructions for it, against training in float32."""

from __future__ import annotations

import json

import pytest
import torch
from retrain_helpers import execute, summary
from safetensors.torch import load_file

from core.model import precision

OPTIONS = {
    "template": "plain", "cutoff": 96, "steps": 12, "batch": 8, "micro_batch": 4, "lr": 5e-3,
    "holdout": 4, "eval_every": 12, "warmup": 0,
}  # fmt: skip


@pytest.mark.parametrize("options", [{"method": "lora"}, {"method": "full", "loss": "kl"}])
def test_losses_are_those_of_float32(half, tasks, tmp_path, monkeypatch, options):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    about = {**OPTIONS, **options, "checkpoint": str(half / "pruned"), "data": tasks}
    for dtype in ("auto", "float32"):
        out = tmp_path / dtype
        assert execute(**about, dtype=dtype, out=str(out), merge=True) == 0
    mine, exact = summary(tmp_path / "auto"), summary(tmp_path / "float32")
    assert (mine["compute_dtype"], exact["compute_dtype"]) == ("bfloat16", "float32")
    assert mine["dtype"] == ("bfloat16" if options["method"] == "lora" else "float32")
    gain = exact["heldout_loss_before"] - exact["heldout_loss_after"]
    assert gain > 0.1
    assert abs(mine["heldout_loss_after"] - exact["heldout_loss_after"]) < 0.05 * gain
    assert abs(mine["heldout_kl_after"] - exact["heldout_kl_after"]) < 0.05 * gain
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("auto", "float32")
    ]
    for one, other in zip(*losses, strict=True):
        assert one == other or abs(one - other) < 0.02 * other
    if options["method"] == "lora":
        adapter = load_file(tmp_path / "auto" / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_merging_to_float32_rounds_nothing(half, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    about = {**OPTIONS, "steps": 2, "eval_every": 2, "method": "lora", "data": tasks}
    about |= {"checkpoint": str(half / "pruned"), "merge": True, "merge_dtype": "float32"}
    assert execute(**about, out=str(tmp_path)) == 0
    name = "model.layers.0.mlp.up_proj"
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.{'model.' + name}.lora_{x}.weight"] for x in "AB")
    base = load_file(half / "pruned" / "model.safetensors")[f"{name}.weight"].float()
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(merged, base + 2 * b @ a, rtol=1e-6, atol=1e-7)
