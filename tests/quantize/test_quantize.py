"""int8 and int4 variants: their numbers, how they load, what is refused, and how they are shown."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import study_helpers
import tiny
import torch
from safetensors import safe_open

from core.__main__ import main
from core.charts.compare import look_of
from core.checkpoint import headers, locate
from core.compare.candidates import candidates
from core.errors import CheckpointError, OptionError, RunError
from core.model import loading, memory, quantized_weights
from core.prune import depth
from core.quantize import plan as planning
from core.quantize.results import QuantizationRecord
from core.runs import workspace
from core.runs.workspace import Workspace
from core.study import study

torch.set_num_threads(1)
IDS = torch.tensor([[1, 5, 9, 30, 7, 7, 100]])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))


def quantize(source, out, bits, *more):
    status = main(["quantize", str(source), "--bits", str(bits), "--out", str(out), *more])
    assert status == 0
    return out


def refused(capsys, *argv):
    assert main([str(a) for a in argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def stored(folder):
    """Return all tensors of a checkpoint in float64."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as read:
            found |= {name: read.get_tensor(name).double() for name in read.keys()}  # noqa: SIM118
    return found


def by_hand(weight, bits, group):
    """Round [out, in] to the nearest value in float64; also return steps and unclear elements."""
    w = weight.numpy()
    groups = w.reshape(w.shape[0], -1, group or w.shape[1])
    if bits == 8:
        step = np.abs(groups).max(-1, keepdims=True) / 127.5
        zero = np.zeros_like(step)
        low, high = -128, 127
    else:
        top = np.maximum(groups.max(-1, keepdims=True), 0)
        bottom = np.minimum(groups.min(-1, keepdims=True), 0)
        step = (top - bottom) / 15
        low, high = -8, 7
        zero = np.clip(low - np.rint(bottom / step), low, high)
    exact = groups / step
    whole = np.clip(np.rint(exact) + zero, low, high)
    tie = np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < 1e-4
    return [a.reshape(w.shape) for a in (step * (whole - zero), step + 0 * groups, tie)]


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 16)])
def test_weights_are_rounded_to_the_nearest_value_and_stock_transformers_loads_them(
    tmp_path, tiny_dir, bits, group
):
    from transformers import AutoModelForCausalLM

    source = tiny_dir("gqa", shard_bytes=40_000, dtype="bfloat16")
    out = quantize(source, tmp_path / "q", bits, *(["--group", str(group)] if group else []))
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    model = loading.load_model(out, CPU, torch.float32)
    plain = loading.load_model(source, CPU, torch.float32)
    before = stored(source)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        wide = module.weight.dequantize().double().numpy()
        assert np.array_equal(
            wide.astype(np.float32), module.weight.dequantize().numpy()
        )  # widened in float32, not in the format that was stored
        expected, step, tie = by_hand(before[f"{name}.weight"], bits, group)
        assert np.abs(wide - expected)[~tie].max() < 1e-5 * step.max()
        assert (np.abs(wide - expected) < 1.001 * step).all()
        assert tie.mean() < 0.1  # the largest of each group is always one
        plain.get_submodule(name).weight.data = torch.tensor(wide, dtype=torch.float32)
        assert stock.get_submodule(name).weight.dtype == torch.bfloat16
    with torch.no_grad():
        ours, theirs, naive = (m(IDS).logits for m in (model, stock, plain))
    assert torch.allclose(ours, naive, atol=1e-4)
    assert theirs.dtype == torch.bfloat16
    assert (theirs.float() - ours).abs().max() < 0.1 * ours.std()
    kept = stored(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(kept[name], before[name])


def test_parameters_are_those_of_the_model_and_bytes_those_of_the_files(tmp_path, tiny_dir, capsys):
    source = tiny_dir("tied", dtype="bfloat16")
    before = headers.inspect(source)
    out = quantize(source, tmp_path / "q", 4)
    info = headers.inspect(out)
    for same in ("parameters", "parts", "block_modules", "block_shapes", "dtype", "tied"):
        assert getattr(info, same) == getattr(before, same)
    with safe_open(out / "model.safetensors", "pt") as read:
        tensors = [read.get_tensor(name) for name in read.keys()]  # noqa: SIM118
    size = sum(t.numel() * t.element_size() for t in tensors)
    record = QuantizationRecord.read(out)
    assert info.stored_bytes == record.bytes_after == size
    assert record.bytes_before == 2 * before.parameters
    assert (record.bits, record.group, record.tensors) == (4, 16, 35)
    assert record.left == ("embedding, which is also the head", "norms")
    assert info.quantization.label == "int4"
    (tmp_path / "text.txt").write_text(tiny.text(20))
    argv = ["evaluate", str(out), "--perplexity", str(tmp_path / "text.txt"), "--window", "32"]
    assert main([*argv, "--device", "cpu", "--out", str(tmp_path / "e")]) == 0
    model = loading.load_model(out, CPU, torch.bfloat16)
    assert memory.weight_bytes(model.parameters()) == size == info.memory_bytes["bfloat16"]
    assert info.memory_bytes["float32"] == size + 2 * (before.parameters - record.parameters)
    card = (out / "README.md").read_text()
    assert "torchao" in card
    assert "in groups" in card or "per 16 weights" in card
    assert main(["inspect", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["quantization"]["group"] == 16
    assert printed["parameters"]["total"] == before.parameters


def test_pruned_variants_and_blocks_of_individual_shapes_are_quantized(tmp_path, tiny_dir):
    from transformers import AutoModelForCausalLM

    short = tmp_path / "short"
    depth.prune(tiny_dir("qwen3"), [1, 3], short)
    out = quantize(short, tmp_path / "q", 8)
    assert headers.inspect(out).blocks == 3
    assert (out / "pruning.json").read_bytes() == (short / "pruning.json").read_bytes()

    narrow = tmp_path / "narrow"
    argv = ["width", str(tiny_dir("gqa")), "--method", "magnitude", "--ratio", "0.3"]
    assert main([*argv, "--layers", "1:4", "--device", "cpu", "--out", str(narrow)]) == 0
    out = quantize(narrow, tmp_path / "q2", 8)
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    model = loading.load_model(out, CPU, torch.float32)
    dense = loading.load_model(narrow, CPU, torch.float32)
    with torch.no_grad():
        logits, theirs, exact = (m(IDS).logits for m in (model, stock, dense))
    assert torch.equal(logits, theirs)
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.std()


def test_a_group_that_does_not_fit_is_reported_before_anything_starts(tmp_path, tiny_dir, capsys):
    source = tiny_dir("gqa")  # widths 32 and 48
    line = refused(capsys, "quantize", source, "--bits", 4, "--group", 32, "--out", tmp_path / "q")
    assert line == (
        "Error: --group 32 does not divide 48, the input width of "
        "model.layers.0.mlp.down_proj.weight and 4 more. Groups that fit all widths: 16, 8."
    )
    assert not list(tmp_path.glob("q/*.safetensors"))
    assert "--bits 5" in refused(capsys, "quantize", source, "--bits", 5, "--out", tmp_path / "q")
    assert main(["quantize", str(source), "--bits", "4", "--dry-run", "--out", "q"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["group"], shown["groups"]) == (16, [16, 8])
    assert shown["note"].startswith("128 does not divide 32, the input width of ")
    eight, four = planning.possible(headers.inspect(source))
    assert (eight.ok, eight.group, four.group) == (True, None, 16)
    odd = headers.inspect(tiny.write(tmp_path / "odd", "gqa", intermediate_size=43))
    eight, four = planning.possible(odd)
    assert eight.ok
    assert "even 8 does not divide 43" in four.reason
    with pytest.raises(OptionError, match="Use --bits 8"):
        planning.make(odd, 4, None)


def test_what_cannot_be_done_with_quantized_weights_is_one_sentence(
    tmp_path, tiny_dir, capsys, monkeypatch
):
    out = quantize(tiny_dir("gqa"), tmp_path / "q", 8)
    for argv in (
        ("importance", out),
        ("prune", out, "--drop", "1"),
        ("width", out, "--method", "magnitude", "--ratio", "0.2"),
        ("retrain", out, "--method", "lora", "--data", "demo"),
        ("quantize", out, "--bits", "4"),
    ):
        line = refused(capsys, *argv, "--out", tmp_path / argv[0])
        assert "q is quantized (int8), so its blocks cannot be scored" in line
        assert "Prune first, then quantize" in line
    other = locate.at(out).folder / "config.json"
    config = json.loads(other.read_text())
    config["quantization_config"]["quant_type"]["default"]["_type"] = "Float8WeightOnlyConfig"
    other.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized .Float8WeightOnlyConfig"):
        headers.inspect(out)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(RunError, match="need torchao, which cannot be imported"):
        quantized_weights.require()


def test_a_run_that_fails_leaves_no_checkpoint(tmp_path, tiny_dir, monkeypatch):
    from core.quantize import write

    def broken(*_):
        raise RunError("Broken.", "")

    monkeypatch.setattr(write, "_check", broken)
    argv = ["quantize", str(tiny_dir("gqa")), "--bits", "8", "--out", str(tmp_path / "q")]
    assert main(argv) == 1
    assert not [p for p in (tmp_path / "q").iterdir() if p.name != ".run"]


def test_a_quantized_variant_belongs_to_the_study(tmp_path):
    root = tmp_path / "workspace"
    dense = study_helpers.checkpoint(tmp_path / "dense")
    total = headers.inspect(dense).parameters
    study_helpers.pruned(root, "cut", dense, [2], 1.0, total, criterion="taylor")
    for name, source, bits, at in (("a", dense, 8, 2.0), ("b", root / "cut", 4, 3.0)):
        folder = study_helpers.run(root, name, "quantize", at, checkpoint=source, bits=bits)
        study_helpers.checkpoint(folder, 6 - (name == "b"))
        workspace.write_json(folder / "quantization.json", {"bits": bits, "group": None})
    found = study(Workspace(root), str(dense))
    first, cut, whole, small = candidates(found, None)
    assert (first.kind, cut.kind, whole.kind, small.kind) == ("dense", "depth", "dense", "depth")
    assert (whole.label, whole.parent, whole.series) == ("dense int8", str(dense), "dense int8")
    assert small.label == f"{cut.label} int4"
    assert (small.dropped, small.ratio, small.parent) == ((2,), cut.ratio, "cut")
    assert look_of(small).colour == look_of(cut).colour
    assert look_of(small).symbol != look_of(whole).symbol != look_of(cut).symbol
    assert not first.is_made
    assert whole.is_made
