"""GGUF files against llama.cpp itself: probabilities, text, tokens; and what is refused."""

import errno
import json
import math
import os
import shutil

import pytest
import torch

from core.__main__ import main
from core.checkpoint import locate
from core.checkpoint.drop import Removal
from core.errors import Cancelled, CheckpointError, OutputError
from core.export import gguf_file
from core.export.results import Export
from core.model.loading import load_model, load_tokenizer
from core.prune import depth
from core.prune.results import Pruning
from core.runs.progress import Progress
from core.runs.workspace import read_run

CPU = torch.device("cpu")
TEXT = "Once upon a time, there was a little girl who had a red ball."


def export(folder, out, kind="f32"):
    content = gguf_file.describe(locate.open(str(folder)), kind)
    size = gguf_file.write(content, out)
    assert out.stat().st_size == size
    assert abs(size - content.bytes) < 8192
    return content


def next_logprobs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def compare(engine, model, ids):
    """Assert that llama.cpp and torch agree on the 20 likeliest next tokens."""
    wanted = next_logprobs(model, ids)[-1].topk(20)
    found = engine.top(ids, 24)  # a few more: two tokens may be equally probable
    for token, logprob in zip(wanted.indices.tolist(), wanted.values.tolist(), strict=True):
        assert found[token] == pytest.approx(logprob, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("dense", "llama"), ("depth", "llama"), ("uniform", "llama"), ("flap", "deci")],
)
@pytest.mark.parametrize("name", ["demo", "stories260k"])
def test_llama_cpp_computes_the_same(
    llama_cpp, variant, real_dir, tmp_path, paragraph, name, kind, architecture
):
    folder = variant("demo" if name == "demo" else real_dir / name, kind)
    content = export(folder, tmp_path / "model.gguf")
    assert content.layout.architecture == architecture
    assert bool(content.layout.why_deci) == (architecture == "deci")
    model, tokenizer = load_model(folder, CPU, torch.float32), load_tokenizer(folder)
    with llama_cpp(tmp_path / "model.gguf") as engine:
        assert engine.tokenize(paragraph) == tokenizer.encode(paragraph)
        ids = tokenizer.encode(TEXT)
        for text in (ids, ids[:3], tokenizer.encode(paragraph)):
            compare(engine, model, text)
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
        assert engine.greedy(ids, 32) == wanted[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ["demo", "stories260k"])
def test_q8_0_keeps_the_perplexity(llama_cpp, variant, real_dir, tmp_path, name):
    folder = variant("demo" if name == "demo" else real_dir / name, "dense")
    export(folder, tmp_path / "q8_0.gguf", "q8_0")
    model, tokenizer = load_model(folder, CPU, torch.float32), load_tokenizer(folder)
    text = TEXT * 3
    if name == "demo":
        from core.demo import DATA

        text = (DATA / "heldout.txt").read_text(encoding="utf-8")[:300]
    ids = tokenizer.encode(text)
    logprobs = next_logprobs(model, ids)
    nll = -sum(logprobs[at - 1, ids[at]].item() for at in range(1, len(ids))) / (len(ids) - 1)
    with llama_cpp(tmp_path / "q8_0.gguf") as engine:
        assert math.exp(engine.nll(ids)) == pytest.approx(math.exp(nll), rel=0.01)


@pytest.mark.parametrize("method", ["linear", "scale"])
def test_a_healed_cut_is_exported_with_its_repair(llama_cpp, tmp_path, method):
    """Both methods lower the demo's KL without block 1, so the repair is kept."""
    folder, argv = tmp_path / "healed", ["prune", "demo", "--drop", "1", "--heal", method]
    text = ["--samples", "32", "--length", "96", "--device", "cpu"]
    assert main([*argv, *text, "--out", str(folder)]) == 0
    assert Pruning.read(folder).healed == method
    export(folder, tmp_path / "model.gguf")
    model, tokenizer = load_model(folder, CPU, torch.float32), load_tokenizer(folder)
    with llama_cpp(tmp_path / "model.gguf") as engine:
        compare(engine, model, tokenizer.encode(TEXT))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_files_hold_rounded_weights(tiny_gqa, tmp_path, kind):
    from gguf import GGUFReader
    from safetensors.torch import load_file

    export(tiny_gqa, tmp_path / "model.gguf", kind)
    stored = {t.name: t for t in GGUFReader(tmp_path / "model.gguf").tensors}
    source = load_file(tiny_gqa / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    found = torch.from_numpy(stored["blk.2.ffn_down.weight"].data.copy())
    assert torch.equal(found.view(torch.uint8).view(dtype).reshape(source.shape), source.to(dtype))
    assert stored["blk.2.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("name", ["mha", "tied", "llama3", "mistral", "qwen2", "qwen3"])
def test_every_family(llama_cpp, tiny_dir, tmp_path, name):
    folder = tiny_dir(name)
    content = export(folder, tmp_path / "model.gguf")
    model, tokenizer = load_model(folder, CPU, torch.float32), load_tokenizer(folder)
    long = tokenizer.encode(TEXT * 2)
    if limit := content.layout.values["context_length"] < 256:
        long = long[: content.layout.values["context_length"] - 1]
        assert any("sliding window" in note for note in content.notes)
    assert limit == (name in ("mistral", "qwen2", "qwen3"))
    with llama_cpp(tmp_path / "model.gguf", context=256) as engine:
        assert engine.tokenize(TEXT) == tokenizer.encode(TEXT)
        compare(engine, model, long)


@pytest.mark.parametrize("name", ["gqa", "qwen2"])
def test_blocks_without_a_part(llama_cpp, tiny_dir, tmp_path, name):
    """Also without attention in block 0, off which llama.cpp reads the width of all heads."""
    folder = tmp_path / "cut"
    depth.prune(tiny_dir(name), Removal((1,), (0, 3), (2,)), folder)
    content = export(folder, tmp_path / "model.gguf")
    assert content.layout.architecture == "deci"
    assert content.layout.values["attention.head_count"] == [1, 4, 0, 4]
    assert content.layout.values["feed_forward_length"] == [48, 32, 48, 48]
    model, tokenizer = load_model(folder, CPU, torch.float32), load_tokenizer(folder)
    ids = tokenizer.encode(TEXT)[:15]  # within the sliding window
    with llama_cpp(tmp_path / "model.gguf") as engine:
        compare(engine, model, ids)
    depth.prune(tiny_dir("qwen3"), Removal((), (3,)), tmp_path / "qwen3")
    with pytest.raises(CheckpointError, match=r"parts \(no attention in 3\), and its only"):
        gguf_file.describe(locate.open(str(tmp_path / "qwen3")), "f32")


def test_the_command_writes_a_file_or_a_run(tiny_gqa, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    argv = ["export", str(tiny_gqa), "--format", "gguf"]
    file = tmp_path / "new" / "tiny.gguf"
    assert main([*argv, "--out", str(file), "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not file.parent.exists()
    assert main([*argv, "--out", str(file)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [p.name for p in file.parent.iterdir()] == ["tiny.gguf"]
    assert told["bytes"] == file.stat().st_size
    assert abs(planned["bytes"] - told["bytes"]) < 8192
    assert planned["type"] == told["type"] == "f16"
    before = file.read_bytes()
    assert main([*argv, "--out", str(file)]) == 2
    assert (
        f"{file} already exists. Give another file, or add --overwrite." in capsys.readouterr().err
    )
    assert main([*argv, "--out", str(file), "--type", "f32", "--overwrite"]) == 0
    assert file.read_bytes() != before
    capsys.readouterr()
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    record = Export.read(tmp_path / "run")
    assert (tmp_path / "run" / record.file).read_bytes() == before
    assert read_run(tmp_path / "run").state == "done"


def test_nothing_that_looks_finished_is_left(tiny_gqa, tmp_path, monkeypatch):
    target = tmp_path / "model.gguf"
    content = gguf_file.describe(locate.open(str(tiny_gqa)), "f32")

    class Stops(Progress):
        def step(self, done, total, message=""):
            raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        gguf_file.write(content, target, progress=Stops())
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(full))
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="No space left on device"):
        gguf_file.write(content, target)
    (tmp_path / ".model.gguf.999999999.abc.tmp").touch()  # left by an export that was killed
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(OutputError, match="The file needs 16.2 MiB .* has only 1.00 MiB free"):
        gguf_file.write(content, target)
    assert list(tmp_path.iterdir()) == []
