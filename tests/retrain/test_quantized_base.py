"""LoRA on a base in 8 or 4 bits: gradients, memory, resuming, merging."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from retrain_helpers import dies_after, execute, summary
from safetensors.torch import load_file
from test_fused import adapted, outcome, same
from torch import nn

from core.errors import OptionError
from core.model.quantized_weights import is_quantized, parts, to_nf4, widened
from core.quantize import plan as quantize_plan
from core.quantize.torchao_tensors import quantize
from core.retrain import command, estimate, fused, tracking
from core.retrain.spec import RetrainSpec, settings_of

OPTIONS = {
    "method": "lora", "template": "plain", "cutoff": 96, "steps": 4, "batch": 4, "micro_batch": 2,
    "lr": 5e-3, "holdout": 4, "eval_every": 2, "warmup": 0, "merge": True,
}  # fmt: skip


def rounded(model, bits, group):
    """Quantize the frozen projections of a model with adapters."""
    for name, module in model.named_modules():
        if name.endswith("proj.base_layer"):
            weight = quantize(module.weight, bits, group)
            module.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8)])
def test_gradients_are_those_of_the_rounded_weights(tiny_dir, bits, group):
    exact = adapted(tiny_dir("gqa"))
    rounded(exact, bits, group)
    for module in exact.modules():
        if isinstance(module, nn.Linear) and is_quantized(module.weight):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    wanted = outcome(exact)
    model = adapted(tiny_dir("gqa"))
    rounded(model, bits, group)
    assert fused.install(model) == 5
    same(wanted, outcome(model))


@pytest.fixture
def nf4():
    pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes, which is optional.")


def test_nf4_is_the_stock_librarys(nf4):
    import bitsandbytes

    plain = nn.Linear(96, 160, bias=False)
    held = to_nf4(plain)
    stock = bitsandbytes.functional.quantize_4bit(
        plain.weight.detach(), compress_statistics=True, quant_type="nf4"
    )
    wanted = bitsandbytes.functional.dequantize_4bit(*stock)
    assert is_quantized(held.weight)
    assert not is_quantized(plain.weight)
    assert torch.equal(widened(held.weight), wanted)
    x = torch.randn(5, 96)
    torch.testing.assert_close(held(x), x @ wanted.t())
    layer = SimpleNamespace(matrices=(quantize_plan.Matrix("w", 160, 96),))
    tables = 4 * (16 + 256 + 1)  # the values of the codes and the mean scale, of constant size
    said = quantize_plan.Plan.nf4_bytes.fget(layer)
    assert sum(part.nbytes for part in parts(held.weight)) == said + tables


def test_gradients_over_nf4_are_those_of_the_rounded_weights(nf4, tiny_dir):
    held = adapted(tiny_dir("gqa"))
    for module in held.modules():
        if hasattr(module, "lora_A"):
            module.base_layer = to_nf4(module.base_layer)
    exact = adapted(tiny_dir("gqa"))
    for module, other in zip(exact.modules(), held.modules(), strict=True):
        if hasattr(module, "lora_A"):
            module.base_layer.weight = nn.Parameter(
                widened(other.base_layer.weight), requires_grad=False
            )
    wanted = outcome(exact)
    same(wanted, outcome(held))  # transformers' layers over bitsandbytes' own
    assert fused.install(held) == 5
    same(wanted, outcome(held))


def test_nf4_without_its_package_is_refused_before_anything_starts(pruned, tasks, monkeypatch):
    there = tracking.is_installed
    monkeypatch.setattr(
        tracking, "is_installed", lambda name: name != "bitsandbytes" and there(name)
    )
    spec = RetrainSpec(checkpoint=str(pruned), data=tasks, out="o", quantized_base="nf4")
    with pytest.raises(OptionError, match="the package bitsandbytes is not installed"):
        command.dry_run(spec)


@pytest.mark.parametrize("base", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("layers", ["auto", "off"])
def test_training_resuming_and_merging(
    pruned, dense, tasks, tmp_path, monkeypatch, capfd, request, base, layers
):
    if base == "nf4":
        request.getfixturevalue("nf4")
    about = {**OPTIONS, "checkpoint": str(pruned), "dense": str(dense), "data": tasks}
    about |= {"quantized_base": base, "fused": layers}
    assert execute(**about, out=str(tmp_path / "run")) == 0
    found = summary(tmp_path / "run")
    assert found["quantized_base"] == base
    assert found["heldout_loss_after"] < found["heldout_loss_before"]
    assert "merged into the weights as they were before" in capfd.readouterr().err
    if layers == "off":
        return
    with monkeypatch.context() as patch:
        dies_after(patch, 3)
        assert execute(**about, out=str(tmp_path / "again")) == 1
    assert execute(**about, out=str(tmp_path / "again"), resume=True) == 0
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("run", "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    name = "model.layers.0.self_attn.q_proj"
    a, b = (one[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    base_weight = load_file(pruned / "model.safetensors")[f"{name}.weight"]
    merged = load_file(tmp_path / "run" / "merged" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(merged, base_weight + 2 * b @ a, rtol=1e-5, atol=1e-6)
    assert found["merged"]["heldout_loss_trained"] == pytest.approx(found["heldout_loss_after"])
    assert found["merged"]["max_logit_difference"] > 0


def test_the_estimate_holds_the_base_in_bytes(pruned, tasks):
    about = {**OPTIONS, "checkpoint": str(pruned), "data": tasks, "out": "x", "device": "cpu"}
    plain, small = (
        estimate.estimate(RetrainSpec(**about, quantized_base=base)) for base in ("none", "int8")
    )
    whole = torch.randn(64, 32)
    weight = quantize(whole, 8, None)
    held = sum(part.nbytes for part in parts(weight))
    assert held < 64 * 32 + 8 * 64 + 1
    assert small["memory_bytes"]["weights"] < 0.75 * plain["memory_bytes"]["weights"]


def test_weights_that_train_are_not_quantized():
    spec = RetrainSpec(checkpoint="c", data="d", out="o", method="full", quantized_base="int8")
    with pytest.raises(OptionError, match="needs frozen weights"):
        settings_of(spec, 10)
