import json
import shutil
import struct

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main
from core.checkpoint import headers, locate
from core.checkpoint.tokenizer import read_tokenizer
from core.errors import CheckpointError


@pytest.fixture
def copy(tiny_dir, tmp_path):
    """A writable copy of a tiny checkpoint."""

    def make(variant="gqa", **options):
        return shutil.copytree(tiny_dir(variant, **options), tmp_path / "copy")

    return make


def edit(folder, file="config.json", **fields):
    value = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(value))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("shard_bytes", [None, 40_000])
def test_inspect_agrees_with_transformers(tiny_dir, variant, shard_bytes):
    folder = tiny_dir(variant, shard_bytes=shard_bytes)
    info = headers.inspect(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    assert info.parameters == sum(p.numel() for p in model.parameters())
    layers = model.model.layers
    assert info.block_parameters == tuple(sum(p.numel() for p in b.parameters()) for b in layers)
    assert info.block_modules[3]["q_proj"] == sum(
        p.numel() for p in layers[3].self_attn.q_proj.parameters()
    )
    assert sum(info.block_modules[1].values()) == info.block_parameters[1]
    assert info.parts["embedding"] == model.model.embed_tokens.weight.numel()
    assert info.parts["norm"] == model.model.norm.weight.numel()
    assert info.parts["head"] == (0 if info.tied else model.lm_head.weight.numel())
    assert info.family == config.model_type
    assert (info.blocks, info.hidden, info.heads) == (len(layers), config.hidden_size, 4)
    assert info.kv_heads == config.num_key_value_heads
    assert info.tied == config.tie_word_embeddings
    assert info.dtype == "float32"
    assert info.disk_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert info.memory_bytes["bfloat16"] == 2 * info.parameters
    assert info.tokenizer["size"] == len(AutoTokenizer.from_pretrained(folder))
    assert info.warnings == ()
    with torch.no_grad():
        # Within the sliding window, so that every token stays in the cache.
        cache = model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert info.kv_bytes_per_token["float32"] * 10 == info.kv_bytes(1, 10) == held
    # From the config alone, the same.
    assert headers.describe("x", config.to_dict(), None, None).parts == info.parts


def test_llama_7b_from_its_config(tmp_path, capsys):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))  # all else as the family's defaults
    assert main(["inspect", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"]["total"] == 6_738_415_616
    assert said["blocks"] == 32
    assert said["memory_bytes"]["float16"] == 2 * 6_738_415_616
    assert said["kv_bytes_per_token"]["float16"] == 2 * 32 * 4096 * 2
    with pytest.raises(CheckpointError, match="no weights"):
        locate.open(tmp_path)


def test_blocks_of_different_shapes(copy):
    """A width-pruned checkpoint: shapes from the headers, biases on o and down."""
    from safetensors.torch import load_file, save_file

    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.2."
    for name, rows in (("q", 16), ("k", 8), ("v", 8)):
        key = f"{prefix}self_attn.{name}_proj.weight"
        tensors[key] = tensors[key][:rows].clone()
    key = f"{prefix}self_attn.o_proj.weight"
    tensors[key] = tensors[key][:, :16].clone()
    for block in range(5):
        tensors[f"model.layers.{block}.self_attn.o_proj.bias"] = torch.zeros(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.self_attn\.[a-z]_proj\.weight' has shape"
    ):
        headers.inspect(folder)
    edit(folder, model_type="depthcut_llama")
    info = headers.inspect(folder)
    assert info.family == "llama"
    assert not info.uniform
    assert info.block_shapes[2] == {"heads": 2, "kv_heads": 1, "intermediate": 48}
    assert info.block_shapes[1] == {"heads": 4, "kv_heads": 2, "intermediate": 48}
    assert info.parameters == sum(t.numel() for t in tensors.values())
    assert info.kv_bytes_per_token["float32"] == 4 * 2 * 8 * (2 * 4 + 1)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def break_header(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"x" + data[9:])


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def smaller_embedding(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, folder / "model.safetensors")
    edit(folder, vocab_size=300)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (truncate, "model.safetensors is truncated"),
        (truncate_header, "model.safetensors is truncated"),
        (break_header, "model.safetensors is damaged"),
        (pickle_only, "available only as pickle files"),
        (smaller_embedding, "tokenizer of .* has 320 tokens but the embedding has only 300"),
        (lambda f: (f / "tokenizer.json").unlink(), "There is no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is not valid JSON"),
        (lambda f: (f / "tokenizer.json").write_text('{"a": 1}'), "it has no vocabulary"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: edit(f, num_hidden_layers=6), "declares 6 blocks but the weights contain 5"),
        (lambda f: edit(f, num_hidden_layers=4), "declares 4 blocks but the weights contain 5"),
        (lambda f: edit(f, hidden_size=64), "has shape"),
        (
            lambda f: edit(f, attention_bias=True),
            "'.*bias' and 19 more are missing from the weights",
        ),
        (lambda f: edit(f, hidden_size="big"), "sets hidden_size to 'big'"),
        (
            lambda f: edit(f, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
            "'gpt2' is not supported. Supported families: llama, mistral, qwen2, qwen3",
        ),
        (
            lambda f: edit(f, model_type="bert", architectures=["BertForMaskedLM"]),
            "not a causal language model",
        ),
        (
            lambda f: edit(f, architectures=["LlamaForSequenceClassification"]),
            "not a causal language model",
        ),
        (lambda f: edit(f, quantization_config={"quant_method": "gptq"}), "quantized .gptq"),
    ],
)
def test_wrong_things_are_told(copy, capsys, harm, says):
    folder = copy()
    harm(folder)
    with pytest.raises(CheckpointError, match=says):
        locate.open(folder)
    if "no weights" not in says:  # config.json alone may be inspected
        assert main(["inspect", str(folder)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("Error: ")


def test_missing_shard(copy):
    folder = copy(shard_bytes=40_000)
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 of 7 weight files are missing .*{shard.name}"):
        locate.open(folder)


def test_index_that_does_not_belong(copy):
    folder = copy(shard_bytes=40_000)
    index = json.loads((folder / headers.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00007.safetensors"
    (folder / headers.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"places 'model\.norm\.weight' in model-00001"):
        locate.open(folder)


def test_resolve_names(tiny_gqa, tmp_path, monkeypatch):
    workspace = tmp_path / "workspace"
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(workspace))
    shutil.copytree(tiny_gqa, workspace / "run-1" / "merged")
    shutil.copytree(tiny_gqa, workspace / "run-2")
    assert locate.open("run-1").folder == workspace / "run-1" / "merged"
    assert locate.open(workspace / "run-1").folder == workspace / "run-1" / "merged"
    assert locate.open("run-2").folder == workspace / "run-2"
    (workspace / "run-3" / "adapter").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="adapter"):
        locate.open("run-3" if (tmp_path / "run-3").exists() else workspace / "run-3")
    with pytest.raises(CheckpointError, match="no folder nowhere"):
        locate.open("nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        locate.open(workspace / "run-2" / "config.json")


def test_content_key(tiny_dir, copy):
    folder = copy()
    key, full = headers.content_key(folder), headers.content_key(folder, full=True)
    sharded = tiny_dir("gqa", shard_bytes=40_000)
    assert headers.content_key(sharded) == key
    assert headers.content_key(sharded, full=True) == full
    assert headers.content_key(tiny_dir("gqa", seed=1)) != key
    entry = headers.TensorIndex.read(folder).entries["model.embed_tokens.weight"]
    with (folder / "model.safetensors").open("r+b") as handle:
        handle.seek(entry.start + 1500)  # between the samples
        handle.write(struct.pack("<f", 1.5))
    assert headers.content_key(folder, full=True) != full


def test_tensor_bytes(tiny_gqa):
    index = headers.TensorIndex.read(tiny_gqa)
    model = AutoModelForCausalLM.from_pretrained(tiny_gqa, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert index.read_bytes(index.entries[name]) == tensor.numpy().tobytes()


def test_sentencepiece_size(tmp_path):
    def piece(text):
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\x3f"
        return b"\x0a" + bytes([len(body)]) + body

    trainer = b"\x12\x03\x20\x80\x02"
    (tmp_path / "tokenizer.model").write_bytes(piece(b"a") + piece(b"bc") + piece(b"d") + trainer)
    assert headers.tokenizer_info(tmp_path)["size"] == 3


def test_real_checkpoint(real_dir):
    info = locate.open(real_dir / "stories260k").info
    assert info.parameters == 260_032
    assert (info.blocks, info.heads, info.kv_heads, info.tied) == (5, 8, 4, True)


def test_a_tokenizer_with_tokens_that_cannot_be_read_is_one_sentence(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(CheckpointError, match=r"Cannot read .* as a tokenizer: data did not"):
        read_tokenizer(path)


def test_a_tokenizer_is_told_by_what_its_files_say_now(tmp_path):
    def write(folder, added, **settings):
        table = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(table))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    added = [{"id": 5, "content": "<pad>", "special": True}]
    write(one, added, pad_token="<pad>")
    write(other, added, eos_token="<pad>")  # the same tokenizer.json, put to another use
    first = headers.tokenizer_info(one)
    assert (first["size"], first["text_size"]) == (6, 2)
    assert first["special_beyond"] == {"<pad>": 5}
    assert headers.tokenizer_info(other)["text_size"] == 6
    first["special_beyond"].clear()  # the caller's own
    assert headers.tokenizer_info(one)["special_beyond"] == {"<pad>": 5}
    write(one, [{"id": 7, "content": "<pad>", "special": True}], pad_token="<pad>")
    assert headers.tokenizer_info(one)["size"] == 8
