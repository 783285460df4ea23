"""Inputs from outside that named huge counts or could not be read: each gives one true sentence."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc

import pytest

from core import outside
from core.checkpoint import headers, locate
from core.checkpoint.drop import check_drop
from core.checkpoint.tensors import INDEX, SINGLE, TensorIndex, parse_header
from core.checkpoint.tokenizer import tokenizer_info
from core.errors import CheckpointError, DataError, OptionError, PlanError
from core.heal import command as prune_command
from core.prune import scores
from core.runs.spec import parse_numbers

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def frugal():
    """Fail if the test takes more than 64 MiB or 2 seconds of computing."""
    began = time.process_time()
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    assert time.process_time() - began < 2


def header(table: str, size: int = 0) -> bytes:
    data = table.encode()
    return struct.pack("<Q", len(data)) + data + bytes(size)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested deeper"),
        ("[" * 80 + "]" * 80, "nested deeper than 64"),
        ('{"a": Infinity}', "Infinity is not valid"),
        ('{"a": NaN}', "NaN is not valid"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("[" + "0," * 4_000_001 + "0]", "more than 4,000,000 values"),
        ("1" * 5000, "4300"),
        (b"\xff{}", "byte 0 is not UTF-8"),
        ("{", "Expecting"),
    ],
)
def test_json_that_is_refused(text, says):
    with pytest.raises(outside.Malformed, match=says):
        outside.loads(text)


def test_json_that_is_read():
    assert outside.loads('{"a": [1, "\\ud83d\\ude00"]}') == {"a": [1, "\N{GRINNING FACE}"]}
    assert outside.loads("[" * 64 + "]" * 64)
    assert outside.loads('{"a": Infinity}', finite=False) == {"a": float("inf")}


@pytest.mark.usefixtures("frugal")
def test_files_of_any_size_and_kind(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(outside.Malformed, match="not a regular file"):
        outside.data(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(outside.Malformed, match="1,099,511,627,776 bytes"):
        outside.data(tmp_path / "large")
    with pytest.raises(outside.Malformed, match="impossible"):
        outside.data(tmp_path / "a\0b")
    (tmp_path / "wide.csv").write_text(",".join("a" * 5000) + "\n" + "1\n" * 5000)
    with pytest.raises(outside.Malformed, match="5,000,000 cells"):
        outside.table(tmp_path / "wide.csv")


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("0,1.5\n300000000,2.5", "no row for block 1"),
        ("3e8,1.5\n0,2.5", "no row for block 1"),
        ("inf,1.5", "line 2: 'inf' is not a block number"),
        ("0,1\n-1,2", "line 3: '-1' is not a block number"),
        ("0,one", "line 2: 'one' is not a number"),
        ("model.layers.1e300,1", "no row for block 0"),
    ],
)
def test_block_numbers_in_scores(tmp_path, rows, says):
    path = tmp_path / "scores.csv"
    path.write_text(f"block,score\n{rows}\n")
    with pytest.raises(DataError, match=says):
        scores.load(path)


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_hidden_layers": 2_000_000_000}, "2,000,000,000. The maximum is 1,000"),
        ({"vocab_size": 10**30}, "sets vocab_size to 1,0.* maximum is 2,147,483,647"),
        ({"num_attention_heads": 10**12}, "sets num_attention_heads to"),
        ({"hidden_size": "4" * 10_000}, "sets hidden_size to '444.*must be a whole number"),
        ({"architectures": 1}, "sets architectures to 1. It must be a list of names"),
        ({"architectures": [{}]}, "must be a list of names"),
        ({"model_type": ["llama"]}, "sets model_type to .'llama'.. It must be a name"),
        (
            {"model_type": "depthcut_llama", "layer_num_attention_heads": ["x" * 9] * 32},
            "block 0 to 'xxxxxxxxx'",
        ),
        ({"model_type": "depthcut_llama", "layer_intermediate_size": [8]}, "each of the 32 blocks"),
    ],
)
def test_sizes_in_a_config(tmp_path, changed, says):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changed))
    with pytest.raises(CheckpointError, match=says):
        headers.inspect(tmp_path)


def test_a_thousand_blocks_are_fine(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 1000}))
    assert headers.inspect(tmp_path).blocks == 1000


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("[" * 100_000, "nested deeper"),
        ("[]", "not a JSON object"),
        ('{"a":1}', "'a' is not a JSON object"),
        ('{"__metadata__":[]}', "__metadata__ is not"),
        ('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', "Infinity"),
        ('{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', "inf is not a whole"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e400]}}', "inf is not a whole"),
        ('{"a":{"dtype":"\\ud800","shape":[1],"data_offsets":[0,4]}}', "surrogate"),
        ('{"a":{"dtype":"f 32","shape":[1],"data_offsets":[0,4]}}', "has the dtype f 32"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', "are not two numbers"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "True is not a whole"),
        ('{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', "-1 is not a whole"),
        ('{"a":{"dtype":"F9","shape":[999999999],"data_offsets":[0,4]}}', "does not match"),
        ('{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}', "of up to 8"),
    ],
)
def test_safetensors_headers(table, says):
    with pytest.raises(CheckpointError, match=f"damaged: its header cannot be read.*{says}"):
        parse_header("model.safetensors", len(header(table)) + 4, table.encode())


def test_a_tensor_named_like_a_huge_block_is_no_block():
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    table = json.dumps({f"model.layers.{'9' * 5000}.a": entry})
    shard = parse_header("a", 8 + len(table) + 1, table.encode())
    assert headers.families.block_of(shard.tensors[0].name) is None


@pytest.mark.parametrize(
    "file", ["a" * 300, "../model.safetensors", "a\nb", "", 7, None, ["a"], "/etc/passwd"]
)
def test_files_that_an_index_may_not_name(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="lists .* which is not a file next to it|missing"):
        TensorIndex.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"model": 1}', "its model is 1"),
        ('{"added_tokens": [{}], "model": {"vocab": {"a": 0}}}', "token id None is not a whole"),
        ('{"added_tokens": 3, "model": {"vocab": {"a": 0}}}', "not a list of objects"),
        ('{"model": {"vocab": {"a": "0"}}}', "the token id '0' is not a whole number"),
        ('{"model": {"vocab": {"a": 1e300}}}', "1e.300 is not a whole number"),
        ('{"model": {"vocab": 5}}', "its vocabulary is 5"),
        ("{}", "it has no vocabulary"),
    ],
)
def test_tokenizers(tmp_path, content, says):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"is not a valid tokenizer: .*{says}"):
        tokenizer_info(tmp_path)


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize("data", [b"\xff" * 100_000, b"\x0a\xff\xff\xff\xff\x7f", b"\x0a"])
def test_sentencepiece_files(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a valid tokenizer"):
        tokenizer_info(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "x/" + "a" * 300, "~nobody-here", "a\0b", "a\nb", "/"])
def test_names_of_checkpoints(name):
    with pytest.raises(CheckpointError):
        locate.open(name, need="headers")
    with pytest.raises(DataError):
        scores.load(name)
    with pytest.raises(PlanError, match="Cannot read the plan"):
        prune_command._read_plan(name)


def test_a_folder_that_may_not_be_read_is_not_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "stat", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "")))
    assert not outside.is_file(tmp_path / "config.json")


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize("text", ["0-999999999", ",".join(["0-99999"] * 1000), "9" * 5000])
def test_ranges_of_numbers(text):
    with pytest.raises(OptionError, match="too long|too many|not a whole number") as caught:
        parse_numbers(text, "--drop")
    assert len(str(caught.value)) < 200


@pytest.mark.usefixtures("frugal")
def test_a_block_listed_often():
    with pytest.raises(PlanError, match="Block 3 is listed twice"):
        check_drop((3,) * 100_000, 8)


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\ud83d", '{"drop": Infinity}', "[]"])
def test_plan_files(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    spec = prune_command.PruneSpec(checkpoint="demo", plan=str(path), out=str(tmp_path / "out"))
    info = locate.open("demo").info
    with pytest.raises(PlanError):
        prune_command.selection(spec, info)


def test_a_named_index_of_shards_is_read(tmp_path):
    """Reading stays as it was for what is whole."""
    table = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (tmp_path / SINGLE).write_bytes(header(table, 8))
    (entry,) = TensorIndex.read(tmp_path).entries.values()
    assert (entry.shape, entry.dtype, entry.end - entry.start) == ((2,), "float32", 8)
