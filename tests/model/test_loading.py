"""Loading straight onto the device, and true messages about weights that are not finite."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import NotFiniteError
from core.model import loading

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "map_"), [("cuda:1", {"": torch.device("cuda:1")}), ("mps", {"": torch.device("mps")}),
                       ("cpu", None)],
)  # fmt: skip
def test_each_tensor_is_read_straight_onto_a_gpu(tiny_gqa, monkeypatch, name, map_):
    """Else the whole model passes through the host's memory."""
    asked = []

    class Stock:
        @staticmethod
        def from_pretrained(folder, **options):
            asked.append(options.pop("device_map", None))
            model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
            monkeypatch.setattr(type(model), "to", lambda self, device: self)  # there is no GPU
            return model, report

    monkeypatch.setattr(loading, "model_class", lambda config: Stock)
    loading.load_model(tiny_gqa, torch.device(name), torch.float32)
    assert asked == [map_]


def test_a_placed_model_is_a_plain_one(tiny_gqa, monkeypatch):
    """No hooks of accelerate are left, which the block-wise arithmetic would have to avoid."""
    stock = AutoModelForCausalLM.from_pretrained(tiny_gqa, dtype=torch.float32)
    monkeypatch.setattr(loading, "_placement", lambda device: {"device_map": {"": device}})
    model = loading.load_model(tiny_gqa, CPU, torch.float32)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(hasattr(m, "_hf_hook") for m in model.modules())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)


def test_weights_beyond_float16_are_not_called_damaged_alone(tmp_path):
    folder = tiny.write(tmp_path / "model", dtype="float32")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70000.0
    save_file(tensors, file, {"format": "pt"})
    loading.load_model(folder, CPU, torch.float32)
    with pytest.raises(NotFiniteError, match=r"layers\.1\.mlp.*bfloat16 or float32 if .* 65,504"):
        loading.load_model(folder, CPU, torch.float16)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NotFiniteError, match="The checkpoint is damaged; load an intact copy"):
        loading.load_model(folder, CPU, torch.float32)
