"""Training on the chosen GPU, and a teacher that is as exact as stock transformers."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.checkpoint import locate
from core.model.loading import load_model
from core.model.precision import Precision
from core.retrain import layers, weights
from core.retrain.rows import Row
from core.retrain.session import Session
from core.retrain.spec import RetrainSpec, goal_of, settings_of
from core.retrain.trainer import arguments


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs as torch reports them; returns the current one as a list of its index."""
    current = [0]

    def set_device(device):
        current[0] = torch.device(device).index or 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=8, minor=0)
    )
    yield current
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("index", [0, 1])
def test_training_takes_the_chosen_gpu(two_gpus, tmp_path, index):
    """transformers and accelerate set themselves to the first GPU, and count two."""
    device = torch.device("cuda", index)
    spec = RetrainSpec(checkpoint="demo", data="demo", out=str(tmp_path / "out"))
    settings = settings_of(spec, 4, 1000)
    args = arguments(spec, settings, tmp_path, device)
    assert args.device == device
    assert two_gpus == [index]
    assert args.n_gpu == 1
    assert args.distributed_state.device == device
    from accelerate import Accelerator

    assert Accelerator().device == device
    assert two_gpus == [index]


def test_a_teacher_gives_the_logits_of_stock_transformers(tiny_dir, tmp_path):
    """On a GPU the teacher is bfloat16, where rounded rotary frequencies would move its logits."""
    folder = tiny_dir("llama3", dtype="bfloat16")
    spec = RetrainSpec(checkpoint="demo", data="demo", out=str(tmp_path), distil=True)
    session = SimpleNamespace(
        dense=locate.open(str(folder)),
        device=torch.device("cpu"),
        spec=spec,
        goal=goal_of(spec),
        decide=lambda _: Precision(torch.float32, torch.bfloat16),  # as on an Ampere GPU
        is_split=False,
    )
    session._loaded = partial(Session._loaded, session)
    teacher, _ = Session.load_dense(session)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.arange(3, 63)[None]
    with torch.no_grad():
        expected = stock(ids).logits
        assert torch.equal(teacher(ids).logits, expected)
        assert not torch.equal(stock.to(torch.bfloat16)(ids).logits, expected)
    assert teacher.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_merged_checkpoint_is_read_back_after_the_model_is_freed(
    tiny_gqa, tmp_path, monkeypatch, method
):
    """The caller holds the model while it is checked; the device must not hold both."""
    device = torch.device("cpu")
    model = load_model(tiny_gqa, device, torch.float32)
    if method == "lora":
        spec = RetrainSpec(checkpoint="demo", data="demo", out=str(tmp_path))
        model = weights.with_adapters(model, spec)
    held = []

    def spy(*args):
        held.append(sum(p.numel() for p in model.parameters() if not p.is_meta))
        return load_model(*args)

    monkeypatch.setattr(weights, "load_model", spy)
    rows = [Row((1, 5, 9, 7), (-100, 5, 9, 7))]
    merged = weights.merge_and_save(
        model, tiny_gqa, tmp_path / "merged", dtype=torch.float32, rows=rows, device=device,
        compute=None,
    )  # fmt: skip
    assert held == [0]
    assert merged.max_logit_difference < 1e-5
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tiny_gqa, dtype=torch.float32)
    for (name, a), (_, b) in zip(stock.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trained_weights_are_read_tensor_by_tensor(tiny_gqa, tmp_path, monkeypatch):
    trained = load_model(tiny_gqa, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(0.5)
    trained.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    model = load_model(tiny_gqa, torch.device("cpu"), torch.float32)
    monkeypatch.setattr("safetensors.torch.load_file", None)  # would read a whole file at once
    weights.load_trained(model, tmp_path)
    for a, b in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"]
)
def test_recomputation_is_asked_for_by_the_name_that_this_version_has(name):
    asked = []
    layers.enable_recomputation(SimpleNamespace(**{name: asked.append}))
    assert asked == [{"use_reentrant": False}]
