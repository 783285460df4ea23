"""Importing GGUF files: weights, config and tokenizer against the gguf library and the original."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from core import commands
from core.checkpoint import families, gguf, headers, locate
from core.checkpoint.gguf_config import gguf_name
from core.checkpoint.imported import Imported
from core.errors import CheckpointError
from core.importing import convert
from core.model.loading import load_model, load_tokenizer
from core.prune import depth
from tests import gguf_files, llama_cpp, tiny

CPU = torch.device("cpu")
TEXT = "Ann sees the red ball. 12 345, naïve café — 東京 🙂\n\n  two  spaces"
ORIGINALS = ("gqa", "tied", "llama3", "qwen2", "qwen3", "mistral")


@pytest.mark.parametrize("variant", ORIGINALS)
def test_an_unquantized_file_is_the_original_model(variant, tmp_path):
    """F32 through GGUF and back: same logits, so q/k order, biases, norms and rope are right."""
    fields = {} if variant == "llama3" else {"sliding_window": None, "use_sliding_window": False}
    model, tokenizer = tiny.model(variant, **fields), tiny.tokenizer()
    file = gguf_files.write(tmp_path / "x.gguf", model, tokenizer)
    record = convert.convert(file, tmp_path / "out", dtype="float32")
    assert (record.quantized, record.storage) == (
        False,
        {"F32": convert.parameters(gguf.read(file))},
    )
    again = load_model(tmp_path / "out", CPU, torch.float32)
    ids = torch.arange(1, 200).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    read = load_tokenizer(tmp_path / "out")
    assert read(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    if variant in ("llama3", "qwen3"):
        llama_cpp.assert_same(file, tmp_path / "out", ids[0, :150].tolist(), TEXT)
    assert read.chat_template == gguf_files.TEMPLATE
    stops = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (stops["bos_token_id"], stops["eos_token_id"]) == (1, 2)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A model with one block for each quantization, as GGUF and as the imported checkpoint."""
    folder = tmp_path_factory.mktemp("every")
    names = list(gguf.BLOCKS)
    model = tiny.model("gqa", hidden_size=256, intermediate_size=256, num_hidden_layers=len(names))

    def storage(name):
        block = families.block_of(name)
        return "Q6_K" if block is None else names[block]

    file = gguf_files.write(folder / "every.gguf", model, tiny.tokenizer(), storage)
    convert.convert(file, folder / "out")
    return file, folder / "out"


def test_every_quantization_equals_the_gguf_library(every):
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    file, out = every
    stored = {t.name: t for t in GGUFReader(str(file)).tensors}
    weights = load_file(out / "model.safetensors")
    assert {t.tensor_type.name for t in stored.values()} == set(gguf.BLOCKS)
    for name, weight in weights.items():
        tensor = stored[gguf_name(name)]
        values = np.array(dequantize(tensor.data, tensor.tensor_type))
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        found = weight.float().numpy()
        expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
        if heads:
            found = gguf_files.permuted(found, heads)
        np.testing.assert_array_equal(found, expected, err_msg=f"{name} {tensor.tensor_type.name}")


def test_every_quantization_computes_what_llama_cpp_does(every, tmp_path):
    """The same weights dequantized to F32: llama.cpp rounds activations of quantized products."""
    file, _ = every
    convert.convert(file, tmp_path / "out", dtype="float32")
    dense = gguf_files.as_f32(file, tmp_path / "f32.gguf")
    llama_cpp.assert_same(dense, tmp_path / "out", list(range(1, 150)), TEXT)


def test_the_record_is_shown_and_kept_by_variants(every, tmp_path):
    file, out = every
    info = locate.open(out).info
    assert info.imported == Imported.read(out)
    assert info.imported is not None
    assert info.imported.quantized
    assert info.imported.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sum(info.imported.storage.values()) == info.parameters
    assert info.dtype == "bfloat16"
    shown = commands.get("inspect").load()
    printed = shown.run(shown.InspectSpec(checkpoint=str(out)))
    assert printed["imported"]["file"] == "every.gguf"
    depth.prune(out, [3], tmp_path / "pruned")
    assert headers.inspect(tmp_path / "pruned").imported == info.imported
    assert "| imported from | every.gguf, stored as " in (tmp_path / "pruned/README.md").read_text()


def test_dry_run_estimates_without_torch(every):
    file, _ = every
    module = commands.get("import").load()
    found = module.dry_run(module.ImportSpec(source=str(file.parent), out="x", dtype="float32"))
    assert found["disk_bytes"] == 4 * found["parameters"]
    assert found["memory_bytes"] > found["disk_bytes"]
    with pytest.raises(CheckpointError, match=r"There is no file nothing.gguf.*or smollm2"):
        module.check(module.ImportSpec(source="nothing.gguf", out="x"))


def test_a_gguf_where_a_checkpoint_is_expected_explains_the_import(every):
    file, _ = every
    for name in (str(file), str(file.parent)):
        with pytest.raises(
            CheckpointError, match=r"python -m core import \S+every.gguf --out every"
        ):
            locate.open(name)


def test_a_file_that_fails_late_leaves_nothing(tmp_path, monkeypatch):
    from core.importing import weights

    file = gguf_files.write(tmp_path / "x.gguf", tiny.model(), tiny.tokenizer())
    monkeypatch.setattr(weights.loading, "check_finite", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
